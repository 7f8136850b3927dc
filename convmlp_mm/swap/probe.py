"""What the backbone of a configuration hands out, found by building it."""

import copy
import math
from typing import NamedTuple

import torch
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor

# Sides of the image that a backbone is tried with, in pixels: some take one size alone.
SIZES = (256, 224, 384, 512, 640, 1024)
# Settings that change no channels and no strides, but fetch files or need operators
# that do not run without values.
UNWANTED = ('init_cfg', 'pretrained', 'dcn', 'stage_with_dcn', 'with_cp')


class Maps(NamedTuple):
    """Maps of a backbone.

    Attributes:
        channels: Of each map.
        strides: Input pixels to one position of each, rounded to a power of two.
        pooled: Whether they are vectors (N, C) in place of maps.
    """

    channels: list[int]
    strides: list[int]
    pooled: bool = False


def probe(section: dict, scope: str) -> Maps:
    """Build a backbone without weights and look at what it makes of an empty image.

    Raise a ValueError if it cannot be built or run, or gives tokens and no maps.
    """
    settings = {k: v for k, v in section.items() if k not in UNWANTED}
    if settings.get('type', '').endswith('TIMMBackbone'):
        settings['pretrained'] = False
    channels, first = settings.get('in_channels', 3), settings.get('img_size')
    first = first[0] if isinstance(first, (list, tuple)) else first or SIZES[0]
    errors = []
    # Many cannot be built without values, but run without them.
    for built, run in (('meta', 'meta'), ('cpu', 'meta'), ('cpu', 'cpu')):
        try:
            with torch.device(built), DefaultScope.overwrite_default_scope(scope):
                backbone = MODELS.build(copy.deepcopy(settings)).to(run)
        except Exception as error:  # Each backbone fails in its own way.
            errors.append(error)
            continue
        # Some do not return themselves.
        backbone.eval()
        for size in dict.fromkeys((first, *SIZES)):
            image = torch.zeros(1, channels, size, size, device=run)
            try:
                with torch.no_grad():
                    outputs = backbone(image)
            except Exception as error:
                errors.append(error)
            else:
                return _read(outputs, size)
    reason = str(errors[-1]).strip().partition('\n')[0]
    raise ValueError(f'{settings["type"]} cannot be tried: {reason}') from errors[-1]


def _read(outputs: object, size: int) -> Maps:
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    shapes = [x.shape if isinstance(x, Tensor) else () for x in outputs]
    if shapes and all(len(shape) == 2 for shape in shapes):
        return Maps([shape[1] for shape in shapes], [32] * len(shapes), True)
    if not shapes or not all(len(shape) == 4 for shape in shapes):
        raise ValueError('it hands out tokens, not maps')
    strides = [2 ** round(math.log2(size / shape[2])) for shape in shapes]
    return Maps([shape[1] for shape in shapes], strides)
