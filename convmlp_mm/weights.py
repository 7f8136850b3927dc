"""Check checkpoints, name what they hold, and load them.

mmengine loads weights as far as names and shapes match and warns about the
rest. The functions here stop instead: a file either has every tensor of the
backbone, with numbers of the right kind, or nothing is loaded and the error says
what is wrong. They know names, shapes and values only, nothing of the backbone's code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from .checkpoint_io import CheckpointError, read_checkpoint
from .layouts import (
    BACKBONE,
    BACKBONE_PREFIXES,
    name_as_model,
    say_taken,
    some_of,
    tensors_of,
    without_module,
)

__all__ = [
    'check_tensors',
    'describe_arch',
    'extract_backbone',
    'find_not_finite',
    'fit_checkpoint',
    'load_backbone_weights',
]

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
