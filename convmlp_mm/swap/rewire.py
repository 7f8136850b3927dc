"""Give what follows a backbone the channels of another: necks, heads, composites."""

from collections.abc import Iterator
from typing import NamedTuple


class Wiring(NamedTuple):
    """What stands where the maps of a backbone have stood, in their order.

    Attributes:
        old: Channels of each old map.
        new: Channels of what takes its place.
        index: Which of the new maps that is; one may take several places.
    """

    old: list[int]
    new: list[int]
    index: list[int]


class Report(list):
    """Lines that say what was changed, in sections that begin with ``name``."""

    name = ''

    def put(self, section: dict, key: str, value: object, name: str = '') -> None:
        """Set a value, and note it if it is another."""
        before = section.get(key)
        if before != value:
            section[key] = value
            name = f'{name}.' if name else ''
            self.append(f'{self.name}{name}{key}: {before} -> {value}')


def rewire(owner: dict, prefix: str, wiring: Wiring, scope: str, report: Report) -> int:
    """Rewire the neck of the section that has a backbone, or its heads if it has none.

    ``prefix`` stands before ``backbone`` in its key, as ``teacher_``. Return how many
    of the old maps are used, from the first on.
    """
    necks = owner.get(f'{prefix}neck')
    neck = necks[0] if isinstance(necks, (list, tuple)) else necks
    kind = (neck or {}).get('type')
    if kind == 'Feature2Pyramid':
        # A ConvMLP hands out the pyramid that it makes of equal maps.
        report.append(f'{prefix}neck: {kind} is left out')
        owner[f'{prefix}neck'] = neck = None
    name = f'{prefix}neck'
    used = neck and _rewire_neck(neck, wiring, name, report)
    if used:
        if kind == 'SSDNeck':
            count = len(neck['in_channels'])
            outs = tuple(neck['in_channels']) + tuple(neck['out_channels'][count:])
            report.put(neck, 'out_channels', outs, name)
            report.put(owner['bbox_head'], 'in_channels', outs, 'bbox_head')
        elif kind == 'JPU':
            # All maps but the last go through it as they are.
            last = len(wiring.old) - 1
            fused = 4 * neck.get('mid_channels', 512)
            old, new = ([*maps[:last], fused] for maps in (wiring.old, wiring.new))
            passed = Wiring(old, new, wiring.index)
            _rewire_heads(owner, prefix, passed, scope, report)
        elif kind == 'MultiLevelNeck':
            # It makes a pyramid of maps of one size.
            report.put(neck, 'scales', [1] * len(neck['in_channels']), name)
        return used
    _rewire_heads(owner, prefix, wiring, scope, report)
    return len(wiring.old)


def _rewire_neck(neck: dict, wiring: Wiring, name: str, report: Report) -> int:
    """Rewire a neck; return how many of the maps it takes, 0 if it has no channels."""
    number = len(wiring.old)
    for key in ('in_channels', 'in_channel'):
        given = neck.get(key)
        if given is None:
            continue
        if isinstance(given, int):
            if given != wiring.old[-1]:
                return 0
            report.put(neck, key, wiring.new[-1], name)
            return number
        count, values = len(given), list(given)
        maps, ours = wiring.old, wiring.new
        # YOLOv3 begins with the smallest map.
        for old, new, used in (
            (maps[-count:], ours[-count:], number),
            (maps[:count], ours[:count], count),
            (maps[::-1][:count], ours[::-1][:count], number),
        ):
            if old == values:
                report.put(neck, key, type(given)(new), name)
                return used
        raise ValueError(
            f'{name}.{key} is {values}, but the old backbone gives {wiring.old}'
        )
    return 0


def _rewire_heads(
    owner: dict, prefix: str, wiring: Wiring, scope: str, report: Report
) -> None:
    for key, section in owner.items():
        ours = key.startswith(prefix) and key.endswith('head')
        if not ours or (not prefix and key.startswith('teacher_')):
            continue
        for name, head in _named(section, key):
            if scope == 'mmseg':
                for where, part in _with_index(head, name):
                    _rewire_by_index(part, wiring, where, report)
            else:
                _rewire_last(head, wiring, name, report)
    heads = owner.get('decode_head')
    if isinstance(heads, (list, tuple)) and heads[-1]['type'] == 'OCRHead':
        # Dilated maps have one size; these do not, and its regions are of the last.
        for key in ('in_index', 'in_channels'):
            report.put(heads[0], key, heads[-1][key], 'decode_head.0')


def _named(section: object, name: str) -> Iterator[tuple[str, dict]]:
    several = section if isinstance(section, (list, tuple)) else [section]
    for i, part in enumerate(several):
        if isinstance(part, dict):
            yield (f'{name}.{i}' if several is section else name), part


def _with_index(head: dict, name: str) -> Iterator[tuple[str, dict]]:
    """Find a head and the heads in it that choose maps themselves."""
    yield name, head
    for key, value in head.items():
        for where, part in _named(value, f'{name}.{key}'):
            if 'in_index' in part:
                yield from _with_index(part, where)


def _rewire_by_index(head: dict, wiring: Wiring, name: str, report: Report) -> None:
    """Rewire a head of mmseg, which names its maps by ``in_index``."""
    given, number = head.get('in_channels'), len(wiring.old)
    if given is None:
        return
    several = isinstance(given, (list, tuple))
    chosen = head.get('in_index', [*range(number)] if several else -1)
    if several:
        places = [i % number for i in chosen]
        if [wiring.old[i] for i in places] != list(given):
            return
        channels = type(given)(wiring.new[i] for i in places)
        index = type(chosen)(wiring.index[i] for i in places)
    else:
        place = (chosen[0] if isinstance(chosen, (list, tuple)) else chosen) % number
        if wiring.old[place] != given:
            return
        channels, index = wiring.new[place], wiring.index[place]
    if 'in_index' in head or not several and index != max(wiring.index):
        report.put(head, 'in_index', index, name)
    report.put(head, 'in_channels', channels, name)
    if head.get('c1_in_channels'):
        report.put(head, 'c1_in_channels', wiring.new[0], name)
    if head.get('type') == 'FCNHead' and head.get('num_convs') == 0:
        # What it classifies are the maps themselves.
        report.put(head, 'channels', channels, name)


def _rewire_last(head: dict, wiring: Wiring, name: str, report: Report) -> None:
    """Rewire a head of mmdet or mmpretrain that has the maps of the backbone."""
    last, every, given = wiring.old[-1], wiring.new, head.get('in_channels')
    if given == last:
        report.put(head, 'in_channels', every[-1], name)
    elif isinstance(given, (list, tuple)) and list(given) == wiring.old:
        report.put(head, 'in_channels', type(given)(every), name)
    # An RoI head hands on what it cuts out of the last map.
    for key, part in head.items():
        end = 'out_channels' if key.endswith('roi_extractor') else 'in_channels'
        if isinstance(part, dict) and part.get(end) == last and 'loss' not in key:
            report.put(part, end, every[-1], f'{name}.{key}')
    if head.get('shared_head'):
        _without_shared_head(head, every[-1], name, report)


def _without_shared_head(head: dict, channels: int, name: str, report: Report) -> None:
    """Take the last stage of a ResNet out of the RoI head of a C4 detector."""
    head['shared_head'] = None
    report.append(f'{name}.shared_head: the last stage of the ResNet is left out')
    for key in ('bbox', 'mask'):
        part, extractor = head.get(f'{key}_head'), head.get(f'{key}_roi_extractor')
        if part:
            report.put(part, 'in_channels', channels, f'{name}.{key}_head')
        if extractor:
            # It has halved the regions.
            size = extractor['roi_layer']['output_size'] // 2
            where = f'{name}.{key}_roi_extractor.roi_layer'
            report.put(extractor['roi_layer'], 'output_size', size, where)


def rewire_composite(owner: dict, section: dict, new: list[int], report: Report):
    """Rewire the backbone of a segmentor around the ``backbone_cfg`` in it.

    ``new`` are channels of the maps of stride 8, 16 and 32, after those of 4 if any.
    """
    heads = [
        (name, head)
        for key in ('decode_head', 'auxiliary_head')
        for name, head in _named(owner.get(key), key)
    ]
    if section['type'] == 'BiSeNetV1':
        old, context = section['context_channels'][0], tuple(new[-3:])
        # What is fused has as many channels as the map of stride 16.
        spatial = (*section['spatial_channels'][:3], context[1] - context[0])
        report.put(section, 'context_channels', context, 'backbone')
        report.put(section, 'spatial_channels', spatial, 'backbone')
        changed = {1: (old, context[0]), 2: (old, context[0])}
    else:
        fused = section['ffm_cfg']['in_channels'] - section.get('out_channels', 128)
        inner = new[0] + section.get('out_channels', 128)
        report.put(section, 'last_in_channels', (new[-1], new[-2]), 'backbone')
        report.put(section['ffm_cfg'], 'in_channels', inner, 'backbone.ffm_cfg')
        changed = {0: (fused, new[0])}
    for name, head in heads:
        old, value = changed.get(head.get('in_index', -1), (None, None))
        if head['in_channels'] == old:
            report.put(head, 'in_channels', value, name)
