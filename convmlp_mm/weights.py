"""Check checkpoints, name what they hold, and load them.

mmengine loads weights as far as names and shapes match and warns about the
rest. The functions here stop instead: a file either has every tensor of the
backbone, or nothing is loaded and the error says what is wrong. They know
names and shapes only, nothing of the backbone's code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from .checkpoint_io import read_checkpoint
from .layouts import (
    BACKBONE,
    BACKBONE_PREFIXES,
    name_as_model,
    some_of,
    tensors_of,
    without_module,
)

__all__ = [
    'describe_arch',
    'extract_backbone',
    'fit_checkpoint',
    'load_backbone_weights',
]

# What a classifier's checkpoint holds beyond the feature extractor.
HEAD_PREFIXES = ('head.', 'norm.')


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
        ValueError: If a tensor of the backbone is missing or has another
            shape, or if the file has tensors that belong neither to the
            backbone nor to a classifier's head.
    """
    found = extract_backbone(read_checkpoint(checkpoint, map_location), prefix)
    loaded, message = _compare(
        model, found, model.state_dict(), checkpoint, _is_expected_extra
    )
    # Not strict only for what the comparison has let through.
    model.load_state_dict(loaded, strict=False)
    return message


def fit_checkpoint(
    model: nn.Module,
    checkpoint: Mapping,
    name: str | os.PathLike,
    partial: bool = False,
    skip_heads: bool = True,
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

    Returns:
        tuple[dict, str]: The tensors that fit, and one line that says how
        many they are and what was skipped.

    Raises:
        ValueError: If a tensor of the backbone is missing or has another
            shape, or the file has one that the backbone does not know; the
            message names them and the architecture that the file seems to
            have. Without ``partial`` also if other tensors are missing.
    """
    expected = model.state_dict()
    if f'{BACKBONE}tokenizer.block.0.weight' in expected:
        found = name_as_model(checkpoint)
    else:
        # Another backbone, whose names may begin as the published ones do.
        found = without_module(checkpoint)

    heads = [
        key
        for key in found.keys() & expected.keys()
        if skip_heads
        and 'head' in key
        and not key.startswith(BACKBONE)
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
        return name == key or _is_expected_extra(name, built)

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
    return loaded, message


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
    except KeyError:
        return None


def _explain_arch(model: nn.Module, found: Mapping[str, Tensor]) -> str:
    """Name both architectures, if they are not the same."""
    backbone = getattr(model, 'backbone', model)
    if backbone is not model:
        found = {
            k.removeprefix(BACKBONE): v
            for k, v in found.items()
            if k.startswith(BACKBONE)
        }
    there, here = describe_arch(found), getattr(backbone, 'arch', None)
    if there is None or here is None or there == here:
        return ''
    names = {
        id(arch): next(
            (
                f'ConvMLP-{k.upper()}'
                for k, v in backbone.arch_settings.items()
                if v == arch
            ),
            f'a custom ConvMLP ({arch})',
        )
        for arch in (there, here)
    }
    return f'. The file is {names[id(there)]}; the configuration says {names[id(here)]}'


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
    misshapen = [
        f'{key} ({tuple(found[key].shape)} in the file, {tuple(tensor.shape)} here)'
        for key, tensor in expected.items()
        if key in found and found[key].shape != tensor.shape
    ]
    extra = [key for key in found if key not in expected]
    skipped = [key for key in extra if may_be_skipped(key, expected)]
    unknown = [key for key in extra if key not in skipped]
    problems = [
        f'{len(names)} {what}: {some_of(names)}'
        for what, names in (
            ('missing', missing),
            ('of another shape', misshapen),
            ('unknown', unknown),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f'checkpoint {os.fspath(name)!r} does not fit this '
            f'{type(model).__name__}; of its {len(expected)} tensors and the '
            f'{len(found)} in the file, '
            + '; '.join(problems)
            + _explain_arch(model, found)
        )
    loaded = {key: found[key] for key in expected if key in found}
    message = (
        f'{type(model).__name__}: loaded {len(loaded)} of '
        f'{len(model.state_dict())} tensors from {os.fspath(name)}'
    )
    return loaded, message + (f', skipped {some_of(skipped)}' if skipped else '')


def _is_expected_extra(key: str, expected: Iterable[str]) -> bool:
    """Whether a name is of a head, or of a stage that this model has not built."""
    if key.startswith(HEAD_PREFIXES):
        return True
    parts = key.split('.')
    stage = '.'.join(parts[: 2 if parts[0] == 'stages' else 1]) + '.'
    return key.startswith(BACKBONE_PREFIXES) and not any(
        name.startswith(stage) for name in expected
    )
