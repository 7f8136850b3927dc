"""Read checkpoints from paths and URLs without running what they may carry.

The toolkits fall back to unpickling anything. Here a file is plain tensors and
the Runner's own records, or it is refused; a download is checked before it
enters the cache.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import os
import pickle
import re
import shutil
import types
import urllib.request
import uuid
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import BinaryIO
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine import fileio
from mmengine.dist import barrier, is_main_process
from mmengine.logging import print_log
from mmengine.logging.history_buffer import HistoryBuffer

__all__ = [
    'CheckpointError',
    'check_content',
    'dump_checkpoint',
    'hash_file',
    'locate_checkpoint',
    'read_checkpoint',
]

# Where the authors publish, and the variable that names a folder with their files.
ROOT = 'https://shi-labs.com/projects/convmlp/checkpoints/'
MIRROR = 'CONVMLP_WEIGHTS'
# Seconds that a server may take to answer, and between two parts of a file.
TIMEOUT = 60
# The first digits stand in the names of published files (torch hub, OpenMMLab), where a
# date may stand as well.
HASH_IN_NAME = re.compile(r'-(?!20\d{6}\.)([0-9a-f]{8,64})\.\w+$')
# Kinds of numbers, as numpy writes them.
NUMBERS = ['b1', 'i1', 'u1', 'i2', 'u2', 'i4', 'u4', 'i8', 'u8', 'f2', 'f4', 'f8']


class CheckpointError(ValueError):
    """A file that cannot be used as the checkpoint that it is to be."""


def _dtype(kind: str, *_) -> np.dtype:
    """Stand in for ``numpy.dtype``, of which other kinds can hold memory addresses.

    numpy's own instances, unlike copies, ignore the state that a pickle gives them.
    """
    if kind not in NUMBERS:
        raise pickle.UnpicklingError(f'numpy.dtype of {kind!r}')
    return np.dtype(kind)


def _runner_globals() -> dict[str, object]:
    """List the few things beside tensors that a Runner's checkpoint holds."""
    # numpy 1.26 has an almost empty _core.
    core = np._core if hasattr(getattr(np, '_core', None), 'multiarray') else np.core
    allowed = {
        # The statistics of a HistoryBuffer, which are not taken from the file.
        'builtins.getattr': lambda owner, name: None,
        'builtins.slice': slice,
        'numpy.ndarray': np.ndarray,
        'numpy.dtype': _dtype,
        f'{HistoryBuffer.__module__}.HistoryBuffer': HistoryBuffer,
    }
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        allowed[f'{module}._reconstruct'] = core.multiarray._reconstruct
        allowed[f'{module}.scalar'] = core.multiarray.scalar
    for kind in (type(np.dtype(number)) for number in NUMBERS):
        allowed[f'{kind.__module__}.{kind.__name__}'] = kind
    return allowed


class _Skipped:
    """Stands for an object that is left out, whatever a pickle does to it."""

    def __init__(self, *args, **kwargs) -> None: ...

    __setstate__ = __setitem__ = append = extend = add = __init__


class _Unpickler(pickle.Unpickler):
    """What ``weights_only=True`` is, for torch before 2.6, whose list is closed."""

    # Bytes of each entry of the archive; names of what was left out, if it may be.
    sizes: Mapping[str, int] = {}
    skipped: list[str] | None = None

    def find_class(self, module: str, name: str) -> object:
        # torch.save writes the names of Python 2.
        key = f'{module.replace("__builtin__", "builtins")}.{name}'
        fixed = {
            'builtins.slice': slice,
            'numpy.ndarray': np.ndarray,
            'collections.OrderedDict': OrderedDict,
            'torch.Size': torch.Size,
        }
        allowed = {
            **_runner_globals(),
            # Milestones of a MultiStepLR.
            'collections.Counter': Counter,
            '_codecs.encode': codecs.encode,
            'torch._utils._rebuild_parameter': torch._utils._rebuild_parameter,
            'torch._utils._rebuild_tensor_v2': torch._utils._rebuild_tensor_v2,
        }
        if key in fixed:
            return fixed[key]
        # A pickle can set attributes of what it gets: never of the original.
        if key not in allowed:
            if self.skipped is None:
                raise pickle.UnpicklingError(f'WeightsUnpickler error: {key}')
            self.skipped.append(key)
            return type(name, (_Skipped,), {})
        if allowed[key] is HistoryBuffer:
            return type(name, (), {'__new__': lambda *_: HistoryBuffer()})
        return partial(allowed[key])

    def __setattr__(self, name: str, value: object) -> None:
        # torch sets the function that finds a storage.
        if name == 'persistent_load':
            value = partial(self._load_storage, value)
        super().__setattr__(name, value)

    def _load_storage(self, load: Callable, key: tuple) -> object:
        """Refuse what torch before 2.6 does not: source code, and too long storages."""
        if key[0] not in ('storage', b'storage'):
            raise pickle.UnpicklingError(f'{key[0]!r} in place of a storage')
        size = self.sizes.get(f'data/{key[2]}')
        if (
            self.sizes
            and size != key[4] * getattr(key[1], 'dtype', torch.uint8).itemsize
        ):
            raise pickle.UnpicklingError(f'storage {key[2]} has {size} bytes')
        return load(key)


def _check_archive(file: BinaryIO) -> dict[str, int]:
    """Refuse an archive that torch would run, or that would grow.

    Args:
        file (BinaryIO): At its beginning, where it is left.

    Returns:
        dict[str, int]: Bytes by the name of the entry; none of the format before 1.6.

    Raises:
        ValueError: If it is a TorchScript archive, larger than the file, or ambiguous.
    """
    start, size = file.read(4), file.seek(0, os.SEEK_END)
    file.seek(0)
    if start != b'PK\3\4':
        return {}
    # By torch's own reader: another may see other entries in the same file.
    if 'constants.pkl' in torch._C.PyTorchFileReader(file).get_all_records():
        raise ValueError('it is a TorchScript archive, which is a program')
    entries = zipfile.ZipFile(file).infolist()
    whole = sum(entry.file_size for entry in entries)
    if whole > size or any(entry.compress_type for entry in entries):
        raise ValueError(f'its {size} bytes would become {whole}')
    sizes = {entry.filename.partition('/')[2]: entry.file_size for entry in entries}
    if len(sizes) < len(entries):
        raise ValueError('entries of it have the same name')
    file.seek(0)
    return sizes


def _load_safely(
    file: BinaryIO,
    name: str,
    map_location: str | torch.device,
    skipped: list[str] | None,
) -> object:
    if name.endswith('.safetensors'):
        # Of timm and Hugging Face; timm brings the reader.
        from safetensors.torch import load

        loaded = load(file.read())
        return {key: value.to(map_location) for key, value in loaded.items()}
    sizes = _check_archive(file)
    if not sizes:
        # A file of the disk would also be tried as a tar archive, and unpacked.
        file = io.BytesIO(file.read())
    has_list = hasattr(torch.serialization, 'get_unsafe_globals_in_checkpoint')
    if has_list and skipped is None:
        allowed = [(value, key) for key, value in _runner_globals().items()]
        with torch.serialization.safe_globals(allowed):
            return torch.load(file, map_location=map_location, weights_only=True)
    module = types.ModuleType('restricted_pickle')
    members = dict(sizes=sizes, skipped=skipped)
    module.Unpickler = type('Unpickler', (_Unpickler,), members)
    module.load = lambda file, **kwargs: module.Unpickler(file, **kwargs).load()
    return torch.load(
        file, map_location=map_location, pickle_module=module, weights_only=False
    )


def _check_hash(path: str, url: str) -> None:
    """Compare a file with the SHA-256 in its URL, if there is one."""
    match = HASH_IN_NAME.search(urlparse(url).path)
    if match is None:
        return
    digest = hash_file(path)
    if not digest.startswith(match.group(1)):
        raise ValueError(
            f'{path!r}, which is to be {url}, has the SHA-256 {digest}, but '
            f'{match.group(1)} is expected: it is damaged or another file'
        )


def _download(url: str) -> str:
    """Return the path of ``url`` in torch hub's cache, fetching it once.

    Names begin with the hash of the URL: many servers have a ``model.pth``. With a
    mirror, it is the path in that of what comes after ``ROOT``.
    """
    mirror = os.environ.get(MIRROR)
    if mirror and url.startswith(ROOT):
        path = os.path.join(mirror, url.removeprefix(ROOT))
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f'checkpoint {path!r} does not exist ({MIRROR} is set, which stands '
                f'in for {ROOT})'
            )
    else:
        name = os.path.basename(urlparse(url).path)
        if not name:
            raise ValueError(f'{url} names a folder, not the file of a checkpoint')
        name = f'{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}'
        path = os.path.join(torch.hub.get_dir(), 'checkpoints', name)
        if not os.path.exists(path):
            _fetch(url, path)
    _check_hash(path, url)
    return path


def _fetch(url: str, path: str) -> None:
    """Put a file into the cache if it is whole, safe and the right one."""
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    # With the ending of the name, by which the file is read.
    temporary = os.path.join(folder, f'{uuid.uuid4().hex}.{name}')
    request = urllib.request.Request(url, headers={'User-Agent': 'convmlp_mm'})
    print_log(f'Fetching {url} to {path}', 'current')
    try:
        try:
            with (
                urllib.request.urlopen(request, timeout=TIMEOUT) as response,
                open(temporary, 'wb') as file,
            ):
                shutil.copyfileobj(response, file)
        except OSError as error:
            instead = f'; {MIRROR} can name a folder that has it'
            raise OSError(
                f'cannot fetch {url}: {error}'
                + (instead if url.startswith(ROOT) else '')
            ) from error
        _check_hash(temporary, url)
        # A connection that breaks off early is no error for urllib.
        _open(temporary, url, 'cpu')
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _open(
    source: str | BinaryIO,
    name: str,
    map_location: object,
    skipped: list[str] | None = None,
) -> Mapping:
    """Read a file, and say of what is wrong with it what a user can use."""
    HistoryBuffer()
    # Registered by the line above. A buffer that is unpickled brings its own.
    shared = HistoryBuffer._statistics_methods
    statistics = dict(shared)
    file_name = source if isinstance(source, str) else name
    with open(source, 'rb') if isinstance(source, str) else source as file:
        try:
            checkpoint = _load_safely(file, file_name, map_location, skipped)
        except ImportError:
            raise
        # Unpickling damaged bytes can raise any exception.
        except Exception as error:
            # torch puts the object in question into the middle of much advice, which
            # recommends to load it all the same.
            _, forbidden, text = str(error).rpartition('WeightsUnpickler error:')
            lines = [line.strip() for line in text.splitlines()]
            lines = [line for line in lines if line and 'weights_only' not in line]
            reason = lines[0] if lines else type(error).__name__
            reason = reason.removeprefix('Unsupported global: GLOBAL ')
            reason = re.split(r' was not an allowed|[.,]? Please', reason)[0]
            if forbidden:
                reason += '; tools/convert_weights.py takes the tensors alone'
            raise CheckpointError(
                f'checkpoint {name!r} is not a file of plain weights, is cut '
                f'short, or holds objects that are not allowed: {reason}'
            ) from error
        finally:
            shared.clear()
            shared.update(statistics)
    check_content(checkpoint, name)
    return checkpoint


def check_content(checkpoint: object, name: str) -> None:
    """Check that the parts of a checkpoint are dicts with names, as all code expects.

    Args:
        checkpoint (object): What a file holds.
        name (str): What messages call it.

    Raises:
        CheckpointError: If they are not.
    """
    parts = {'': checkpoint}
    if isinstance(checkpoint, Mapping):
        for key in ('state_dict', 'ema_state_dict', 'meta', 'message_hub'):
            if checkpoint.get(key) is not None:
                parts[f' as {key}'] = checkpoint[key]
        if isinstance(checkpoint.get('model'), Mapping):
            parts[' as model'] = checkpoint['model']
        meta = checkpoint.get('meta')
        if isinstance(meta, Mapping) and meta.get('dataset_meta') is not None:
            parts[' as meta.dataset_meta'] = meta['dataset_meta']
    for where, part in parts.items():
        if not isinstance(part, Mapping):
            kind = type(part).__name__
            raise CheckpointError(
                f'checkpoint {name!r} must hold a dict{where}, but holds a {kind}'
            )
        for key in part:
            if not isinstance(key, str):
                raise CheckpointError(
                    f'checkpoint {name!r} must hold a dict with names{where}, but one '
                    f'of its keys is {key!r}'
                )


def locate_checkpoint(filename: str | os.PathLike) -> str:
    """Find a checkpoint on this machine, fetching it if it has to be.

    Args:
        filename (str | PathLike): See :func:`read_checkpoint`.

    Returns:
        str: A path, or the URL itself if it is not of http(s).

    Raises:
        OSError: See :func:`read_checkpoint`.
        ValueError: If the file of a URL is not what it should be.
    """
    filename = os.path.expanduser(os.fspath(filename))
    if filename.startswith(('http://', 'https://')):
        # One process of the job fetches; the others find it, unless they are
        # on a machine with another disk.
        try:
            if is_main_process():
                _download(filename)
        finally:
            # Nobody may wait for a process that has failed.
            barrier()
        return _download(filename)
    if '://' not in filename and not os.path.isfile(filename):
        raise FileNotFoundError(f'checkpoint {filename!r} does not exist')
    return filename


def hash_file(path: str | os.PathLike) -> str:
    """Compute the SHA-256 of a file.

    Args:
        path (str | PathLike): The file.

    Returns:
        str: 64 hexadecimal digits.
    """
    sha256 = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(2**20):
            sha256.update(chunk)
    return sha256.hexdigest()


def read_checkpoint(
    filename: str | os.PathLike,
    map_location: str | torch.device = 'cpu',
    skipped: list[str] | None = None,
) -> dict:
    """Read a checkpoint without running code that it may carry.

    Args:
        filename (str | PathLike): A path, an http(s) URL, which goes to the
            cache of torch hub, or any other URL that mmengine has a file
            backend for. The folder that the environment variable
            ``CONVMLP_WEIGHTS`` names stands in for the authors' server.
        map_location (str | torch.device): Where the tensors go. Defaults to
            ``'cpu'``.
        skipped (list[str], optional): Objects other than tensors and the Runner's
            own records are left out, and their classes added to this list. By
            default they are an error.

    Returns:
        dict: What the file holds.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If a URL cannot be fetched.
        CheckpointError: If the file is not a checkpoint, is cut short, or holds
            objects other than tensors and the Runner's own records.
        ValueError: If the file of a URL has not the SHA-256 that the end of its name
            says (``-`` and eight digits or more). What is refused does not enter
            the cache.
    """
    filename = os.path.expanduser(os.fspath(filename))
    source = locate_checkpoint(filename)
    if '://' in source:
        source = io.BytesIO(fileio.get(filename))
    return _open(source, filename, map_location, skipped)


def dump_checkpoint(checkpoint: Mapping) -> bytes:
    """Make the content of a file that ``torch.load`` reads as weights only.

    Args:
        checkpoint (Mapping): Tensors by name, or a dict with ``state_dict``
            and ``meta``.

    Returns:
        bytes: The content.

    Raises:
        ValueError: If it holds more than tensors, text and numbers.
    """

    def whole(value: object) -> object:
        # A tensor may be a part of a larger one, all of which would be saved, and an
        # expanded one much larger than what is saved of it.
        if isinstance(value, torch.Tensor):
            value = value.detach()
            stored = value.untyped_storage().nbytes()
            return value.clone() if value.nbytes < stored else value
        if isinstance(value, Mapping):
            return {key: whole(item) for key, item in value.items()}
        return value

    buffer = io.BytesIO()
    torch.save(whole(checkpoint), buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            'the checkpoint holds more than tensors, text and numbers'
        ) from error
    return buffer.getvalue()
