"""Read and check checkpoints.

mmengine loads weights as far as names and shapes match and warns about the
rest. The functions here stop instead: a file either has every tensor of the
backbone, or nothing is loaded and the error says what is wrong. They know
names and shapes only, nothing of the backbone's code.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from urllib.parse import urlparse

import torch
from mmengine import fileio
from mmengine.dist import barrier, is_main_process
from mmengine.logging.history_buffer import HistoryBuffer
from torch import Tensor, nn

__all__ = [
    'extract_backbone',
    'load_backbone_weights',
    'load_model_weights',
    'read_checkpoint',
]

# What a classifier's checkpoint holds beyond the feature extractor.
HEAD_PREFIXES = ('head.', 'norm.')
# The tops of the backbone's published names.
BACKBONE_PREFIXES = ('tokenizer.', 'conv_stages.', 'stages.')
MAX_NAMES = 6


def _history_buffer_attribute(owner: type, name: str) -> object:
    """Stand-in for ``getattr`` in the logs that the Runner saves.

    ``getattr`` as such would let a pickle walk from any object to any other.
    """
    if owner is HistoryBuffer and not name.startswith('_'):
        return getattr(owner, name)
    raise pickle.UnpicklingError(f'attribute {name!r} of {owner!r} is not allowed')


def _runner_globals():
    """Allow the few classes beside tensors that a Runner's checkpoint holds."""
    if not hasattr(torch.serialization, 'safe_globals'):
        return contextlib.nullcontext()
    import numpy as np

    core = getattr(np, '_core', None) or np.core
    reconstruct, scalar = core.multiarray._reconstruct, core.multiarray.scalar
    names = ('numpy.core.multiarray', 'numpy._core.multiarray')
    return torch.serialization.safe_globals(
        [HistoryBuffer, np.ndarray, np.dtype, slice]
        + [(reconstruct, f'{name}._reconstruct') for name in names]
        + [(scalar, f'{name}.scalar') for name in names]
        + [type(np.dtype(t)) for t in (np.float32, np.float64, np.int64, np.uint32)]
        + [(_history_buffer_attribute, 'builtins.getattr')]
    )


def _download(url: str) -> str:
    """Return the path of ``url`` in torch hub's cache, fetching it once."""
    name = os.path.basename(urlparse(url).path)
    path = os.path.join(torch.hub.get_dir(), 'checkpoints', name)
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        # It writes beside the file and renames, so that others never see half.
        torch.hub.download_url_to_file(url, path, progress=is_main_process())
    return path


def read_checkpoint(
    filename: str | os.PathLike, map_location: str | torch.device = 'cpu'
) -> dict:
    """Read a checkpoint without running code that it may carry.

    Args:
        filename (str | PathLike): A path, an http(s) URL, which goes to the
            cache of torch hub, or any other URL that mmengine has a file
            backend for.
        map_location (str | torch.device): Where the tensors go. Defaults to
            ``'cpu'``.

    Returns:
        dict: What the file holds.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a checkpoint, is cut short, or holds
            objects other than tensors and the Runner's own records.
    """
    filename = os.path.expanduser(os.fspath(filename))
    source = filename
    if filename.startswith(('http://', 'https://')):
        # One process of the job fetches; the others find it, unless they are
        # on a machine with another disk.
        if is_main_process():
            _download(filename)
        barrier()
        source = _download(filename)
    elif '://' in filename:
        source = io.BytesIO(fileio.get(filename))
    elif not os.path.isfile(filename):
        raise FileNotFoundError(f'checkpoint {filename!r} does not exist')
    try:
        with _runner_globals():
            checkpoint = torch.load(
                source, map_location=map_location, weights_only=True
            )
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        # torch puts the object in question into the middle of much advice, which
        # recommends to load it all the same.
        lines = str(error).rpartition('WeightsUnpickler error:')[2].splitlines()
        lines = [line for line in lines if line and 'weights_only' not in line]
        reason = lines[0].strip() if lines else type(error).__name__
        raise ValueError(
            f'checkpoint {filename!r} is not a file of plain weights, is cut '
            f'short, or holds objects that are not allowed: {reason}'
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(
            f'checkpoint {filename!r} must hold a dict, but holds a '
            f'{type(checkpoint).__name__}'
        )
    return checkpoint


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
    state_dict = _state_dict(checkpoint)
    if prefix is None:
        prefix = _find_prefix(state_dict)
    elif prefix and not prefix.endswith('.'):
        prefix += '.'
    found = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
    if not found:
        raise ValueError(
            f'no tensor in the checkpoint has the prefix {prefix!r}; there are '
            f'{_some(state_dict) or "no tensors"}'
        )
    return found


def _state_dict(checkpoint: Mapping) -> dict[str, Tensor]:
    for key in ('state_dict', 'model'):
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    return {k: v for k, v in checkpoint.items() if isinstance(v, Tensor)}


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
        checkpoint (str | PathLike): See :func:`read_checkpoint`.
        prefix (str, optional): See :func:`extract_backbone`.
        map_location (str | torch.device): See :func:`read_checkpoint`.

    Returns:
        str: One line that says how many tensors matched and what was skipped.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a tensor of the backbone is missing or has another
            shape, or if the file has tensors that belong neither to the
            backbone nor to a classifier's head.
    """
    found = extract_backbone(read_checkpoint(checkpoint, map_location), prefix)
    return _load_all(model, found, checkpoint, _is_expected_extra)


def load_model_weights(
    model: nn.Module,
    checkpoint: str | os.PathLike,
    map_location: str | torch.device = 'cpu',
) -> str:
    """Load a checkpoint into a classifier, detector or segmentor, or nothing.

    Args:
        model (nn.Module): A model of mmpretrain, mmdet or mmseg with ConvMLP
            as its ``backbone``.
        checkpoint (str | PathLike): See :func:`read_checkpoint`. A published
            classifier, whose backbone has no prefix, or a checkpoint with the
            model's own names, with ``module.`` before them or not.
        map_location (str | torch.device): See :func:`read_checkpoint`.

    Returns:
        str: One line that says how many tensors matched.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a tensor of the model is missing or has another shape,
            or if the file has tensors that are not the model's.
    """
    state_dict = _state_dict(read_checkpoint(checkpoint, map_location))
    found = {key.removeprefix('module.'): value for key, value in state_dict.items()}
    if any(key.startswith(BACKBONE_PREFIXES) for key in found):
        found = {_rename_classifier(key): value for key, value in found.items()}
    return _load_all(model, found, checkpoint, lambda key, expected: False)


def _rename_classifier(key: str) -> str:
    """Give a tensor of a published classifier its name in mmpretrain."""
    if key.startswith('head.'):
        return 'head.fc.' + key.removeprefix('head.')
    return f'backbone.{key}'


def _load_all(
    model: nn.Module,
    found: Mapping[str, Tensor],
    checkpoint: str | os.PathLike,
    may_be_skipped: Callable[[str, Iterable[str]], bool],
) -> str:
    """Load ``found``, if it has all that the model has and nothing unknown."""
    expected = model.state_dict()
    # Files written before torch 0.4.1 lack the counters; nothing reads them.
    missing = [
        key
        for key in expected
        if key not in found and not key.endswith('num_batches_tracked')
    ]
    misshapen = [
        f'{key} ({tuple(found[key].shape)} in the file, {tuple(tensor.shape)} here)'
        for key, tensor in expected.items()
        if key in found and found[key].shape != tensor.shape
    ]
    extra = [key for key in found if key not in expected]
    skipped = [key for key in extra if may_be_skipped(key, expected)]
    unknown = [key for key in extra if key not in skipped]
    problems = [
        f'{len(names)} {what}: {_some(names)}'
        for what, names in (
            ('missing', missing),
            ('of another shape', misshapen),
            ('unknown', unknown),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f'checkpoint {os.fspath(checkpoint)!r} does not fit this '
            f'{type(model).__name__}; of its {len(expected)} tensors and the '
            f'{len(found)} in the file, ' + '; '.join(problems)
        )
    loaded = {key: found[key] for key in expected if key in found}
    # Not strict only for what the lists above have let through.
    model.load_state_dict(loaded, strict=False)
    message = (
        f'{type(model).__name__}: loaded {len(loaded)} of {len(expected)} '
        f'tensors from {os.fspath(checkpoint)}'
    )
    return message + (f', skipped {_some(skipped)}' if skipped else '')


def _is_expected_extra(key: str, expected: Iterable[str]) -> bool:
    """Whether a name is of a head, or of a stage that this model has not built."""
    if key.startswith(HEAD_PREFIXES):
        return True
    parts = key.split('.')
    stage = '.'.join(parts[: 2 if parts[0] == 'stages' else 1]) + '.'
    return key.startswith(BACKBONE_PREFIXES) and not any(
        name.startswith(stage) for name in expected
    )


def _some(names: Iterable[str]) -> str:
    """A list that stays readable."""
    names = list(names)
    more = len(names) - MAX_NAMES
    shown = ', '.join(names[:MAX_NAMES])
    return f'{shown} and {more} more' if more > 0 else shown
