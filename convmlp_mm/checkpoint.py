"""Read checkpoints safely, name what is inside, match it with a model, convert it.

The toolkits fall back to unpickling anything. Here a file is plain tensors and
the Runner's own records, or it is refused; a download is checked before it
enters the cache.

mmengine loads weights as far as names and shapes match and warns about the
rest. The functions here stop instead: a file either has every tensor of the
backbone, with numbers of the right kind, or nothing is loaded and the error says
what is wrong. They know names, shapes and values only, nothing of the backbone's code.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import io
import os
import os.path as osp
import pickle
import re
import shutil
import tempfile
import types
import urllib.request
import uuid
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import BinaryIO
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine import fileio
from mmengine.dist import barrier, is_main_process
from mmengine.logging import print_log
from mmengine.logging.history_buffer import HistoryBuffer
from torch import Tensor, nn

__all__ = [
    'CheckpointError',
    'check_content',
    'check_output',
    'check_tensors',
    'describe_arch',
    'dump_checkpoint',
    'extract_backbone',
    'find_not_finite',
    'fit_checkpoint',
    'hash_file',
    'load_backbone_weights',
    'locate_checkpoint',
    'name_as_model',
    'read_checkpoint',
    'remove_leftovers',
    'say_taken',
    'some_of',
    'tensors_of',
    'to_mm_layout',
    'to_published_layout',
    'without_module',
    'write_file',
]

# What mkstemp makes of the prefix and suffix below.
LEFTOVER = re.compile(r'\..+\.[a-z0-9_]{8}\.tmp')


def check_output(path: str | os.PathLike, overwrite: bool = False) -> None:
    """Check that a file can be written, before the work for it is done.

    Args:
        path (str | PathLike): The file.
        overwrite (bool): Whether it may be there already. Defaults to False.

    Raises:
        FileNotFoundError: If its folder does not exist.
        FileExistsError: If it is there and must not be.
        IsADirectoryError: If it is a folder.
    """
    folder = osp.dirname(path) or '.'
    if not osp.isdir(folder):
        raise FileNotFoundError(f'folder {folder!r} does not exist')
    if osp.isdir(path):
        raise IsADirectoryError(f'{os.fspath(path)!r} is a folder')
    if osp.exists(path) and not overwrite:
        raise FileExistsError(f'{os.fspath(path)!r} is already there')


def write_file(
    path: str | os.PathLike, content: bytes | str, overwrite: bool = False
) -> None:
    """Write all of a file or nothing.

    Args:
        path (str | PathLike): The file.
        content (bytes | str): What it will hold; text becomes UTF-8.
        overwrite (bool): Whether to replace a file that is there. Defaults to
            False.

    Raises:
        OSError: See :func:`check_output`; and if the disk is full. A file
            that was there before is then as it was.
    """
    check_output(path, overwrite)
    if isinstance(content, str):
        content = content.encode()
    # In the same folder: only there can it be renamed at once.
    folder, name = osp.split(os.fspath(path))
    file, temporary = tempfile.mkstemp('.tmp', f'.{name}.', folder or '.')
    try:
        with os.fdopen(file, 'wb') as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp lets nobody else read.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _flush_folder(folder or '.')


def _flush_folder(folder: str) -> None:
    """Let the new name of a file survive a loss of power, where that can be asked."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(folder: str | os.PathLike) -> list[str]:
    """Remove what :func:`write_file` had not finished when its process was killed.

    Args:
        folder (str | PathLike): Nobody must be writing into it.

    Returns:
        list[str]: The names of the files.

    Raises:
        OSError: If the folder cannot be read or written.
    """
    names = sorted(name for name in os.listdir(folder) if LEFTOVER.fullmatch(name))
    for name in names:
        os.unlink(osp.join(folder, name))
    return names


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


# How the toolkits call a backbone, and the tops of this one's published names.
BACKBONE = 'backbone.'
BACKBONE_PREFIXES = ('tokenizer.', 'conv_stages.', 'stages.')
# How mmpretrain calls a classifier's head.
CLASSIFIER_HEAD = 'head.fc.'
# What the toolkits keep of a data set; in capitals in their former versions.
DATASET_META = ('classes', 'palette')
MAX_NAMES = 6


def tensors_of(checkpoint: Mapping) -> dict[str, Tensor]:
    """Pick the tensors of a checkpoint, wherever it keeps them.

    Args:
        checkpoint (Mapping): With ``state_dict`` or ``model``, or a state dict itself.

    Returns:
        dict[str, Tensor]: As they are named there.
    """
    return _tensors(checkpoint.get(_taken(checkpoint), checkpoint))


def _tensors(content: object) -> dict[str, Tensor]:
    items = content.items() if isinstance(content, Mapping) else ()
    return {key: value for key, value in items if isinstance(value, Tensor)}


def _taken(checkpoint: Mapping) -> str | None:
    """Return the key that the tensors are under."""
    keys = ('state_dict', 'model')
    return next((k for k in keys if isinstance(checkpoint.get(k), Mapping)), None)


def say_taken(checkpoint: Mapping) -> str:
    """Say which tensors are taken where a checkpoint holds several sets of them.

    Args:
        checkpoint (Mapping): See :func:`tensors_of`.

    Returns:
        str: To be added to a message; empty if there is one set.
    """
    taken = _taken(checkpoint)
    others = [k for k, v in checkpoint.items() if k != taken and _tensors(v)]
    return f', taken from {taken!r}, not from {some_of(others)}' if others else ''


def name_as_model(checkpoint: Mapping) -> dict[str, Tensor]:
    """Give the tensors of a checkpoint the names they have in the toolkits.

    Args:
        checkpoint (Mapping): See :func:`fit_checkpoint`.

    Returns:
        dict[str, Tensor]: Without ``module.``, the backbone's tensors with
        the prefix ``backbone.``, and a published classifier's head as
        mmpretrain names it.
    """
    found = without_module(checkpoint)
    if any(key.startswith(BACKBONE_PREFIXES) for key in found):
        found = {_rename_classifier(key): value for key, value in found.items()}
    return found


def without_module(checkpoint: Mapping) -> dict[str, Tensor]:
    """Pick the tensors of a checkpoint, without the prefix of DDP.

    Args:
        checkpoint (Mapping): See :func:`tensors_of`.

    Returns:
        dict[str, Tensor]: By their names without ``module.``.

    Raises:
        ValueError: If a tensor stands there with the prefix and without.
    """
    state_dict = tensors_of(checkpoint)
    found = {key.removeprefix('module.'): value for key, value in state_dict.items()}
    if len(found) < len(state_dict):
        raise ValueError('tensors stand twice in the checkpoint, with "module." before')
    return found


def _rename_classifier(key: str) -> str:
    """Give a tensor of a published classifier its name in mmpretrain."""
    if key.startswith('head.'):
        return CLASSIFIER_HEAD + key.removeprefix('head.')
    return BACKBONE + key


def to_mm_layout(checkpoint: Mapping) -> dict:
    """Convert a checkpoint to the layout of today's toolkits.

    Args:
        checkpoint (Mapping): A published classifier, detector of mmdetection
            2.x or segmentor of mmsegmentation 0.x, or a checkpoint of the
            Runner. It is not changed.

    Returns:
        dict: ``state_dict`` with the names of the models, and ``meta``, in
        which ``dataset_meta`` has the names of the classes if the file has
        them. The tensors are those of the file.

    Raises:
        ValueError: If there is no ConvMLP in the checkpoint.
    """
    state_dict = _convmlp_model(checkpoint)
    meta = _plain_meta(checkpoint)
    dataset_meta = {key: meta.pop(key.upper(), None) for key in DATASET_META}
    dataset_meta = {key: value for key, value in dataset_meta.items() if value}
    if dataset_meta:
        meta.setdefault('dataset_meta', dataset_meta)
    return dict(state_dict=state_dict, meta=meta)


def to_published_layout(checkpoint: Mapping) -> dict:
    """Convert a checkpoint to the layout of the authors' files.

    Args:
        checkpoint (Mapping): See :func:`to_mm_layout`.

    Returns:
        dict: For a classifier or a backbone alone, tensors by their published
        names. For a detector or segmentor, ``state_dict`` with the names of
        the model, and ``meta`` with ``CLASSES`` and ``PALETTE``, as
        mmdetection 2.x and mmsegmentation 0.x have them. The tensors are
        those of the file.

    Raises:
        ValueError: If there is no ConvMLP in the checkpoint.
    """
    state_dict = _convmlp_model(checkpoint)
    others = [key for key in state_dict if not key.startswith(BACKBONE)]
    if all(key.startswith(CLASSIFIER_HEAD) for key in others):
        return {
            key.replace(CLASSIFIER_HEAD, 'head.').removeprefix(BACKBONE): value
            for key, value in state_dict.items()
        }
    meta = _plain_meta(checkpoint)
    for key, value in meta.pop('dataset_meta', {}).items():
        if key.lower() in DATASET_META:
            meta.setdefault(key.upper(), value)
    return dict(state_dict=state_dict, meta=meta)


def _convmlp_model(checkpoint: Mapping) -> dict[str, Tensor]:
    state_dict = name_as_model(checkpoint)
    if not any(key.startswith(BACKBONE + BACKBONE_PREFIXES[0]) for key in state_dict):
        raise ValueError(
            'there is no ConvMLP among the tensors, which are '
            + (some_of(state_dict) or 'none')
        )
    return state_dict


def _plain_meta(checkpoint: Mapping) -> dict:
    """Keep what a file of weights can hold: text, numbers and lists of them."""

    def is_plain(value: object) -> bool:
        if isinstance(value, Mapping):
            return is_plain(list(value.keys())) and is_plain(list(value.values()))
        if isinstance(value, (list, tuple)):
            return all(map(is_plain, value))
        return value is None or type(value) in (str, int, float, bool)

    meta = checkpoint.get('meta') or {}
    return {key: value for key, value in meta.items() if is_plain(value)}


def some_of(names: Iterable[str]) -> str:
    """Write a list that stays readable.

    Args:
        names (Iterable[str]): All of them.

    Returns:
        str: The first ones, and how many more there are.
    """
    names = list(names)
    more = len(names) - MAX_NAMES
    shown = ', '.join(names[:MAX_NAMES])
    return f'{shown} and {more} more' if more > 0 else shown


# What a classifier's checkpoint holds beyond the feature extractor.
HEAD_PREFIXES = ('head.', 'norm.')
# Switches of the backbone, and names of tensors that are there when they are on or off.
SWITCHES = {
    'conv_stage': ('conv_stages.conv_blocks.', 'conv_stages.blocks.'),
    'conv_downsample': ('.downsample_mlp.downsample.', '.downsample_mlp.reduction.'),
    'depthwise_conv': ('.connect.', None),
}


def extract_backbone(checkpoint: Mapping, prefix: str | None = None) -> dict:
    """Pick the backbone's tensors out of a checkpoint and strip their prefix.

    Args:
        checkpoint (Mapping): A state dict, or a dict that holds one under
            ``'state_dict'`` or ``'model'``, as of the Runner or of timm.
        prefix (str, optional): What the backbone's names begin with. By
            default it is found: none, ``'backbone.'``, either of them behind
            ``'module.'``.

    Returns:
        dict[str, Tensor]: Tensors by their published names. A head stays in
        it when nothing but the name tells it apart, as in the published
        classifiers.

    Raises:
        ValueError: If nothing has the prefix.
    """
    state_dict = tensors_of(checkpoint)
    if prefix is None:
        prefix = _find_prefix(state_dict)
    elif prefix and not prefix.endswith('.'):
        prefix += '.'
    found = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
    if not found:
        raise ValueError(
            f'no tensor in the checkpoint has the prefix {prefix!r}; there are '
            f'{some_of(state_dict) or "no tensors"}'
        )
    return found


def _find_prefix(state_dict: Mapping[str, Tensor]) -> str:
    for prefix in ('', 'module.', 'backbone.', 'module.backbone.'):
        starts = tuple(prefix + name for name in BACKBONE_PREFIXES)
        if any(key.startswith(starts) for key in state_dict):
            return prefix
    return ''


def load_backbone_weights(
    model: nn.Module,
    checkpoint: str | os.PathLike,
    prefix: str | None = None,
    map_location: str | torch.device = 'cpu',
) -> str:
    """Load a checkpoint into a backbone, all of it or nothing.

    Args:
        model (nn.Module): The backbone.
        checkpoint (str | PathLike): See :func:`.read_checkpoint`.
        prefix (str, optional): See :func:`extract_backbone`.
        map_location (str | torch.device): See :func:`.read_checkpoint`.

    Returns:
        str: One line that says how many tensors matched and what was skipped.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a tensor of the backbone is missing, has another shape or
            kind of numbers, or NaN or Inf in it; if the file has tensors that
            belong neither to the backbone nor to a classifier's head.
    """
    content = read_checkpoint(checkpoint, map_location)
    found = extract_backbone(content, prefix)
    loaded, message = _compare(
        model, found, model.state_dict(), checkpoint, _is_expected_extra
    )
    # Not strict only for what the comparison has let through.
    model.load_state_dict(loaded, strict=False)
    return message + say_taken(content)


def fit_checkpoint(
    model: nn.Module,
    checkpoint: Mapping,
    name: str | os.PathLike,
    partial: bool = False,
    skip_heads: bool = True,
    exact: bool = False,
) -> tuple[dict[str, Tensor], str]:
    """Give a checkpoint the names of a model and keep what the model has.

    Args:
        model (nn.Module): A model of mmpretrain, mmdet or mmseg, usually with
            ConvMLP as its ``backbone``.
        checkpoint (Mapping): A published classifier, whose backbone has no
            prefix, or a checkpoint with the model's own names, with
            ``module.`` before them or not; both plain or under
            ``'state_dict'`` or ``'model'``. It is not changed.
        name (str | PathLike): What messages call it.
        partial (bool): Whether tensors outside of the backbone may be missing
            in the file, as when a detector starts from a classifier. Defaults
            to False.
        skip_heads (bool): Whether a head with another number of classes is
            left out, and stays random. Defaults to True.
        exact (bool): Whether nothing may be skipped, as when a run is resumed.
            Defaults to False.

    Returns:
        tuple[dict, str]: The tensors that fit, and one line that says how
        many they are and what was skipped.

    Raises:
        ValueError: If a tensor of the backbone is missing, has another shape or
            kind of numbers, or NaN or Inf in it, or the file has one that the
            backbone does not know; the message names them and the architecture
            that the file seems to have. Without ``partial`` also if other
            tensors are missing.
    """
    expected = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    if f'{BACKBONE}tokenizer.block.0.weight' in expected:
        found = name_as_model(checkpoint)
    else:
        # Another backbone, whose names may begin as the published ones do.
        found = without_module(checkpoint)

    heads = [
        key
        for key in found.keys() & expected.keys()
        if skip_heads
        and not exact
        and 'head' in key
        and not key.startswith(BACKBONE)
        and _is_plain(found[key])
        and found[key].shape != expected[key].shape
        and found[key].shape[1:] == expected[key].shape[1:]
    ]
    heads.sort(key=list(expected).index)
    absent = [
        key
        for key in expected
        if partial and key not in found and not key.startswith(BACKBONE)
    ]
    built = [key.removeprefix(BACKBONE) for key in expected if key.startswith(BACKBONE)]

    def may_be_skipped(key: str, _: Iterable[str]) -> bool:
        name = key.removeprefix(BACKBONE)
        return not exact and (name == key or _is_expected_extra(name, built))

    left_out = {*heads, *absent}
    loaded, message = _compare(
        model,
        {key: value for key, value in found.items() if key not in left_out},
        {key: value for key, value in expected.items() if key not in left_out},
        name,
        may_be_skipped,
    )
    if heads:
        message += f', skipped for another number of classes {some_of(heads)}'
    if absent:
        message += f', not in the file {some_of(absent)}'
    return loaded, message + say_taken(checkpoint)


def _is_plain(value: Tensor) -> bool:
    """Whether a tensor has its numbers one after the other."""
    special = value.is_quantized or value.is_nested or value.is_meta
    return value.layout is torch.strided and not special


def _kind(dtype: torch.dtype) -> str:
    if dtype is torch.bool or dtype.is_complex:
        return str(dtype)
    return 'floating point' if dtype.is_floating_point else 'integer'


def find_not_finite(content: object, name: str = '') -> Iterator[str]:
    """Find tensors with NaN or Inf in them, in nested dicts and lists.

    Args:
        content (object): A tensor, a state dict or the like.
        name (str): What it is called.

    Yields:
        str: Dotted names. A matrix of zeros and -Inf, which is the mask of an
        attention, is none of them.
    """
    if isinstance(content, Mapping):
        content = content.items()
    elif isinstance(content, (list, tuple)):
        content = enumerate(content)
    elif isinstance(content, Tensor) and content.is_floating_point():
        value, storage = content.detach(), content.untyped_storage()
        if value.nbytes > storage.nbytes():
            # An expanded tensor could be of any size.
            value = value.new_empty(0).set_(storage)
        # torch.isfinite knows no numbers of 8 bits.
        value = value if value.itemsize > 1 else value.float()
        if not value.isfinite().all():
            zero = value == 0
            mask = value.ndim > 1 and zero.any() and (zero | value.isneginf()).all()
            if not mask:
                yield name
        return
    else:
        return
    for key, value in content:
        yield from find_not_finite(value, f'{name}.{key}' if name else str(key))


def _find_flaws(
    found: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]
) -> list[tuple[str, list[str]]]:
    """Find tensors that cannot be weights, whatever their names and shapes are.

    Args:
        found (Mapping): Tensors by name.
        dtypes (Mapping): What they are to become, as far as that is known.

    Returns:
        list[tuple]: What is wrong, and the names of which this holds.
    """
    plain = {key: value for key, value in found.items() if _is_plain(value)}
    kinds = [
        f'{key} ({value.dtype} in the file, {dtypes[key]} here)'
        for key, value in plain.items()
        if key in dtypes and _kind(value.dtype) != _kind(dtypes[key])
    ]
    # Too large a number becomes Inf where there is less room for it.
    narrow = {
        key: value.to(dtypes[key])
        for key, value in plain.items()
        if key in dtypes
        and value.is_floating_point()
        and value.itemsize > dtypes[key].itemsize
    }
    return [
        ('sparse, quantised or without data', [k for k in found if k not in plain]),
        ('of another kind of numbers', kinds),
        ('with NaN or Inf', list(find_not_finite({**plain, **narrow}))),
    ]


def check_tensors(found: Mapping[str, Tensor], name: str | os.PathLike) -> None:
    """Check tensors that no model is there to be compared with.

    Args:
        found (Mapping): Tensors by the names that they have in the toolkits.
        name (str | PathLike): What messages call the file.

    Raises:
        ValueError: If one of them is sparse, quantised or without data, has NaN or Inf
            in it, or is of a backbone and has another kind of numbers.
    """
    tops = tuple(BACKBONE + top for top in BACKBONE_PREFIXES)
    counter = 'num_batches_tracked'
    dtypes = {
        key: torch.int64 if key.endswith(counter) else torch.float64
        for key in found
        if key.startswith(tops)
    }
    problems = _list_problems(_find_flaws(found, dtypes))
    if problems:
        raise CheckpointError(
            f'checkpoint {os.fspath(name)!r} cannot be used: {problems}'
        )


def _list_problems(problems: Iterable[tuple[str, list[str]]]) -> str:
    found = [
        f'{len(names)} {what}: {some_of(names)}' for what, names in problems if names
    ]
    return '; '.join(found)


def describe_arch(found: Mapping[str, Tensor]) -> dict | None:
    """Read the architecture off the backbone's tensors.

    Args:
        found (Mapping[str, Tensor]): By their published names, no prefix.

    Returns:
        dict, optional: As the values of ``ConvMLP.arch_settings``; None if
        the tensors are not those of a ConvMLP with its conv stage.
    """

    def count(pattern: str) -> int:
        return len({m.group() for key in found if (m := re.match(pattern, key))})

    stages = range(count(r'stages\.\d+\.'))
    try:
        norms = [found[f'stages.{i}.blocks.0.norm1.weight'] for i in stages]
        layers = [found[f'stages.{i}.blocks.0.channel_mlp1.fc1.weight'] for i in stages]
        return dict(
            tokenizer_channels=len(found['tokenizer.block.6.weight']),
            conv_blocks=count(r'conv_stages\.conv_blocks\.\d+\.'),
            channels=tuple(len(norm) for norm in norms),
            depths=tuple(count(rf'stages\.{i}\.blocks\.\d+\.') for i in stages),
            mlp_ratios=tuple(len(layer) / layer.shape[1] for layer in layers),
        )
    except (IndexError, KeyError, TypeError):
        return None


def _read_switches(names: Iterable[str]) -> dict[str, bool]:
    """Read off the names of a backbone's tensors which of its parts are there."""
    names = list(names)
    has = {
        key: [any(part and part in name for name in names) for part in parts]
        for key, parts in SWITCHES.items()
    }
    # Without depth-wise convolutions, there are blocks all the same.
    has['depthwise_conv'][1] = not has['depthwise_conv'][0]
    return {key: on for key, (on, off) in has.items() if on != off}


def _explain_arch(model: nn.Module, found: Mapping[str, Tensor]) -> str:
    """Name both architectures and settings, if they are not the same."""
    backbone = getattr(model, 'backbone', model)
    if backbone is not model:
        found = {
            k.removeprefix(BACKBONE): v
            for k, v in found.items()
            if k.startswith(BACKBONE)
        }
    there, here = describe_arch(found), getattr(backbone, 'arch', None)
    if there is None or here is None:
        return ''
    built = _read_switches(backbone.state_dict())
    switches = {
        key: value
        for key, value in _read_switches(found).items()
        if built.get(key, value) != value
    }
    if 'conv_stage' in switches:
        # The tensors do not tell how many blocks the other has.
        there['conv_blocks'] = here['conv_blocks']
    pairs = [
        (f'{key}={value}', f'{key}={not value}') for key, value in switches.items()
    ]
    if there != here:
        pairs.insert(0, (_name_arch(backbone, there), _name_arch(backbone, here)))
    if not pairs:
        return ''
    of_file, configured = (', '.join(texts) for texts in zip(*pairs))
    return f'. The file is {of_file}; the configuration says {configured}'


def _name_arch(backbone: nn.Module, arch: Mapping) -> str:
    names = (k for k, v in backbone.arch_settings.items() if v == arch)
    name = next(names, None)
    return f'ConvMLP-{name.upper()}' if name else f'a custom ConvMLP ({arch})'


def _compare(
    model: nn.Module,
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    name: str | os.PathLike,
    may_be_skipped: Callable[[str, Iterable[str]], bool],
) -> tuple[dict[str, Tensor], str]:
    """Pick ``expected`` from ``found``, if all is there and nothing unknown."""
    # Files written before torch 0.4.1 lack the counters; nothing reads them.
    missing = [
        key
        for key in expected
        if key not in found and not key.endswith('num_batches_tracked')
    ]
    both = {key: found[key] for key in expected if key in found}
    dtypes = {key: expected[key].dtype for key in both}
    misshapen = [
        f'{key} ({tuple(value.shape)} in the file, {tuple(expected[key].shape)} here)'
        for key, value in both.items()
        if _is_plain(value) and value.shape != expected[key].shape
    ]
    extra = [key for key in found if key not in expected]
    skipped = [key for key in extra if may_be_skipped(key, expected)]
    unknown = [key for key in extra if key not in skipped]
    problems = _list_problems(
        [
            ('missing', missing),
            ('of another shape', misshapen),
            ('unknown', unknown),
            *(_find_flaws(both, dtypes) if not misshapen else ()),
        ]
    )
    if problems:
        raise CheckpointError(
            f'checkpoint {os.fspath(name)!r} does not fit this '
            f'{type(model).__name__}; of its {len(expected)} tensors and the '
            f'{len(found)} in the file, {problems}{_explain_arch(model, found)}'
        )
    message = (
        f'{type(model).__name__}: loaded {len(both)} of '
        f'{len(model.state_dict())} tensors from {os.fspath(name)}'
    )
    converted = {str(v.dtype) for k, v in both.items() if v.dtype != dtypes[k]}
    if converted:
        message += f', converted from {some_of(sorted(converted))}'
    return both, message + (f', skipped {some_of(skipped)}' if skipped else '')


def _is_expected_extra(key: str, expected: Iterable[str]) -> bool:
    """Whether a name is of a head, or of a stage that this model has not built."""
    if key.startswith(HEAD_PREFIXES):
        return True
    parts = key.split('.')
    stage = '.'.join(parts[: 2 if parts[0] == 'stages' else 1]) + '.'
    return key.startswith(BACKBONE_PREFIXES) and not any(
        name.startswith(stage) for name in expected
    )
