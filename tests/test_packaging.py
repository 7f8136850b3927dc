"""What a wheel, an sdist and an editable install carry, read from real builds."""

import email
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import convmlp_mm

ROOT = Path(__file__).resolve().parents[1]
CARRIED = ('configs/', 'tools/', 'model-index.yml')


def run(*command, cwd):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def hook(name, source, target):
    """Call a hook of the build backend as pip does, and return the file it made."""
    target.mkdir()
    code = f'from setuptools import build_meta; build_meta.{name}({str(target)!r})'
    run(sys.executable, '-c', code, cwd=source)
    (made,) = target.iterdir()
    return made


def build_wheel(source, target):
    pip = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation']
    run(*pip, '-w', str(target), str(source), cwd=target.parent)
    (wheel,) = target.glob('*.whl')
    return wheel


def names_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return sorted(archive.namelist())


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*'))


@pytest.fixture(scope='module')
def tracked():
    """Return the files of the project as git sees them, new ones included."""
    if not (ROOT / '.git').exists():
        pytest.skip('not a git checkout')
    listed = run(
        'git', 'ls-files', '--cached', '--others', '--exclude-standard', '-z', cwd=ROOT
    )
    return sorted(name for name in listed.split('\0') if (ROOT / name).is_file())


@pytest.fixture
def source(tracked, tmp_path):
    """Copy the project, so that no build touches the checkout."""
    folder = tmp_path / 'a source'
    for name in tracked:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


def test_wheel_carries_package_configs_and_tools(source, tracked, tmp_path):
    (source / 'configs' / '__pycache__').mkdir()
    (source / 'configs' / '__pycache__' / 'stray.pyc').touch()
    before = tree(source)
    wheel = build_wheel(source, tmp_path / 'out')
    assert tree(source) == before, 'the build left files in the source tree'

    package = [
        name
        for name in tracked
        if name.startswith('convmlp_mm/') and name.endswith('.py')
    ]
    carried = [name for name in tracked if name.startswith(CARRIED)]
    assert any(name.startswith('tools/') for name in carried)
    info = f'convmlp_mm-{convmlp_mm.__version__}.dist-info/'
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.startswith(info)]
        assert sorted(names) == sorted(
            package + [f'convmlp_mm/.mim/{name}' for name in carried]
        )
        for name in carried:
            copied = archive.read(f'convmlp_mm/.mim/{name}')
            assert copied == (ROOT / name).read_bytes(), name
        assert any(name.endswith('LICENSE') for name in archive.namelist())


def test_metadata(source, tmp_path):
    wheel = build_wheel(source, tmp_path / 'out')
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith('/METADATA'))
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata['Name'].replace('-', '_') == 'convmlp_mm'
    assert metadata['Version'] == convmlp_mm.__version__
    assert metadata['License'] == 'Apache-2.0'
    extras = {'onedl', 'openmmlab', 'analysis', 'deploy', 'tests'}
    assert set(metadata.get_all('Provides-Extra')) == extras

    requirements = metadata.get_all('Requires-Dist')
    plain = [r for r in requirements if 'extra ==' not in r]
    assert {re.match(r'[\w-]+', r).group() for r in plain} == {'torch', 'numpy'}
    for extra, mmcv in (('onedl', 'onedl-mmcv'), ('openmmlab', 'mmcv')):
        # Files of both stacks would overwrite each other.
        chosen = [r for r in requirements if re.search(f'extra == .{extra}\\b', r)]
        toolkits = [r for r in chosen if re.match('(onedl-)?mm', r)]
        assert any(re.match(f'{mmcv}\\b', r) for r in toolkits)
        assert {r.startswith('onedl-') for r in toolkits} == {extra == 'onedl'}


def test_deleted_file_does_not_come_back(source, tmp_path):
    extra = source / 'convmlp_mm' / 'short_lived.py'
    extra.touch()
    first = build_wheel(source, tmp_path / 'first')
    assert 'convmlp_mm/short_lived.py' in names_in(first)
    extra.unlink()
    second = build_wheel(source, tmp_path / 'second')
    assert 'convmlp_mm/short_lived.py' not in names_in(second)


def test_wheel_from_sdist_and_from_editable_source_are_the_same(source, tmp_path):
    expected = names_in(build_wheel(source, tmp_path / 'direct'))
    sdist = hook('build_sdist', source, tmp_path / 'sdist')
    assert names_in(build_wheel(sdist, tmp_path / 'from_sdist')) == expected

    hook('build_editable', source, tmp_path / 'editable')
    mim = source / 'convmlp_mm' / '.mim'
    assert (mim / 'configs').resolve() == source / 'configs'
    assert (mim / 'tools').resolve() == source / 'tools'
    assert names_in(build_wheel(source, tmp_path / 'from_editable')) == expected


def test_pre_commit_formats_with_the_ruff_of_the_tests():
    packaging = pytest.importorskip('packaging.requirements')
    config = (ROOT / '.pre-commit-config.yaml').read_text()
    release = re.search(r'ruff-pre-commit\n\s+rev: v([\d.]+)', config).group(1)
    text = re.search(r'"(ruff[^"]*)"', (ROOT / 'pyproject.toml').read_text()).group(1)
    assert release in packaging.Requirement(text).specifier
