"""Files are written whole or not at all."""

import os

import pytest

from convmlp_mm.checkpoint import check_output, write_file


def test_file_is_replaced_only_on_request(tmp_path):
    path = tmp_path / 'table.md'
    write_file(path, 'old')
    with pytest.raises(FileExistsError, match="table.md' is already there"):
        write_file(path, 'new')
    assert path.read_text() == 'old'
    write_file(path, b'new', overwrite=True)
    assert path.read_bytes() == b'new'
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_failure_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / 'table.md'
    write_file(path, 'old')
    with pytest.raises(TypeError):
        write_file(path, 3, overwrite=True)

    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space left'):
        write_file(path, 'new', overwrite=True)
    assert path.read_text() == 'old'
    assert [p.name for p in tmp_path.iterdir()] == ['table.md']


def test_places_that_cannot_be_written_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder '.*no' does not exist"):
        check_output(tmp_path / 'no' / 'table.md')
    with pytest.raises(IsADirectoryError, match='is a folder'):
        check_output(tmp_path, overwrite=True)
