"""Read checkpoints safely, name what is inside, match it with a model, convert it.

The toolkits fall back to unpickling anything. Here a file is plain tensors and the
Runner's own records, or it is refused; a download is checked before it enters the
cache. mmengine loads weights as far as names and shapes match and warns about the
rest. Here a file has every tensor of the backbone, with numbers of the right kind, or
nothing is loaded and the error says what is wrong.

This module knows names, shapes and values only: no model zoo, no configuration and
nothing of the backbone's code.
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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
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
    'Match',
    'check_content',
    'check_output',
    'check_tensors',
    'describe_arch',
    'dump_checkpoint',
    'explain',
    'find_not_finite',
    'fit_checkpoint',
    'hash_file',
    'load_backbone_weights',
    'locate_checkpoint',
    'match',
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

# The authors' server, and the variable that names a folder with their files.
ROOT = 'https://shi-labs.com/projects/convmlp/checkpoints/'
MIRROR = 'CONVMLP_WEIGHTS'
# Seconds that a server may take to answer, and between two parts of a file.
TIMEOUT = 60
# The first digits stand in the names of published files (torch hub, OpenMMLab), where a
# date may stand as well.
HASH_IN_NAME = re.compile(r'-(?!20\d{6}\.)([0-9a-f]{8,64})\.\w+$')
# What mkstemp makes of the prefix and suffix in write_file.
LEFTOVER = re.compile(r'\..+\.[a-z0-9_]{8}\.tmp')

# How the toolkits call a backbone, and the tops of this one's published names.
BACKBONE = 'backbone.'
BACKBONE_PREFIXES = ('tokenizer.', 'conv_stages.', 'stages.')
# What a published classifier holds beyond the feature extractor, and how mmpretrain
# calls its head.
HEAD_PREFIXES = ('head.', 'norm.')
CLASSIFIER_HEAD = 'head.fc.'
# What the toolkits keep of a data set; in capitals in their former versions.
DATASET_META = ('classes', 'palette')
# Switches of the backbone, and names of tensors that are there when they are on or off.
SWITCHES = {
    'conv_stage': ('conv_stages.conv_blocks.', 'conv_stages.blocks.'),
    'conv_downsample': ('.downsample_mlp.downsample.', '.downsample_mlp.reduction.'),
    'depthwise_conv': ('.connect.', None),
}
# mmengine and torch before 0.4.1 may lack them, and nothing reads them.
COUNTER = 'num_batches_tracked'
MAX_NAMES = 6


class CheckpointError(ValueError):
    """A file that cannot be used as the checkpoint that it is to be."""


def some_of(names: Iterable[str]) -> str:
    """Write a list of names that stays readable: the first, and how many more."""
    names = list(names)
    more = len(names) - MAX_NAMES
    shown = ', '.join(names[:MAX_NAMES])
    return f'{shown} and {more} more' if more > 0 else shown


# Files that nobody ever finds half written.


def check_output(path: str | os.PathLike, overwrite: bool = False) -> None:
    """Check that a file can be written, before the work for it is done.

    Args:
        path: The file.
        overwrite: Whether it may be there already.

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
        path: The file.
        content: What it will hold; text becomes UTF-8.
        overwrite: Whether to replace a file that is there.

    Raises:
        OSError: See :func:`check_output`; and if the disk is full. A file that was
            there before is then as it was.
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
    # The new name survives a loss of power where a file system lets us ask for that.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder or '.', os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(folder: str | os.PathLike) -> list[str]:
    """Remove what :func:`write_file` had not finished when its process was killed.

    Args:
        folder: Nobody must be writing into it.

    Returns:
        The names of the files.

    Raises:
        OSError: If the folder cannot be read or written.
    """
    names = sorted(name for name in os.listdir(folder) if LEFTOVER.fullmatch(name))
    for name in names:
        os.unlink(osp.join(folder, name))
    return names


def hash_file(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file, as 64 hexadecimal digits."""
    sha256 = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(2**20):
            sha256.update(chunk)
    return sha256.hexdigest()


# Reading: a checkpoint is data, and nothing that it names is run.

# Kinds of numbers, as numpy writes them.
NUMBERS = ['b1', 'i1', 'u1', 'i2', 'u2', 'i4', 'u4', 'i8', 'u8', 'f2', 'f4', 'f8']
# Written in C: a pickle can set no attribute of them.
FIXED = {
    'builtins.slice': slice,
    'collections.OrderedDict': OrderedDict,
    'numpy.ndarray': np.ndarray,
    'torch.Size': torch.Size,
}


def _dtype(kind: str, *_) -> np.dtype:
    """Stand in for ``numpy.dtype``, of which other kinds can hold memory addresses.

    numpy's own instances, unlike copies, ignore the state that a pickle gives them.
    """
    if kind not in NUMBERS:
        raise pickle.UnpicklingError(f'numpy.dtype of {kind!r}')
    return np.dtype(kind)


def _allowed_globals() -> dict[str, object]:
    """List what tensors and the Runner's own records are made by, by its name."""
    allowed = {
        **FIXED,
        # The statistics of a HistoryBuffer, which are not taken from the file.
        'builtins.getattr': lambda owner, name: None,
        f'{HistoryBuffer.__module__}.HistoryBuffer': HistoryBuffer,
        # Milestones of a MultiStepLR.
        'collections.Counter': Counter,
        '_codecs.encode': codecs.encode,
        'numpy.dtype': _dtype,
    }
    # The functions that numpy and torch name when they are pickled.
    for value in (np.empty(0), np.float64(0)):
        function = value.__reduce__()[0]
        for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
            allowed[f'{module}.{function.__name__}'] = function
    for value in (torch.empty(0), nn.Parameter(torch.empty(0))):
        function = value.__reduce_ex__(2)[0]
        allowed[f'{function.__module__}.{function.__name__}'] = function
    for kind in (type(np.dtype(number)) for number in NUMBERS):
        allowed[f'{kind.__module__}.{kind.__name__}'] = kind
    return allowed


class _Skipped:
    """Stands for an object that is left out, whatever a pickle does to it."""

    def __init__(self, *args, **kwargs) -> None: ...

    __setstate__ = __setitem__ = append = extend = add = __init__


class _Unpickler(pickle.Unpickler):
    """Does what ``weights_only=True`` does, for torch before 2.5, whose list is closed.

    It can also leave out what is not allowed, which torch's own cannot.
    """

    # Bytes of each entry of the archive; names of what was left out, if it may be.
    sizes: Mapping[str, int] = {}
    skipped: list[str] | None = None

    def find_class(self, module: str, name: str) -> object:
        # torch.save writes the names of Python 2.
        key = f'{module.replace("__builtin__", "builtins")}.{name}'
        allowed = _allowed_globals()
        if key in FIXED:
            return FIXED[key]
        if key not in allowed:
            if self.skipped is None:
                raise pickle.UnpicklingError(f'WeightsUnpickler error: {key}')
            self.skipped.append(key)
            return type(name, (_Skipped,), {})
        # A pickle can set attributes of what it gets, so it gets a copy.
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
        itemsize = getattr(key[1], 'dtype', torch.uint8).itemsize
        if self.sizes and size != key[4] * itemsize:
            raise pickle.UnpicklingError(f'storage {key[2]} has {size} bytes')
        return load(key)


def _check_archive(file: BinaryIO) -> dict[str, int]:
    """Refuse an archive that torch would run, that would grow, or that is ambiguous.

    Returns:
        Bytes by the name of the entry; none of the format before torch 1.6. The file
        is left at its beginning, where it was.
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
        # timm and Hugging Face write such files; timm brings the reader.
        from safetensors.torch import load

        loaded = load(file.read())
        return {key: value.to(map_location) for key, value in loaded.items()}
    sizes = _check_archive(file)
    if not sizes:
        # A file of the disk would also be tried as a tar archive, and unpacked.
        file = io.BytesIO(file.read())
    if skipped is None and hasattr(torch.serialization, 'safe_globals'):
        allowed = [(value, key) for key, value in _allowed_globals().items()]
        with torch.serialization.safe_globals(allowed):
            return torch.load(file, map_location=map_location, weights_only=True)
    module = types.ModuleType('restricted_pickle')
    members = dict(sizes=sizes, skipped=skipped)
    module.Unpickler = type('Unpickler', (_Unpickler,), members)
    module.load = lambda file, **kwargs: module.Unpickler(file, **kwargs).load()
    return torch.load(
        file, map_location=map_location, pickle_module=module, weights_only=False
    )


def _say_why(error: Exception) -> str:
    """Name the object in question, which torch puts into the middle of much advice."""
    _, forbidden, text = str(error).rpartition('WeightsUnpickler error:')
    lines = [line.strip() for line in text.splitlines()]
    # The advice is to load the object all the same.
    lines = [line for line in lines if line and 'weights_only' not in line]
    reason = lines[0] if lines else type(error).__name__
    reason = reason.removeprefix('Unsupported global: GLOBAL ')
    reason = re.split(r' was not an allowed|[.,]? Please', reason)[0]
    if forbidden:
        reason += '; tools/convert_weights.py takes the tensors alone'
    return reason


def _open(
    source: str | BinaryIO,
    name: str,
    map_location: str | torch.device,
    skipped: list[str] | None = None,
) -> dict:
    """Read a file, and say of what is wrong with it what a user can use."""
    # All logs share this dict, and one that is unpickled brings entries for it.
    shared = HistoryBuffer().__getstate__()['statistics_methods']
    statistics = dict(shared)
    file_name = source if isinstance(source, str) else name
    with open(source, 'rb') if isinstance(source, str) else source as file:
        try:
            checkpoint = _load_safely(file, file_name, map_location, skipped)
        except ImportError:
            raise
        # Unpickling damaged bytes can raise any exception.
        except Exception as error:
            raise CheckpointError(
                f'checkpoint {name!r} is not a file of plain weights, is cut short, '
                f'or holds objects that are not allowed: {_say_why(error)}'
            ) from error
        finally:
            shared.clear()
            shared.update(statistics)
    check_content(checkpoint, name)
    return checkpoint


def check_content(checkpoint: object, name: str) -> None:
    """Check that the parts of a checkpoint are dicts with names, as all code expects.

    Args:
        checkpoint: What a file holds.
        name: What messages call it.

    Raises:
        CheckpointError: If they are not.
    """
    parts = {'': checkpoint}
    if isinstance(checkpoint, Mapping):
        for key in ('state_dict', 'ema_state_dict', 'meta', 'message_hub', 'model'):
            part = checkpoint.get(key)
            # timm keeps the name of the model as model.
            if part is not None and (key != 'model' or isinstance(part, Mapping)):
                parts[f' as {key}'] = part
        meta = checkpoint.get('meta')
        if isinstance(meta, Mapping) and meta.get('dataset_meta') is not None:
            parts[' as meta.dataset_meta'] = meta['dataset_meta']
    for where, part in parts.items():
        wanted = f'checkpoint {name!r} must hold a dict'
        if not isinstance(part, Mapping):
            kind = type(part).__name__
            raise CheckpointError(f'{wanted}{where}, but holds a {kind}')
        for key in part:
            if not isinstance(key, str):
                raise CheckpointError(
                    f'{wanted} with names{where}, but one of its keys is {key!r}'
                )


def _check_hash(path: str, url: str) -> None:
    """Compare a file with the SHA-256 in its URL, if there is one."""
    found = HASH_IN_NAME.search(urlparse(url).path)
    if found and not (digest := hash_file(path)).startswith(found[1]):
        raise ValueError(
            f'{path!r}, which is to be {url}, has the SHA-256 {digest}, but '
            f'{found[1]} is expected: it is damaged or another file'
        )


def _download(url: str) -> str:
    """Return the path of ``url`` in torch hub's cache, fetching it once.

    Names begin with the hash of the URL: many servers have a ``model.pth``. With a
    mirror, it is the path in that of what comes after ``ROOT``.
    """
    mirror = os.environ.get(MIRROR)
    if mirror and url.startswith(ROOT):
        path = osp.join(mirror, url.removeprefix(ROOT))
        if not osp.isfile(path):
            raise FileNotFoundError(
                f'checkpoint {path!r} does not exist ({MIRROR} is set, which stands '
                f'in for {ROOT})'
            )
    else:
        name = osp.basename(urlparse(url).path)
        if not name:
            raise ValueError(f'{url} names a folder, not the file of a checkpoint')
        name = f'{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}'
        path = osp.join(torch.hub.get_dir(), 'checkpoints', name)
        if not osp.exists(path):
            _fetch(url, path)
    _check_hash(path, url)
    return path


def _fetch(url: str, path: str) -> None:
    """Put a file into the cache if it is whole, safe and the right one."""
    folder, name = osp.split(path)
    os.makedirs(folder, exist_ok=True)
    # With the ending of the name, by which the file is read.
    temporary = osp.join(folder, f'{uuid.uuid4().hex}.{name}')
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
            way = f'; {MIRROR} can name a folder that has it' * url.startswith(ROOT)
            raise OSError(f'cannot fetch {url}: {error}{way}') from error
        _check_hash(temporary, url)
        # A connection that breaks off early is no error for urllib.
        _open(temporary, url, 'cpu')
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def locate_checkpoint(filename: str | os.PathLike) -> str:
    """Find a checkpoint on this machine, fetching it if it has to be.

    Args:
        filename: See :func:`read_checkpoint`.

    Returns:
        A path, or the URL itself if it is not of http(s).

    Raises:
        OSError: See :func:`read_checkpoint`.
        ValueError: If the file of a URL is not what it should be.
    """
    filename = osp.expanduser(os.fspath(filename))
    if filename.startswith(('http://', 'https://')):
        # One process of the job fetches; the others find it, unless they are on a
        # machine with another disk.
        try:
            if is_main_process():
                _download(filename)
        finally:
            # Nobody may wait for a process that has failed.
            barrier()
        return _download(filename)
    if '://' not in filename and not osp.isfile(filename):
        raise FileNotFoundError(f'checkpoint {filename!r} does not exist')
    return filename


def read_checkpoint(
    filename: str | os.PathLike,
    map_location: str | torch.device = 'cpu',
    skipped: list[str] | None = None,
) -> dict:
    """Read a checkpoint without running code that it may carry.

    Args:
        filename: A path, an http(s) URL, which goes to the cache of torch hub, or any
            other URL that mmengine has a file backend for. The folder that the
            environment variable ``CONVMLP_WEIGHTS`` names stands in for the authors'
            server.
        map_location: Where the tensors go.
        skipped: Objects other than tensors and the Runner's own records are left out,
            and their classes added to this list. Without it they are an error.

    Returns:
        What the file holds.

    Raises:
        OSError: If there is no such file, or a URL cannot be fetched.
        CheckpointError: If the file is not a checkpoint, is cut short, or holds
            objects other than tensors and the Runner's own records.
        ValueError: If the file of a URL has not the SHA-256 that the end of its name
            says (``-`` and eight digits or more). What is refused does not enter the
            cache.
    """
    filename = osp.expanduser(os.fspath(filename))
    source = locate_checkpoint(filename)
    if '://' in source:
        source = io.BytesIO(fileio.get(filename))
    return _open(source, filename, map_location, skipped)


def dump_checkpoint(checkpoint: Mapping) -> bytes:
    """Make the content of a file that ``torch.load`` reads as weights only.

    Args:
        checkpoint: Tensors by name, or a dict with ``state_dict`` and ``meta``.

    Raises:
        ValueError: If it holds more than tensors, text and numbers.
    """

    def whole(value: object) -> object:
        # A tensor may be a part of a larger one, all of which would be saved, and an
        # expanded one much larger than what is saved of it.
        if isinstance(value, Tensor):
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


# Names: where a checkpoint keeps its tensors, and what the toolkits call them.


def tensors_of(checkpoint: Mapping) -> dict[str, Tensor]:
    """Pick the tensors under ``state_dict`` or ``model``, or of a state dict itself."""
    return _tensors(checkpoint.get(_taken(checkpoint), checkpoint))


def _tensors(content: object) -> dict[str, Tensor]:
    items = content.items() if isinstance(content, Mapping) else ()
    return {key: value for key, value in items if isinstance(value, Tensor)}


def _taken(checkpoint: Mapping) -> str | None:
    """Return the key that the tensors are under."""
    keys = ('state_dict', 'model')
    return next((k for k in keys if isinstance(checkpoint.get(k), Mapping)), None)


def say_taken(checkpoint: Mapping) -> str:
    """Say, to end a message, which of several sets of tensors :func:`tensors_of` takes.

    It is empty if there is one set.
    """
    taken = _taken(checkpoint)
    others = [k for k, v in checkpoint.items() if k != taken and _tensors(v)]
    return f', taken from {taken!r}, not from {some_of(others)}' if others else ''


def without_module(checkpoint: Mapping) -> dict[str, Tensor]:
    """Pick the tensors of a checkpoint, without ``module.``, the prefix of DDP.

    Raises:
        ValueError: If a tensor stands there with the prefix and without.
    """
    state_dict = tensors_of(checkpoint)
    found = {key.removeprefix('module.'): value for key, value in state_dict.items()}
    if len(found) < len(state_dict):
        raise ValueError('tensors stand twice in the checkpoint, with "module." before')
    return found


def name_as_model(checkpoint: Mapping) -> dict[str, Tensor]:
    """Give the tensors of a checkpoint the names they have in the toolkits.

    Args:
        checkpoint: See :func:`fit_checkpoint`.

    Returns:
        Tensors without ``module.``, those of the backbone with the prefix
        ``backbone.``, and a published classifier's head as mmpretrain names it.
    """
    found = without_module(checkpoint)
    if not any(key.startswith(BACKBONE_PREFIXES) for key in found):
        return found
    return {
        re.sub('^head[.]', CLASSIFIER_HEAD, key)
        if key.startswith('head.')
        else BACKBONE + key: value
        for key, value in found.items()
    }


def _extract_backbone(checkpoint: Mapping, prefix: str | None) -> dict[str, Tensor]:
    """Pick the backbone's tensors out of a checkpoint, by their published names.

    A head stays in it when nothing but the name tells it apart, as in the published
    classifiers. By default the prefix is found.
    """
    state_dict = tensors_of(checkpoint)
    if prefix is None:
        prefix = ''
        for known in ('module.backbone.', BACKBONE, 'module.', ''):
            tops = tuple(known + top for top in BACKBONE_PREFIXES)
            if any(key.startswith(tops) for key in state_dict):
                prefix = known
    elif prefix and not prefix.endswith('.'):
        prefix += '.'
    found = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
    if not found:
        raise ValueError(
            f'no tensor in the checkpoint has the prefix {prefix!r}; there are '
            f'{some_of(state_dict) or "no tensors"}'
        )
    return found


# Values: what cannot be weights, whatever its name and shape are.


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
        content: A tensor, a state dict or the like.
        name: What it is called.

    Yields:
        Dotted names. A matrix of zeros and -Inf, which is the mask of an attention,
        is none of them.
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
) -> dict[str, list[str]]:
    """Name the tensors that are no weights, by what is wrong with them.

    ``dtypes`` says what tensors are to become, as far as that is known.
    """
    plain = {key: value for key, value in found.items() if _is_plain(value)}
    known = {key: value for key, value in plain.items() if key in dtypes}
    # Too large a number becomes Inf where there is less room for it.
    narrow = {
        key: value.to(dtypes[key])
        for key, value in known.items()
        if value.is_floating_point() and value.itemsize > dtypes[key].itemsize
    }
    return {
        'sparse, quantised or without data': [k for k in found if k not in plain],
        'of another kind of numbers': [
            f'{key} ({value.dtype} in the file, {dtypes[key]} here)'
            for key, value in known.items()
            if _kind(value.dtype) != _kind(dtypes[key])
        ],
        'with NaN or Inf': list(find_not_finite({**plain, **narrow})),
    }


def _list_problems(problems: Mapping[str, Collection[str]]) -> str:
    return '; '.join(
        f'{len(names)} {what}: {some_of(names)}'
        for what, names in problems.items()
        if names
    )


def check_tensors(found: Mapping[str, Tensor], name: str | os.PathLike) -> None:
    """Check tensors that no model is there to be compared with.

    Args:
        found: Tensors by the names that they have in the toolkits.
        name: What messages call the file.

    Raises:
        CheckpointError: If one of them is sparse, quantised or without data, has NaN
            or Inf in it, or is of a backbone and has another kind of numbers.
    """
    tops = tuple(BACKBONE + top for top in BACKBONE_PREFIXES)
    dtypes = {
        key: torch.int64 if key.endswith(COUNTER) else torch.float64
        for key in found
        if key.startswith(tops)
    }
    if problems := _list_problems(_find_flaws(found, dtypes)):
        raise CheckpointError(
            f'checkpoint {os.fspath(name)!r} cannot be used: {problems}'
        )


# Matching: which tensors of a file are those of a model.


@dataclass
class Match:
    """How the tensors of a file and those of a model go together.

    Attributes:
        loaded: Tensors of the file that the model has, with the same shape.
        missing: Names that only the model has, without the counters of BN.
        misshapen: Names of both, whose shapes differ, and what the shapes are.
        unknown: Names that only the file has.
        skipped: Names that a caller has let through, by the reason.
    """

    loaded: dict[str, Tensor]
    missing: list[str]
    misshapen: dict[str, str]
    unknown: list[str]
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, reason: str, names: Collection[str]) -> None:
        """Take names out of what is wrong, for a reason that the message will give."""
        names = list(names)
        self.skipped[reason] = names
        self.missing = [key for key in self.missing if key not in names]
        self.unknown = [key for key in self.unknown if key not in names]
        self.misshapen = {k: v for k, v in self.misshapen.items() if k not in names}


def match(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Match:
    """Compare the names and shapes of a file's tensors with those of a model."""
    misshapen = {
        key: f'{key} ({tuple(found[key].shape)} in the file, {tuple(value.shape)} here)'
        for key, value in expected.items()
        if key in found and _is_plain(found[key]) and found[key].shape != value.shape
    }
    return Match(
        loaded={k: found[k] for k in expected if k in found and k not in misshapen},
        missing=[k for k in expected if k not in found and not k.endswith(COUNTER)],
        misshapen=misshapen,
        unknown=[key for key in found if key not in expected],
    )


def explain(
    result: Match, found: Mapping[str, Tensor], model: nn.Module, name: str
) -> str:
    """Say in one line how many tensors fit and what was skipped.

    Args:
        result: What the caller has let through is in ``skipped``.
        found: The tensors of the file.
        model: The model.
        name: What messages call the file.

    Raises:
        CheckpointError: If anything else differs, or a tensor is no weight; with the
            architectures of both, if these can be read off the file.
    """
    expected, kind = model.state_dict(), type(model).__name__
    dtypes = {key: expected[key].dtype for key in result.loaded}
    problems = _list_problems(
        {
            'missing': result.missing,
            'of another shape': result.misshapen.values(),
            'unknown': result.unknown,
            **_find_flaws(result.loaded, dtypes),
        }
    )
    if problems:
        raise CheckpointError(
            f'checkpoint {name!r} does not fit this {kind}; of its {len(expected)} '
            f'tensors and the {len(found)} in the file, {problems}'
            f'{_explain_arch(model, found)}'
        )
    message = f'{kind}: loaded {len(dtypes)} of {len(expected)} tensors from {name}'
    converted = {v.dtype for k, v in result.loaded.items() if v.dtype != dtypes[k]}
    parts = {'converted from': sorted(map(str, converted)), **result.skipped}
    return message + ''.join(
        f', {reason} {some_of(names)}' for reason, names in parts.items() if names
    )


def load_backbone_weights(
    model: nn.Module,
    checkpoint: str | os.PathLike,
    prefix: str | None = None,
    map_location: str | torch.device = 'cpu',
) -> str:
    """Load a checkpoint into a backbone, all of it or nothing.

    Args:
        model: The backbone.
        checkpoint: See :func:`read_checkpoint`.
        prefix: What the backbone's names begin with. By default it is found: none,
            ``'backbone.'``, either of them behind ``'module.'``.
        map_location: See :func:`read_checkpoint`.

    Returns:
        One line that says how many tensors matched and what was skipped.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a tensor of the backbone is missing, has another shape or kind
            of numbers, or NaN or Inf in it; if the file has tensors that belong
            neither to the backbone nor to a classifier's head.
    """
    content = read_checkpoint(checkpoint, map_location)
    found = _extract_backbone(content, prefix)
    built = model.state_dict()
    result = match(found, built)
    result.skip('skipped', [k for k in result.unknown if _is_expected_extra(k, built)])
    message = explain(result, found, model, os.fspath(checkpoint))
    # Not strict only for what has been let through.
    model.load_state_dict(result.loaded, strict=False)
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
        model: A model of mmpretrain, mmdet or mmseg, usually with ConvMLP as its
            ``backbone``.
        checkpoint: A published classifier, whose backbone has no prefix, or a
            checkpoint with the model's own names, with ``module.`` before them or
            not; both plain or under ``'state_dict'`` or ``'model'``. It is not
            changed.
        name: What messages call it.
        partial: Whether tensors outside of the backbone may be missing in the file,
            as when a detector starts from a classifier.
        skip_heads: Whether a head with another number of classes is left out, and
            stays random.
        exact: Whether nothing may be skipped, as when a run is resumed.

    Returns:
        The tensors that fit, and one line that says how many they are and what was
        skipped.

    Raises:
        ValueError: If a tensor of the backbone is missing, has another shape or kind
            of numbers, or NaN or Inf in it, or the file has one that the backbone
            does not know; the message names them and the architecture that the file
            seems to have. Without ``partial`` also if other tensors are missing.
    """
    expected = _tensors(model.state_dict())
    is_convmlp = f'{BACKBONE}tokenizer.block.0.weight' in expected
    # The names of another backbone may begin as the published ones do.
    found = name_as_model(checkpoint) if is_convmlp else without_module(checkpoint)
    result = match(found, expected)
    if not exact:
        built = [k.removeprefix(BACKBONE) for k in expected if k.startswith(BACKBONE)]
        extra = [
            key
            for key in result.unknown
            if not key.startswith(BACKBONE)
            or _is_expected_extra(key.removeprefix(BACKBONE), built)
        ]
        result.skip('skipped', extra)
    if skip_heads and not exact:
        heads = [
            key
            for key in result.misshapen
            if 'head' in key
            and not key.startswith(BACKBONE)
            and found[key].shape[1:] == expected[key].shape[1:]
        ]
        result.skip('skipped for another number of classes', heads)
    if partial:
        absent = [key for key in result.missing if not key.startswith(BACKBONE)]
        result.skip('not in the file', absent)
    message = explain(result, found, model, os.fspath(name))
    return result.loaded, message + say_taken(checkpoint)


def _is_expected_extra(key: str, built: Iterable[str]) -> bool:
    """Whether a name is of a head, or of a stage that this backbone has not built."""
    if key.startswith(HEAD_PREFIXES):
        return True
    parts = key.split('.')
    stage = '.'.join(parts[: 2 if parts[0] == 'stages' else 1]) + '.'
    is_built = any(name.startswith(stage) for name in built)
    return key.startswith(BACKBONE_PREFIXES) and not is_built


def describe_arch(found: Mapping[str, Tensor]) -> dict | None:
    """Read the architecture off the backbone's tensors.

    Args:
        found: Tensors by their published names, without prefix.

    Returns:
        A dict as the values of ``ConvMLP.arch_settings``; None if the tensors are not
        those of a ConvMLP with its conv stage.
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


def _read_switches(names: Collection[str]) -> dict[str, bool]:
    """Read off the names of a backbone's tensors which of its parts are there."""
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
        mine = [key for key in found if key.startswith(BACKBONE)]
        found = {key.removeprefix(BACKBONE): found[key] for key in mine}
    there, here = describe_arch(found), getattr(backbone, 'arch', None)
    if there is None or here is None:
        return ''
    built, switches = _read_switches(backbone.state_dict()), _read_switches(found)
    switches = {k: on for k, on in switches.items() if built.get(k, on) != on}
    if 'conv_stage' in switches:
        # The tensors do not tell how many blocks the other has.
        there['conv_blocks'] = here['conv_blocks']
    of_file = [f'{key}={on}' for key, on in switches.items()]
    configured = [f'{key}={not on}' for key, on in switches.items()]
    if there != here:
        of_file.insert(0, _name_arch(backbone, there))
        configured.insert(0, _name_arch(backbone, here))
    if not of_file:
        return ''
    return (
        f'. The file is {", ".join(of_file)}; the configuration says '
        f'{", ".join(configured)}'
    )


def _name_arch(backbone: nn.Module, arch: Mapping) -> str:
    names = (k for k, v in backbone.arch_settings.items() if v == arch)
    name = next(names, None)
    return f'ConvMLP-{name.upper()}' if name else f'a custom ConvMLP ({arch})'


# Converting between the authors' files and the layout of today's toolkits.


def to_mm_layout(checkpoint: Mapping) -> dict:
    """Convert a checkpoint to the layout of today's toolkits.

    Args:
        checkpoint: A published classifier, detector of mmdetection 2.x or segmentor
            of mmsegmentation 0.x, or a checkpoint of the Runner. It is not changed.

    Returns:
        ``state_dict`` with the names of the models, and ``meta``, in which
        ``dataset_meta`` has the names of the classes if the file has them. The
        tensors are those of the file.

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
        checkpoint: See :func:`to_mm_layout`.

    Returns:
        For a classifier or a backbone alone, tensors by their published names. For a
        detector or segmentor, ``state_dict`` with the names of the model, and
        ``meta`` with ``CLASSES`` and ``PALETTE``, as mmdetection 2.x and
        mmsegmentation 0.x have them. The tensors are those of the file.

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
