"""Put a ConvMLP in place of the backbone of any algorithm of the toolkits."""

import copy
import sys
from collections.abc import Iterator

import torch
from mmengine.config import Config, ConfigDict

from ..convmlp import ConvMLP
from ..toolkits import toolkit_of
from ..zoo import name_types, published_weights
from .optimizer import carry_over
from .probe import Maps, probe
from .rewire import Report, Wiring, rewire, rewire_composite

# What has no backbone that only hands out maps.
REFUSED = dict(
    DetectoRS_ResNet='its neck feeds maps back into it',
    DetectoRS_ResNeXt='its neck feeds maps back into it',
    TridentResNet='it has the three branches of the algorithm in it',
    DDRNet='it is the algorithm, a network of two branches',
    PIDNet='it is the algorithm, a network of three branches',
    UNet='it is the algorithm, encoder and decoder in one',
    ICNet='it runs the stem and the layers of its ResNet at several sizes',
    VPD='it is a diffusion model with texts',
)
REFUSED |= dict.fromkeys(
    ('DPTHead', 'SETRMLAHead', 'VisionTransformerClsHead', 'DeiTClsHead')
    + ('ConformerHead', 'BEiTV1Head'),
    'it takes tokens, of which a ConvMLP has none',
)
# Backbones of mmseg around another one, which is replaced.
COMPOSITES = ('BiSeNetV1', 'STDCContextPathNet')
# By ``frozen_stages`` of a ResNet or Swin, -1 at the end: the same stride is frozen.
FROZEN = (-1, 0, 1, 2, 4, -1)
# What means the same in other backbones, where it is not the default.
KEPT = dict(in_channels=3, norm_eval=False, with_cp=False)
KEPT['norm_cfg'] = dict(type='BN', requires_grad=True)
# ImageNet's, of red, green and blue, as the published weights have seen images.
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


def swap_backbone(
    cfg: Config,
    arch: str = 's',
    pretrained: bool | str | None = None,
    verbose: bool = True,
) -> Config:
    """Return a configuration with a ConvMLP in place of each backbone.

    Feature points are chosen by stride in detectors, by position in segmentors, whose
    backbones are dilated, and the last one for classifiers. Channels of the first neck,
    or of the heads where there is none, follow; nothing else of the algorithm is
    changed.

    Args:
        cfg: Of any of the toolkits; it is not changed.
        arch: ``'s'``, ``'m'`` or ``'l'``.
        pretrained: Whether the backbone begins with the published weights, or the path
            or URL of others; the images are then normalised as for these. Defaults to
            None: if the old one began with weights.
        verbose: Whether to print what is changed.

    Raises:
        ValueError: If there is no backbone, or one that cannot be replaced; the message
            says why.
    """
    toolkit = toolkit_of(cfg.get('default_scope'))
    toolkit.register()
    with torch.device('meta'):
        backbone = ConvMLP(arch)
    cfg, report, found, loaded = copy.deepcopy(cfg), Report(), [], False
    name_types(cfg)
    for name, section in _walk(cfg.model, 'model'):
        kind = str(section.get('type')).rpartition('.')[2]
        if kind in REFUSED:
            raise ValueError(f'{kind} cannot be replaced: {REFUSED[kind]}')
        if not any(part.endswith('backbone') for part in name.split('.')):
            found += [(section, key, name) for key in _backbone_keys(section)]
    if not found:
        raise ValueError(f'{cfg.model.get("type")} has no backbone to replace')
    for owner, key, name in found:
        given = _has_weights(owner, key) if pretrained is None else pretrained
        if given is True:
            given = published_weights(f'convmlp_{arch}_imagenet')
        init = dict(init_cfg=dict(type='Pretrained', checkpoint=given)) if given else {}
        loaded = loaded or bool(given)
        report.name = f'{name}.'.partition('.')[2]
        new = ConfigDict(type='ConvMLP', arch=arch, **init)
        _swap(owner, key, toolkit.scope, new, backbone.feature_points, report)
    for section, key in ((cfg, 'load_from'), (cfg.model, 'pretrained')):
        if section.get(key):
            report.append(f'{key} is left out: {section[key]}')
            section[key] = None
    if loaded:
        _normalise(cfg, report)
    carry_over(cfg, backbone, report)
    imports = cfg.get('custom_imports') or {}
    names = imports.get('imports') or []
    names = [names] if isinstance(names, str) else [*names]
    cfg.custom_imports = {**imports, 'imports': [*names, 'convmlp_mm']}
    if verbose:
        print(*(f'--backbone: {line}' for line in report), sep='\n', file=sys.stderr)
    return cfg


def _walk(section: object, name: str) -> Iterator[tuple[str, dict]]:
    """Find all sections of a configuration, with their dotted names."""
    if isinstance(section, dict):
        yield name, section
        for key, part in section.items():
            yield from _walk(part, f'{name}.{key}')
    elif isinstance(section, (list, tuple)):
        for i, part in enumerate(section):
            yield from _walk(part, f'{name}.{i}')


def _backbone_keys(section: dict) -> Iterator[str]:
    for key, value in section.items():
        is_built = isinstance(value, dict) and 'type' in value
        if key.endswith('backbone') and is_built or key == 'image_encoder':
            yield key


def _has_weights(owner: dict, key: str) -> bool:
    section = owner[key] if isinstance(owner[key], dict) else owner[key][0]
    section = section.get('backbone_cfg', section)
    given = section.get('init_cfg') or []
    given = [given] if isinstance(given, dict) else given
    named = section.get('pretrained') or owner.get('pretrained')
    named = named or any(cfg.get('type') == 'Pretrained' for cfg in given)
    # The published weights are for three.
    return bool(named) and section.get('in_channels', 3) == 3


def _swap(
    owner: dict, key: str, scope: str, new: ConfigDict, points: tuple, report: Report
) -> None:
    whole, prefix = owner[key], key.removesuffix('image_encoder')
    prefix = prefix.removesuffix('backbone')
    old = whole if isinstance(whole, dict) else whole[0]
    kind = str(old['type']).rpartition('.')[2]
    part = old['backbone_cfg'] if kind in COMPOSITES else old
    try:
        maps = probe(part, scope)
        places = _choose(maps, scope, part)
    except ValueError as error:
        raise ValueError(f'{kind} cannot be replaced: {error}') from error
    chosen = sorted(set(places))
    channels = [points[i].channels for i in chosen]
    kept = {k: part[k] for k, usual in KEPT.items() if part.get(k, usual) != usual}
    if kept.get('norm_cfg', {}).get('type') not in (None, 'BN', 'SyncBN'):
        del kept['norm_cfg']
    if (frozen := FROZEN[min(part.get('frozen_stages', -1), 4)]) >= 0:
        kept['frozen_stages'] = frozen
    new.update(out_indices=chosen, **kept)
    theirs = ', '.join(f'{c} at {s}' for c, s in zip(maps.channels, maps.strides))
    ours = ', '.join(f'{points[i].channels} at {points[i].stride}' for i in chosen)
    kept = ''.join(f', {name} {value}' for name, value in kept.items())
    report.append(
        f'{report.name}{key}: {part["type"]} ({theirs} pixels) -> '
        f'ConvMLP-{new.arch.upper()} ({ours}){kept}'
    )
    if part is not old:
        old['backbone_cfg'] = new
        rewire_composite(owner, old, channels, report)
        return
    index = [chosen.index(i) for i in places]
    wiring = Wiring(maps.channels, [channels[i] for i in index], index)
    used = rewire(owner, prefix, wiring, scope, report)
    new.out_indices = chosen[:used] if used < len(places) else chosen
    if scope == 'mmpretrain' and chosen[-1] == 3:
        new.final_norm = True
    if maps.pooled and 'in_channels' not in (owner.get('head') or {}):
        raise ValueError(f'{kind} cannot be replaced: it classifies by itself')
    if maps.pooled:
        neck = owner.get(f'{prefix}neck') or ConfigDict(type='GlobalAveragePooling')
        report.put(owner, f'{prefix}neck', neck)
    owner[key] = new if whole is old else [new, *whole[1:]]


def _choose(maps: Maps, scope: str, section: dict) -> list[int]:
    """Choose a feature point for each map of the old backbone."""
    strides = maps.strides
    if scope == 'mmdet':
        far = [s for s in strides if s not in (4, 8, 16, 32)]
        if far:
            raise ValueError(f'it hands out a map of stride {far[0]}, not 4, 8, 16, 32')
        if len(set(strides)) < len(strides):
            raise ValueError(f'it hands out several maps of one stride: {strides}')
    elif len(strides) == 4:
        return [0, 1, 2, 3]
    elif scope == 'mmseg' and 'ResNe' in section['type'] and 'out_indices' in section:
        return list(section['out_indices'])
    elif scope == 'mmpretrain' and len(strides) == 1:
        return [3]
    return [min(range(4), key=lambda i: abs(4 * 2**i / s - 1)) for s in strides]


def _normalise(cfg: Config, report: Report) -> None:
    """Let the images come as the published weights have seen them."""
    rgb = 'to_rgb' if cfg.default_scope == 'mmpretrain' else 'bgr_to_rgb'
    wanted = {'mean': MEAN, 'std': STD, rgb: True}
    for owner in (cfg, cfg.model, cfg.model.get('detector') or {}):
        given = owner.get('data_preprocessor')
        if isinstance(given, dict) and {**given, **wanted} != given:
            given.update(wanted)
            report.append('data_preprocessor: mean and std as of the weights')
