"""Read checkpoints safely, name what is inside, match it with a model, convert it.

The toolkits unpickle anything, load weights as far as names and shapes match, and warn
about the rest. Here a file is plain tensors and the Runner's own records, or it is
refused; and it has every tensor of the backbone, with numbers of the right kind, or
nothing is loaded and the error says what is wrong. Names, shapes and values are all
that this module knows: no model zoo, no configuration, none of the backbone's code.
"""

import codecs
import hashlib
import io
import os
import os.path as osp
import pickle
import re
import urllib.request
import uuid
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from http.client import HTTPException
from types import SimpleNamespace
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine import fileio
from mmengine.dist import barrier, is_main_process
from mmengine.logging import print_log
from mmengine.logging.history_buffer import HistoryBuffer
from torch import Tensor, nn

# The authors' server, and the variable that names a folder with their files.
ROOT = 'https://shi-labs.com/projects/convmlp/checkpoints/'
MIRROR = 'CONVMLP_WEIGHTS'
WEB = ('http://', 'https://')
# Seconds that a server may take to answer, and between two parts of a file.
TIMEOUT = 60
# The first digits stand in the names of published files (torch hub, OpenMMLab), where a
# date may stand as well.
HASH_IN_NAME = re.compile(r'-(?!20\d{6}\.)([0-9a-f]{8,64})\.\w+$')
# The pattern of names that write_file gives to files that are not whole yet.
LEFTOVER = re.compile(r'\..+\.[a-z0-9_]{8}\.tmp')

# The toolkits' name of a backbone, and the tops of this one's published names.
BACKBONE = 'backbone.'
TOKENIZER = 'tokenizer.'
BACKBONE_PREFIXES = (TOKENIZER, 'conv_stages.', 'stages.')
# mmpretrain's name of the head of a published classifier.
CLASSIFIER_HEAD = 'head.fc.'
# Names that a message lists.
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
    finally:
        if osp.exists(temporary):
            os.unlink(temporary)


def remove_leftovers(folder: str | os.PathLike) -> list[str]:
    """Remove, and name, what a killed process had not finished by :func:`write_file`.

    Nobody must be writing into the folder.
    """
    names = sorted(name for name in os.listdir(folder) if LEFTOVER.fullmatch(name))
    for name in names:
        os.unlink(osp.join(folder, name))
    return names


# Reading: a checkpoint is data, and nothing that it names is run.


def _dtype(kind: str, *_) -> np.dtype:
    """Stand in for ``numpy.dtype``, of which other kinds can hold memory addresses."""
    if not re.fullmatch('b1|[iu][1248]|f[248]', kind):
        raise pickle.UnpicklingError(f'numpy.dtype of {kind!r}')
    # Unlike a copy, it ignores the state that a pickle gives it.
    return np.dtype(kind)


class _Log(HistoryBuffer):
    """Takes the numbers of a log alone: its methods would be those of all logs."""

    def __setstate__(self, state: dict) -> None:
        super().__setstate__({**state, 'statistics_methods': {}})
        self.__class__ = HistoryBuffer


# Classes that a pickle makes objects of: the logs, and the options that timm saves.
CLASSES = {
    f'{HistoryBuffer.__module__}.HistoryBuffer': _Log,
    'argparse.Namespace': Namespace,
}
# Functions that a pickle calls, by the names that it has for them.
FUNCTIONS = {
    'builtins.slice': slice,
    # The methods of a log.
    'builtins.getattr': lambda owner, name: None,
    # Milestones of a MultiStepLR.
    'collections.Counter': Counter,
    'collections.OrderedDict': OrderedDict,
    '_codecs.encode': codecs.encode,
    'numpy.dtype': _dtype,
    'torch.Size': torch.Size,
}
# The functions that numpy and torch name when they are pickled.
for _value in (np.empty(0), np.float64(0), torch.empty(0), nn.Parameter()):
    _function = _value.__reduce_ex__(2)[0]
    _module = _function.__module__.replace('numpy._core', 'numpy.core')
    FUNCTIONS[f'{_module}.{_function.__name__}'] = _function


class _Unpickler(pickle.Unpickler):
    """Stands in for torch's own, which differs from version to version.

    Before 2.6 its list of what is allowed is closed, and up to 2.8 at least it lets a
    tensor reach beyond its entry of the archive.
    """

    # Bytes of each entry of the archive.
    sizes: Mapping[str, int] = {}

    def find_class(self, module: str, name: str) -> object:
        # torch.save writes the names of Python 2.
        key = f'{module.replace("__builtin__", "builtins")}.{name}'
        key = key.replace('numpy._core', 'numpy.core')
        if key == 'numpy.ndarray':
            return np.ndarray
        # A pickle can set attributes of what it gets, so it gets a copy.
        if key in CLASSES:
            return type(name, (CLASSES[key],), {})
        if key in FUNCTIONS:
            return partial(FUNCTIONS[key])
        raise pickle.UnpicklingError(key)

    def __setattr__(self, name: str, value: object) -> None:
        # torch sets the function that finds a storage.
        if name == 'persistent_load':
            value = partial(self._load_storage, value)
        super().__setattr__(name, value)

    def _load_storage(self, load: Callable, key: tuple) -> object:
        """Refuse what torch does not: source code, and storages that are too long."""
        if key[0] not in ('storage', b'storage'):
            raise pickle.UnpicklingError(f'{key[0]!r} in place of a storage')
        size = self.sizes.get(f'data/{key[2]}')
        itemsize = getattr(key[1], 'dtype', torch.uint8).itemsize
        if self.sizes and size != key[4] * itemsize:
            raise pickle.UnpicklingError(f'storage {key[2]} has {size} bytes')
        return load(key)


def _check_archive(content: bytes) -> dict[str, int]:
    """Refuse an archive that torch would run, that would grow, or that is ambiguous.

    Return the bytes of its entries by name; none of the format before torch 1.6.
    """
    if not content.startswith(b'PK\3\4'):
        return {}
    # This is torch's own reader; another may see other entries in the same file.
    names = torch._C.PyTorchFileReader(io.BytesIO(content)).get_all_records()
    if 'constants.pkl' in names:
        raise ValueError('it is a TorchScript archive, which is a program')
    entries = zipfile.ZipFile(io.BytesIO(content)).infolist()
    whole = sum(entry.file_size for entry in entries)
    if whole > len(content) or any(entry.compress_type for entry in entries):
        raise ValueError(f'its {len(content)} bytes would become {whole}')
    sizes = {entry.filename.partition('/')[2]: entry.file_size for entry in entries}
    if len(sizes) < len(entries):
        raise ValueError('entries of it have the same name')
    return sizes


def _load_safely(content: bytes, name: str, map_location: str | torch.device) -> object:
    if name.endswith('.safetensors'):
        # timm and Hugging Face write such files; timm brings the reader.
        from safetensors.torch import load

        return {key: x.to(map_location) for key, x in load(content).items()}
    unpickler = type('Unpickler', (_Unpickler,), dict(sizes=_check_archive(content)))
    module = SimpleNamespace(
        __name__='safe_pickle',
        Unpickler=unpickler,
        load=lambda file, **kwargs: unpickler(file, **kwargs).load(),
    )
    # A file of the disk would also be tried as a tar archive, and unpacked.
    return torch.load(
        io.BytesIO(content), map_location, pickle_module=module, weights_only=False
    )


def _open(content: bytes, name: str, map_location: str | torch.device = 'cpu') -> dict:
    """Read a file, and say of what is wrong with it what a user can use."""
    _check_hash(name, content)
    try:
        checkpoint = _load_safely(content, name, map_location)
    # Unpickling damaged bytes can raise any exception.
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise CheckpointError(
            f'checkpoint {name!r} is not a file of plain weights, is cut short, '
            f'or holds objects that are not allowed: {reason.splitlines()[0]}'
        ) from error
    check_content(checkpoint, name)
    return checkpoint


def check_content(checkpoint: object, name: str) -> None:
    """Raise a CheckpointError if a checkpoint, or a part of it, is no dict."""
    parts = {'': checkpoint}
    if isinstance(checkpoint, Mapping):
        keys = ('state_dict', 'ema_state_dict', 'meta', 'message_hub')
        parts.update({f' as {key}': checkpoint.get(key) for key in keys})
        if isinstance(checkpoint.get('meta'), Mapping):
            parts[' as meta.dataset_meta'] = checkpoint['meta'].get('dataset_meta')
    for where, part in parts.items():
        is_absent = where and part is None
        if not is_absent and not isinstance(part, Mapping):
            raise CheckpointError(
                f'checkpoint {name!r} must hold a dict{where}, but holds a '
                f'{type(part).__name__}'
            )


def _check_hash(name: str, content: bytes) -> None:
    """Compare the SHA-256 of a download with the one in its name, if there is one."""
    expected = name.startswith(WEB) and HASH_IN_NAME.search(urlparse(name).path)
    if not expected:
        return
    digest = hashlib.sha256(content).hexdigest()
    if not digest.startswith(expected[1]):
        raise ValueError(
            f'{name} has the SHA-256 {digest}, but {expected[1]} is expected: it is '
            'damaged or another file'
        )


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
    # A connection that breaks off early need not be an error for urllib.
    _open(content, url)
    write_file(path, content, overwrite=True)


def locate_checkpoint(filename: str | os.PathLike) -> str:
    """Return the path of a checkpoint, fetching it, or its URL if not of http(s).

    The argument and the errors are those of :func:`read_checkpoint`, which is the one
    that notices when somebody else has written to the cache.
    """
    filename = osp.expanduser(os.fspath(filename))
    mirror = os.environ.get(MIRROR)
    if mirror and filename.startswith(ROOT):
        filename = osp.join(mirror, filename.removeprefix(ROOT))
    if filename.startswith(WEB):
        return _download(filename)
    if '://' not in filename and not osp.isfile(filename):
        raise FileNotFoundError(f'checkpoint {filename!r} does not exist')
    return filename


def describe_checkpoint(filename: str) -> str:
    """Return the name of a checkpoint's file and the first digits of its SHA-256."""
    path = locate_checkpoint(filename)
    if '://' in path:
        return osp.basename(filename)
    with open(path, 'rb') as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    return f'{osp.basename(filename)} (SHA-256 {digest[:8]})'


def _download(url: str) -> str:
    """Return the path of ``url`` in torch hub's cache, fetching it once."""
    # Many servers have a model.pth.
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    name = f'{digest}-{osp.basename(urlparse(url).path)}'
    path = osp.join(torch.hub.get_dir(), 'checkpoints', name)
    # One process fetches, and the others find the file if they share its disk.
    try:
        if is_main_process() and not osp.exists(path):
            _fetch(url, path)
    finally:
        # Nobody may wait for a process that has failed.
        barrier()
    if not osp.exists(path):
        _fetch(url, path)
    return path


def read_checkpoint(
    filename: str | os.PathLike, map_location: str | torch.device = 'cpu'
) -> dict:
    """Read a checkpoint without running code that it may carry.

    Args:
        filename: A path, an http(s) URL, which goes to the cache of torch hub, or any
            other URL that mmengine has a file backend for. The folder that the
            variable ``CONVMLP_WEIGHTS`` names stands in for the authors' server.
        map_location: Where the tensors go.

    Raises:
        OSError: If there is no such file, or a URL cannot be fetched.
        CheckpointError: If the file is not a checkpoint, is cut short, or holds
            objects other than tensors and the Runner's own records.
        ValueError: If what is fetched has not the SHA-256 that the end of its name
            says (``-`` and eight digits or more).
    """
    content = fileio.get(locate_checkpoint(filename))
    return _open(content, os.fspath(filename), map_location)


def dump_checkpoint(checkpoint: Mapping, name: str | os.PathLike) -> bytes:
    """Make the content of a file that ``torch.load`` reads as weights only.

    Raises:
        ValueError: If it holds more than tensors, text and numbers, or weights that
            :func:`check_tensors` refuses; they are called those of ``name``.
    """
    check_tensors(without_module(checkpoint), name)

    def whole(value: object) -> object:
        if isinstance(value, Mapping):
            return {key: whole(item) for key, item in value.items()}
        # torch saves all of the memory that a part of a larger tensor lies in.
        return value.detach().clone() if isinstance(value, Tensor) else value

    buffer = io.BytesIO()
    torch.save(whole(checkpoint), buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError('it holds more than tensors, text and numbers') from error
    return buffer.getvalue()


# Names: where a checkpoint keeps its tensors, and what the toolkits call them.


def _tensors(content: Mapping) -> dict[str, Tensor]:
    return {str(k): value for k, value in content.items() if isinstance(value, Tensor)}


def without_module(checkpoint: Mapping) -> dict[str, Tensor]:
    """Pick the tensors of a checkpoint, without ``module.``, the prefix of DDP.

    They lie under ``state_dict`` or ``model``, or it is a state dict itself.
    """
    parts = [checkpoint.get('state_dict'), checkpoint.get('model'), checkpoint]
    tensors = _tensors(next(part for part in parts if isinstance(part, Mapping)))
    return {key.removeprefix('module.'): value for key, value in tensors.items()}


def name_as_model(checkpoint: Mapping) -> dict[str, Tensor]:
    """Give the tensors of a checkpoint the names they have in the toolkits.

    They lose ``module.``. In a published file the backbone gets the prefix
    ``backbone.``, and a classifier's head the name that mmpretrain gives it.
    """
    found = without_module(checkpoint)
    if not any(key.startswith(TOKENIZER) for key in found):
        return found
    return {
        f'{BACKBONE}{key}'.replace(f'{BACKBONE}head.', CLASSIFIER_HEAD): value
        for key, value in found.items()
    }


# Values: what cannot be weights, whatever its name and shape are.


def _is_plain(value: Tensor) -> bool:
    """Whether a tensor has all of its numbers, each in a place of its own."""
    special = value.is_quantized or value.is_nested or value.is_meta
    if special or value.layout is not torch.strided:
        return False
    # An expanded tensor could be of any size.
    return value.nbytes <= value.untyped_storage().nbytes()


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
        # torch.isfinite knows no numbers of 8 bits.
        value = content if content.itemsize > 1 else content.float()
        if not value.isfinite().all():
            zero = value == 0
            mask = value.ndim > 1 and zero.any() and (zero | value.isneginf()).all()
            if not mask:
                yield name


def _list_problems(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    problems: Mapping[str, list[str]],
) -> str:
    """Add to the problems of names those of values that are no weights, and list all.

    ``expected`` are the tensors of the model, as far as it is known.
    """
    plain = {key: value for key, value in found.items() if _is_plain(value)}
    problems = {
        **problems,
        'sparse, quantised or without data': [k for k in found if k not in plain],
        'of another kind of numbers': [
            f'{key} ({value.dtype} in the file, {expected[key].dtype} here)'
            for key, value in plain.items()
            if key in expected and _kind(value.dtype) != _kind(expected[key].dtype)
        ],
        'with NaN or Inf': list(find_not_finite(plain)),
    }
    texts = [(len(names), what, some_of(names)) for what, names in problems.items()]
    return '; '.join(f'{n} {what}: {names}' for n, what, names in texts if n)


def check_tensors(found: Mapping[str, Tensor], name: str | os.PathLike) -> None:
    """Raise a CheckpointError if a tensor is sparse, without data or not finite."""
    if problems := _list_problems(found, {}, {}):
        raise CheckpointError(f'checkpoint {str(name)!r} cannot be used: {problems}')


# Matching: which tensors of a file are those of a model.


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
        prefix: What stands before the names of a model; ``'module.'`` and
            ``'backbone.'`` are found without it.
        map_location: See :func:`read_checkpoint`.

    Returns:
        A line that says how many tensors were loaded, and which were skipped.

    Raises:
        OSError: See :func:`read_checkpoint`.
        ValueError: See :func:`read_checkpoint` and :func:`fit_checkpoint`.
    """
    found = without_module(read_checkpoint(checkpoint, map_location))
    if prefix:
        prefix = f'{prefix.rstrip(".")}.'.removeprefix('module.')
        found = {k[len(prefix) :]: v for k, v in found.items() if k.startswith(prefix)}
    loaded, message = fit_checkpoint(model, found, checkpoint)
    # Only what has been let through may be missing, so this is not strict.
    model.load_state_dict(loaded, strict=False)
    return message


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
        model: The backbone, or a model of a toolkit, usually with it as ``backbone``.
        checkpoint: A published classifier, or one with the model's own names. It is
            not changed.
        name: What messages call it.
        partial: Whether tensors outside of the backbone may be missing in the file,
            as when a detector starts from a classifier.
        skip_heads: Whether a head with another number of classes stays random.
        exact: Whether nothing may be skipped, as when a run is resumed.

    Returns:
        The tensors that fit, and a line that says how many, and which were skipped.

    Raises:
        CheckpointError: If a tensor is missing, unknown, of another shape or kind of
            numbers, or not finite, beyond what may be skipped.
    """
    expected, kind = _tensors(model.state_dict()), type(model).__name__
    found, prefix = name_as_model(checkpoint), BACKBONE
    if any(key.startswith(TOKENIZER) for key in expected):
        mine = [key for key in found if key.startswith(BACKBONE)]
        # Tensors of another model keep their names.
        found = {key.removeprefix(BACKBONE): found[key] for key in mine or found}
        prefix = ''
    errors = {'missing': [], 'of another shape': [], 'unknown': []}
    loaded, skipped = {}, defaultdict(list)
    for key in dict.fromkeys([*expected, *found]):
        here, there, text = expected.get(key), found.get(key), key
        outside = not key.startswith(prefix)
        # Files written before torch 0.4.1 lack these of BN, and nothing reads them.
        if there is None and key.endswith('num_batches_tracked'):
            continue
        if there is None:
            what, excuse = 'missing', 'not in the file'
            is_excused = outside and partial
        elif here is None:
            what, excuse = 'unknown', 'skipped'
            is_excused = _is_expected_extra(key, expected, prefix)
        elif _is_plain(there) and there.shape != here.shape:
            what, excuse = 'of another shape', 'skipped for another number of classes'
            text = f'{key} ({tuple(there.shape)} in the file, {tuple(here.shape)} here)'
            is_head = outside and 'head' in key and there.shape[1:] == here.shape[1:]
            is_excused = skip_heads and is_head
        else:
            loaded[key] = there
            continue
        if is_excused and not exact:
            skipped[excuse].append(key)
        else:
            errors[what].append(text)
    if problems := _list_problems(loaded, expected, errors):
        raise CheckpointError(
            f'checkpoint {str(name)!r} does not fit this {kind}; of its '
            f'{len(expected)} tensors and the {len(found)} in the file, {problems}'
            f'{_explain_arch(model, found)}'
        )
    message = f'{kind}: loaded {len(loaded)} of {len(expected)} tensors from {name}'
    return loaded, message + ''.join(
        f', {reason} {some_of(names)}' for reason, names in skipped.items()
    )


def _is_expected_extra(key: str, built: Iterable[str], prefix: str) -> bool:
    """Whether a name is of a head, or of a stage that this backbone has not built."""
    name = key.removeprefix(prefix)
    if not key.startswith(prefix) or name.startswith(('head.', 'norm.')):
        return True
    stage = re.match(r'(stages\.\d+|[^.]*)\.?', name)[0]
    is_built = any(other.startswith(prefix + stage) for other in built)
    return name.startswith(BACKBONE_PREFIXES) and not is_built


def _explain_arch(model: nn.Module, found: Mapping[str, Tensor]) -> str:
    """Name the architectures of file and model, if the former is a known one."""
    backbone = getattr(model, 'backbone', model)
    if type(backbone).__name__ != 'ConvMLP':
        return ''
    shapes = {key.removeprefix(BACKBONE): value.shape for key, value in found.items()}
    settings = backbone.arch_settings
    own = [name for name, arch in settings.items() if arch == backbone.arch]
    for name in settings:
        with torch.device('meta'):
            built = type(backbone)(name).state_dict()
        fits = all(shapes.get(key) == value.shape for key, value in built.items())
        if fits and name not in own:
            theirs = f'ConvMLP-{name.upper()}'
            ours = f'ConvMLP-{own[0].upper()}' if own else 'a custom ConvMLP'
            return f'. The file is {theirs}; the configuration says {ours}'
    return ''


# Converting between the authors' files and the layout of today's toolkits.


def to_mm_layout(checkpoint: Mapping) -> dict:
    """Convert a checkpoint to the layout of today's toolkits; it is not changed.

    That is ``state_dict`` and ``meta``, with the classes in ``dataset_meta``.

    Raises:
        ValueError: If there is no ConvMLP in the checkpoint.
    """
    state_dict = _convmlp_model(checkpoint)
    meta = dict(checkpoint.get('meta') or {})
    # Former versions of the toolkits used capitals.
    keys = [key for key in ('classes', 'palette') if meta.get(key.upper()) is not None]
    if keys:
        meta.setdefault('dataset_meta', {key: meta.pop(key.upper()) for key in keys})
    return dict(state_dict=state_dict, meta=meta)


def to_published_layout(checkpoint: Mapping) -> dict:
    """Give a classifier's tensors the names that they have in the authors' files.

    Raises:
        ValueError: If it is no ConvMLP, or a detector or segmentor, whose names are the
            same in the authors' files.
    """
    state_dict = _convmlp_model(checkpoint)
    if not all(key.startswith((BACKBONE, CLASSIFIER_HEAD)) for key in state_dict):
        raise ValueError("only classifiers have other names in the authors' files")
    return {
        key.replace(CLASSIFIER_HEAD, 'head.').removeprefix(BACKBONE): value
        for key, value in state_dict.items()
    }


def _convmlp_model(checkpoint: Mapping) -> dict[str, Tensor]:
    state_dict = name_as_model(checkpoint)
    if not any(key.startswith(BACKBONE + TOKENIZER) for key in state_dict):
        raise ValueError(
            f'there is no ConvMLP among the tensors, which are {some_of(state_dict)}'
        )
    return state_dict
