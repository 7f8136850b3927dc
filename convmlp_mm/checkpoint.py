"""Read checkpoints safely, name what is inside, match it with a model, convert it.

The toolkits unpickle anything, load weights as far as names and shapes match, and warn
about the rest. Here a file is plain tensors and the Runner's own records, or it is
refused; and it has every tensor of the backbone, with numbers of the right kind, or
nothing is loaded and the error says what is wrong. Names, shapes and values are all
that this module knows: no model zoo, no configuration, none of the backbone's code.
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
import types
import urllib.request
import uuid
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException
from typing import BinaryIO
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine import fileio
from mmengine.dist import barrier, is_main_process
from mmengine.logging import print_log
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.utils import digit_version
from torch import Tensor, nn

# The authors' server, and the variable that names a folder with their files.
ROOT = 'https://shi-labs.com/projects/convmlp/checkpoints/'
MIRROR = 'CONVMLP_WEIGHTS'
# Seconds that a server may take to answer, and between two parts of a file.
TIMEOUT = 60
# The first digits stand in the names of published files (torch hub, OpenMMLab), where a
# date may stand as well.
HASH_IN_NAME = re.compile(r'-(?!20\d{6}\.)([0-9a-f]{8,64})\.\w+$')
# The pattern of names that write_file gives to files that are not whole yet.
LEFTOVER = re.compile(r'\..+\.[a-z0-9_]{8}\.tmp')

# The toolkits' name of a backbone, and the tops of this one's published names.
BACKBONE = 'backbone.'
BACKBONE_PREFIXES = ('tokenizer.', 'conv_stages.', 'stages.')
# The part of a published classifier beyond the feature extractor, and mmpretrain's name
# of that head.
HEAD_PREFIXES = ('head.', 'norm.')
CLASSIFIER_HEAD = 'head.fc.'
# Keys of the toolkits for the names of classes; former versions used capitals.
DATASET_META = ('classes', 'palette')
# Files written before torch 0.4.1 lack these tensors of BN, and nothing reads them.
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


def check_output(path: str | os.PathLike, overwrite: bool = False) -> None:
    """Raise an OSError if a file cannot be written, before the work for it is done."""
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
    """Write all of a file, text as UTF-8, or nothing.

    Raises:
        OSError: See :func:`check_output`; and if the disk is full. A file that was
            there before is then as it was.
    """
    check_output(path, overwrite)
    # A file can be renamed at once only within its folder.
    folder, name = osp.split(os.fspath(path))
    temporary = osp.join(folder, f'.{name}.{uuid.uuid4().hex[:8]}.tmp')
    try:
        with open(temporary, 'xb') as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
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
    """Remove, and name, what a killed process had not finished by :func:`write_file`.

    Nobody must be writing into the folder.
    """
    names = sorted(name for name in os.listdir(folder) if LEFTOVER.fullmatch(name))
    for name in names:
        os.unlink(osp.join(folder, name))
    return names


def hash_file(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file, as 64 hexadecimal digits."""
    with open(path, 'rb') as file:
        return hashlib.sha256(file.read()).hexdigest()


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
    """Stand in for ``numpy.dtype``, of which other kinds can hold memory addresses."""
    if kind not in NUMBERS:
        raise pickle.UnpicklingError(f'numpy.dtype of {kind!r}')
    # Unlike a copy, it ignores the state that a pickle gives it.
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
    """Stands in for torch's own, which before 2.6 has a closed list of what is allowed.

    It can also leave out what is not allowed.
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

    Return the bytes of its entries by name; none of the format before torch 1.6.
    """
    start, size = file.read(4), file.seek(0, os.SEEK_END)
    file.seek(0)
    if start != b'PK\3\4':
        return {}
    # This is torch's own reader; another may see other entries in the same file.
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
    path: str,
    map_location: str | torch.device,
    skipped: list[str] | None,
) -> object:
    if path.endswith('.safetensors'):
        # timm and Hugging Face write such files; timm brings the reader.
        from safetensors.torch import load

        loaded = load(file.read())
        return {key: value.to(map_location) for key, value in loaded.items()}
    sizes = _check_archive(file)
    if not sizes:
        # A file of the disk would also be tried as a tar archive, and unpacked.
        file = io.BytesIO(file.read())
    # Up to 2.8 at least, torch's own reader lets a tensor reach beyond its entry.
    checks_sizes = digit_version(torch.__version__) >= digit_version('2.12')
    if skipped is None and checks_sizes:
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
    path = source if isinstance(source, str) else urlparse(name).path
    with open(source, 'rb') if isinstance(source, str) else source as file:
        try:
            checkpoint = _load_safely(file, path, map_location, skipped)
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
    """Raise a CheckpointError if a part of a checkpoint is no dict with names."""
    parts, wanted = [('', checkpoint)], f'checkpoint {name!r} must hold a dict'
    if isinstance(checkpoint, Mapping):
        keys = ('state_dict', 'ema_state_dict', 'meta', 'message_hub')
        parts += [(f' as {key}', checkpoint.get(key)) for key in keys]
        # timm may keep the name of a model here.
        if isinstance(checkpoint.get('model'), Mapping):
            parts.append((' as model', checkpoint['model']))
        if isinstance(checkpoint.get('meta'), Mapping):
            meta = checkpoint['meta'].get('dataset_meta')
            parts.append((' as meta.dataset_meta', meta))
    for where, part in parts:
        if part is None and where:
            continue
        if not isinstance(part, Mapping):
            kind = type(part).__name__
            raise CheckpointError(f'{wanted}{where}, but holds a {kind}')
        for key in part:
            if not isinstance(key, str):
                raise CheckpointError(
                    f'{wanted} with names{where}, but one of its keys is {key!r}'
                )


def _check_hash(path: str, url: str, content: bytes | None = None) -> None:
    """Compare the SHA-256 of a file or its content with the one in its URL, if any."""
    found = HASH_IN_NAME.search(urlparse(url).path)
    if found is None:
        return
    digest = hash_file(path) if content is None else hashlib.sha256(content).hexdigest()
    if not digest.startswith(found[1]):
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
    os.makedirs(osp.dirname(path), exist_ok=True)
    request = urllib.request.Request(url, headers={'User-Agent': 'convmlp_mm'})
    print_log(f'Fetching {url} to {path}', 'current')
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            content = response.read()
    except (OSError, HTTPException) as error:
        way = f'; {MIRROR} can name a folder that has it' * url.startswith(ROOT)
        raise OSError(f'cannot fetch {url}: {error}{way}') from error
    _check_hash(path, url, content)
    # A connection that breaks off early need not be an error for urllib.
    _open(io.BytesIO(content), url, 'cpu')
    write_file(path, content, overwrite=True)


def locate_checkpoint(filename: str | os.PathLike) -> str:
    """Return the path of a checkpoint, fetching it, or its URL if not of http(s).

    The argument and the errors are those of :func:`read_checkpoint`.
    """
    filename = osp.expanduser(os.fspath(filename))
    if filename.startswith(('http://', 'https://')):
        # One process fetches, and the others find the file if they share its disk.
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
        skipped: A list that takes the classes of what is left out, which is all but
            tensors and the Runner's own records. Without it they are an error.

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

    Raises:
        ValueError: If it holds more than tensors, text and numbers.
    """

    def whole(value: object) -> object:
        if isinstance(value, Mapping):
            return {key: whole(item) for key, item in value.items()}
        # torch saves all of the memory that a part of a larger tensor lies in, so that
        # a part is copied. An expanded tensor, larger than its memory, is not.
        if isinstance(value, Tensor):
            value = value.detach()
            stored = value.untyped_storage().nbytes()
            return value.clone() if value.nbytes < stored else value
        return value

    buffer = io.BytesIO()
    torch.save(whole(checkpoint), buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except pickle.UnpicklingError as error:
        message = 'the checkpoint holds more than tensors, text and numbers'
        raise ValueError(message) from error
    return buffer.getvalue()


# Names: where a checkpoint keeps its tensors, and what the toolkits call them.


def _tensors(content: object) -> dict[str, Tensor]:
    items = content.items() if isinstance(content, Mapping) else ()
    return {key: value for key, value in items if isinstance(value, Tensor)}


def _taken(checkpoint: Mapping) -> str | None:
    """Return the key that the tensors are under; None in a state dict itself."""
    keys = ('state_dict', 'model')
    return next((k for k in keys if isinstance(checkpoint.get(k), Mapping)), None)


def tensors_of(checkpoint: Mapping) -> dict[str, Tensor]:
    """Pick the tensors under ``state_dict`` or ``model``, or of a state dict itself."""
    return _tensors(checkpoint.get(_taken(checkpoint), checkpoint))


def say_taken(checkpoint: Mapping) -> str:
    """Say, to end a message, which one of several sets of tensors is taken."""
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

    They lose ``module.``. In a published file the backbone gets the prefix
    ``backbone.``, and a classifier's head the name that mmpretrain gives it.
    """
    found = without_module(checkpoint)
    if not any(key.startswith(BACKBONE_PREFIXES) for key in found):
        return found

    def rename(key: str) -> str:
        head = key.removeprefix('head.')
        return BACKBONE + key if head == key else CLASSIFIER_HEAD + head

    return {rename(key): value for key, value in found.items()}


def _extract_backbone(checkpoint: Mapping, prefix: str | None) -> dict[str, Tensor]:
    """Pick the backbone's tensors, and what stands beside them, by published names."""
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
    """Yield the dotted names of tensors with NaN or Inf, in nested dicts and lists.

    A matrix of zeros and -Inf, which is the mask of an attention, is none of them.
    """
    if isinstance(content, (Mapping, list, tuple)):
        is_dict = isinstance(content, Mapping)
        for key, value in content.items() if is_dict else enumerate(content):
            yield from find_not_finite(value, f'{name}.{key}' if name else str(key))
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


def _list_problems(
    found: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    problems: Mapping[str, Collection[str]],
) -> str:
    """Add to the problems of names those of values that are no weights, and list all.

    ``dtypes`` says what tensors are to become, as far as that is known.
    """
    plain = {key: value for key, value in found.items() if _is_plain(value)}
    known = {key: value for key, value in plain.items() if key in dtypes}
    kinds = [
        f'{key} ({value.dtype} in the file, {dtypes[key]} here)'
        for key, value in known.items()
        if _kind(value.dtype) != _kind(dtypes[key])
    ]
    # Too large a number becomes Inf where there is less room for it.
    narrow = {
        key: value.to(dtypes[key])
        for key, value in known.items()
        if value.is_floating_point() and value.itemsize > dtypes[key].itemsize
    }
    problems = {
        **problems,
        'sparse, quantised or without data': [k for k in found if k not in plain],
        'of another kind of numbers': kinds,
        'with NaN or Inf': list(find_not_finite({**plain, **narrow})),
    }
    texts = ((len(names), what, some_of(names)) for what, names in problems.items())
    return '; '.join(f'{n} {what}: {names}' for n, what, names in texts if n)


def check_tensors(found: Mapping[str, Tensor], name: str | os.PathLike) -> None:
    """Check the tensors of a file, by their names in the toolkits, without a model.

    Raises:
        CheckpointError: If one of them is sparse, quantised or without data, has NaN
            or Inf in it, or is of a backbone and has another kind of numbers.
    """
    tops = tuple(BACKBONE + top for top in BACKBONE_PREFIXES)
    names = [key for key in found if key.startswith(tops)]
    dtypes = {k: torch.int64 if k.endswith(COUNTER) else torch.float64 for k in names}
    if problems := _list_problems(found, dtypes, {}):
        raise CheckpointError(
            f'checkpoint {os.fspath(name)!r} cannot be used: {problems}'
        )


# Matching: which tensors of a file are those of a model.


@dataclass
class Match:
    """How the tensors of a file and those of a model go together.

    Attributes:
        loaded: Tensors that both have, with the same shape.
        missing: Names that only the model has, but for the counters of BN.
        misshapen: Names of both whose shapes differ, with the shapes.
        unknown: Names that only the file has.
        skipped: Names that the caller lets through, by the reason.
    """

    loaded: dict[str, Tensor]
    missing: list[str]
    misshapen: dict[str, str]
    unknown: list[str]
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, reason: str, names: list[str]) -> None:
        """Take names out of what is wrong, for a reason that the message will give."""
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
    """Say in one line how many of the tensors found fit, and what was skipped.

    Raises:
        CheckpointError: If anything else differs, or a tensor is no weight; with the
            architectures of both, if these can be read off the file.
    """
    expected, kind = model.state_dict(), type(model).__name__
    dtypes = {key: expected[key].dtype for key in result.loaded}
    wrong = {
        'missing': result.missing,
        'of another shape': result.misshapen.values(),
        'unknown': result.unknown,
    }
    if problems := _list_problems(result.loaded, dtypes, wrong):
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
        The line of :func:`explain`.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If a tensor of the backbone is missing, of another shape or
            kind of numbers, or not finite; if one in the file belongs neither to the
            backbone nor to a classifier's head.
    """
    content = read_checkpoint(checkpoint, map_location)
    found = _extract_backbone(content, prefix)
    built = model.state_dict()
    result = match(found, built)
    result.skip('skipped', [k for k in result.unknown if _is_expected_extra(k, built)])
    message = explain(result, found, model, os.fspath(checkpoint))
    # Only what has been let through may be missing, so this is not strict.
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
        model: A model of a toolkit, usually with ConvMLP as its ``backbone``.
        checkpoint: A published classifier, or one with the model's own names, behind
            ``module.`` or not; plain or under ``'state_dict'`` or ``'model'``. It is
            not changed.
        name: What messages call it.
        partial: Whether tensors outside of the backbone may be missing in the file,
            as when a detector starts from a classifier.
        skip_heads: Whether a head with another number of classes is left out, and
            stays random.
        exact: Whether nothing may be skipped, as when a run is resumed.

    Returns:
        The tensors that fit, and the line of :func:`explain`.

    Raises:
        CheckpointError: If a tensor of the backbone is missing, unknown, of another
            shape or kind of numbers, or not finite, and without ``partial`` if any
            is missing. The message names them and the architecture of the file.
    """
    expected = _tensors(model.state_dict())
    is_convmlp = f'{BACKBONE}tokenizer.block.0.weight' in expected
    # The names of another backbone may begin as the published ones do.
    found = name_as_model(checkpoint) if is_convmlp else without_module(checkpoint)
    result = match(found, expected)
    if not exact:
        extra = [k for k in result.unknown if _is_expected_extra(k, expected, BACKBONE)]
        result.skip('skipped', extra)
    if skip_heads and not exact:
        heads = [k for k in result.misshapen if 'head' in k and _is_other(k)]
        heads = [k for k in heads if found[k].shape[1:] == expected[k].shape[1:]]
        result.skip('skipped for another number of classes', heads)
    if partial:
        result.skip('not in the file', list(filter(_is_other, result.missing)))
    message = explain(result, found, model, os.fspath(name))
    return result.loaded, message + say_taken(checkpoint)


def _is_other(key: str) -> bool:
    return not key.startswith(BACKBONE)


def _is_expected_extra(key: str, built: Iterable[str], prefix: str = '') -> bool:
    """Whether a name is of a head, or of a stage that this backbone has not built."""
    name = key.removeprefix(prefix)
    if not key.startswith(prefix) or name.startswith(HEAD_PREFIXES):
        return True
    parts = name.split('.')
    stage = '.'.join([*parts[: 2 if parts[0] == 'stages' else 1], ''])
    is_built = any(other.startswith(prefix + stage) for other in built)
    return name.startswith(BACKBONE_PREFIXES) and not is_built


def describe_arch(found: Mapping[str, Tensor]) -> dict | None:
    """Read the architecture off the backbone's tensors, by their published names.

    It is as the values of ``ConvMLP.arch_settings``; None if the tensors are not those
    of a ConvMLP with its conv stage.
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
    text = ' '.join(names)
    on_and_off = {
        'conv_stage': ('conv_stages.conv_blocks.', 'conv_stages.blocks.'),
        'conv_downsample': ('downsample_mlp.downsample.', 'downsample_mlp.reduction.'),
    }
    has = {key: [part in text for part in on_and_off[key]] for key in on_and_off}
    found = {key: on for key, (on, off) in has.items() if on != off}
    return found | {'depthwise_conv': '.connect.' in text}


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
    pairs = {f'{key}={on}': f'{key}={not on}' for key, on in switches.items()}
    if there != here:
        names = {_name_arch(backbone, there): _name_arch(backbone, here)}
        pairs = {**names, **pairs}
    if not pairs:
        return ''
    of_file, configured = ', '.join(pairs), ', '.join(pairs.values())
    return f'. The file is {of_file}; the configuration says {configured}'


def _name_arch(backbone: nn.Module, arch: Mapping) -> str:
    names = (k for k, v in backbone.arch_settings.items() if v == arch)
    name = next(names, None)
    return f'ConvMLP-{name.upper()}' if name else f'a custom ConvMLP ({arch})'


# Converting between the authors' files and the layout of today's toolkits.


def to_mm_layout(checkpoint: Mapping) -> dict:
    """Convert a checkpoint to the layout of today's toolkits.

    It may be a published classifier, a detector of mmdetection 2.x, a segmentor of
    mmsegmentation 0.x or a checkpoint of the Runner, and is not changed. What comes of
    it has ``state_dict`` and ``meta``, with the classes in ``dataset_meta``.

    Raises:
        ValueError: If there is no ConvMLP in the checkpoint.
    """
    state_dict = _convmlp_model(checkpoint)
    meta = _plain_meta(checkpoint)
    found = {key: meta.pop(key.upper(), None) for key in DATASET_META}
    if dataset_meta := {key: value for key, value in found.items() if value}:
        meta.setdefault('dataset_meta', dataset_meta)
    return dict(state_dict=state_dict, meta=meta)


def to_published_layout(checkpoint: Mapping) -> dict:
    """Convert a checkpoint to the layout of the authors' files.

    Classifiers become tensors by their published names. Detectors and segmentors keep
    ``state_dict``, with ``CLASSES`` and ``PALETTE`` in ``meta``, as mmdetection 2.x and
    mmsegmentation 0.x have them. See :func:`to_mm_layout` for what may be converted.
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
