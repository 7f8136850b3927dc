"""What the tensors of a ConvMLP are called in published files and in the toolkits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

__all__ = [
    'name_as_model',
    'say_taken',
    'some_of',
    'tensors_of',
    'to_mm_layout',
    'to_published_layout',
    'without_module',
]

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
