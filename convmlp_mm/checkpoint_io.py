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
import types
import uuid
from collections import Counter, OrderedDict
from collections.abc import Mapping
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine import fileio
from mmengine.dist import barrier, is_main_process
from mmengine.logging.history_buffer import HistoryBuffer

from .zoo import ROOT, published_hash

__all__ = [
    'dump_checkpoint',
    'hash_file',
    'locate_checkpoint',
    'read_checkpoint',
]

# The variable that names a folder with the authors' files.
MIRROR = 'CONVMLP_WEIGHTS'
# The first digits stand in the names of published files (torch hub, OpenMMLab), where a
# date may stand as well.
HASH_IN_NAME = re.compile(r'-(?!20\d{6}\.)([0-9a-f]{8,64})\.\w+$')


def _history_buffer_attribute(owner: type, name: str) -> object:
    """Stand-in for ``getattr`` in the logs that the Runner saves.

    ``getattr`` as such would let a pickle walk from any object to any other.
    """
    if owner is HistoryBuffer and not name.startswith('_'):
        return getattr(owner, name)
    raise pickle.UnpicklingError(f'attribute {name!r} of {owner!r} is not allowed')


def _runner_globals() -> dict[str, object]:
    """List the few things beside tensors that a Runner's checkpoint holds."""
    # numpy 1.26 has an almost empty _core.
    core = np._core if hasattr(getattr(np, '_core', None), 'multiarray') else np.core
    allowed = {
        'builtins.getattr': _history_buffer_attribute,
        'builtins.slice': slice,
        'numpy.ndarray': np.ndarray,
        'numpy.dtype': np.dtype,
        f'{HistoryBuffer.__module__}.HistoryBuffer': HistoryBuffer,
    }
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        allowed[f'{module}._reconstruct'] = core.multiarray._reconstruct
        allowed[f'{module}.scalar'] = core.multiarray.scalar
    for scalar in (np.float32, np.float64, np.int64, np.uint32):
        kind = type(np.dtype(scalar))
        allowed[f'{kind.__module__}.{kind.__name__}'] = kind
    return allowed


class _Unpickler(pickle.Unpickler):
    """What ``weights_only=True`` is, for torch before 2.5, whose list is closed."""

    def find_class(self, module: str, name: str) -> object:
        # torch.save writes the names of Python 2.
        key = f'{module.replace("__builtin__", "builtins")}.{name}'
        allowed = {
            **_runner_globals(),
            'collections.OrderedDict': OrderedDict,
            # Milestones of a MultiStepLR.
            'collections.Counter': Counter,
            '_codecs.encode': codecs.encode,
            'torch.Size': torch.Size,
            'torch._utils._rebuild_parameter': torch._utils._rebuild_parameter,
            'torch._utils._rebuild_tensor_v2': torch._utils._rebuild_tensor_v2,
        }
        if key not in allowed:
            raise pickle.UnpicklingError(f'WeightsUnpickler error: {key}')
        return allowed[key]


def _load_safely(
    source: str | io.BytesIO, name: str, map_location: str | torch.device
) -> object:
    if name.endswith('.safetensors'):
        # Of timm and Hugging Face; timm brings the reader.
        from safetensors import SafetensorError
        from safetensors.torch import load

        content = source.read() if isinstance(source, io.BytesIO) else _bytes(source)
        try:
            loaded = load(content)
        except SafetensorError as error:
            raise ValueError(error) from error
        return {key: value.to(map_location) for key, value in loaded.items()}
    if hasattr(torch.serialization, 'safe_globals'):
        allowed = [(value, key) for key, value in _runner_globals().items()]
        with torch.serialization.safe_globals(allowed):
            return torch.load(source, map_location=map_location, weights_only=True)
    module = types.ModuleType('restricted_pickle')
    module.Unpickler = _Unpickler
    module.load = lambda file, **kwargs: _Unpickler(file, **kwargs).load()
    return torch.load(source, map_location=map_location, pickle_module=module)


def _bytes(path: str) -> bytes:
    with open(path, 'rb') as file:
        return file.read()


def _check_hash(path: str, url: str) -> None:
    """Compare a file with the SHA-256 that is known of its URL, if one is."""
    expected = published_hash(url)
    if expected is None:
        match = HASH_IN_NAME.search(urlparse(url).path)
        if match is None:
            return
        expected = match.group(1)
    digest = hash_file(path)
    if not digest.startswith(expected):
        raise ValueError(
            f'{path!r}, which is to be {url}, has the SHA-256 {digest}, but '
            f'{expected} is expected: it is damaged or another file'
        )


def _download(url: str) -> str:
    """Return the path of ``url`` in torch hub's cache, fetching it once.

    With a mirror, it is the path in there of what comes after ``ROOT``.
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
        path = os.path.join(torch.hub.get_dir(), 'checkpoints', name)
        if not os.path.exists(path):
            _fetch(url, path)
    _check_hash(path, url)
    return path


def _fetch(url: str, path: str) -> None:
    """Put a file into the cache if it is whole, safe and the right one."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f'{path}.{uuid.uuid4().hex}.new'
    try:
        try:
            torch.hub.download_url_to_file(url, temporary, progress=is_main_process())
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


def _open(source: str | io.BytesIO, name: str, map_location: object) -> Mapping:
    """Read a file, and say of what is wrong with it what a user can use."""
    try:
        checkpoint = _load_safely(source, name, map_location)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        # torch puts the object in question into the middle of much advice, which
        # recommends to load it all the same.
        lines = str(error).rpartition('WeightsUnpickler error:')[2].splitlines()
        lines = [line for line in lines if line.strip() and 'weights_only' not in line]
        reason = lines[0].strip() if lines else type(error).__name__
        raise ValueError(
            f'checkpoint {name!r} is not a file of plain weights, is cut '
            f'short, or holds objects that are not allowed: {reason}'
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(
            f'checkpoint {name!r} must hold a dict, but holds a '
            f'{type(checkpoint).__name__}'
        )
    return checkpoint


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
        if is_main_process():
            _download(filename)
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
    filename: str | os.PathLike, map_location: str | torch.device = 'cpu'
) -> dict:
    """Read a checkpoint without running code that it may carry.

    Args:
        filename (str | PathLike): A path, an http(s) URL, which goes to the
            cache of torch hub, or any other URL that mmengine has a file
            backend for. The folder that the environment variable
            ``CONVMLP_WEIGHTS`` names stands in for the authors' server.
        map_location (str | torch.device): Where the tensors go. Defaults to
            ``'cpu'``.

    Returns:
        dict: What the file holds.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If a URL cannot be fetched.
        ValueError: If the file is not a checkpoint, is cut short, or holds
            objects other than tensors and the Runner's own records; if the
            file of a URL has not the SHA-256 that the zoo or the end of its
            name says (``-`` and eight digits or more). What is refused does
            not enter the cache.
    """
    filename = os.path.expanduser(os.fspath(filename))
    source = locate_checkpoint(filename)
    if '://' in source:
        source = io.BytesIO(fileio.get(filename))
    return _open(source, filename, map_location)


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
        # A tensor may be a part of a larger one, all of which would be saved.
        if isinstance(value, torch.Tensor):
            return value.detach().clone()
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
