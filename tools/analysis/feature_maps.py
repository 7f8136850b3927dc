#!/usr/bin/env python
"""Draw the feature maps of several backbones for one image, stage by stage.

A row for each model, a column for each stage, as in Sec. 4.7 and Figure 4 of the paper:
docs/figures.md.
"""

import argparse
import re
from functools import partial

import common
import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine.model import BaseModel
from torch import Tensor, nn

from convmlp_mm.launch import one_line_errors
from convmlp_mm.predict import read_image

STAGE = re.compile(r'(stages|layers|blocks)\.\d+|layer\d+')
RULE = (
    'Shown are the {} channels of each stage that vary most over the image (largest '
    'standard deviation first; numbers are channel indices),\neach scaled from its own '
    '1st to 99th percentile. Squares are positions of the map.'
)


def find_stages(backbone: nn.Module) -> list[str]:
    """Name the modules whose outputs are shown; of a row of equal blocks, four."""
    if hasattr(backbone, 'feature_points'):
        return [point.name for point in backbone.feature_points]
    names = [name for name, _ in backbone.named_modules() if STAGE.fullmatch(name)]
    if not names:
        raise ValueError(f'{type(backbone).__name__} has no stages, layers or blocks')
    if len(names) > 5:
        names = [names[i * len(names) // 4 - 1] for i in (1, 2, 3, 4)]
    return names


def as_map(output: object, size: tuple[int, int]) -> Tensor:
    """Bring the output of a stage to (C, h, w), tokens back onto their grid."""
    while isinstance(output, (tuple, list)):
        output = output[0]
    if output.dim() == 4:
        return output[0]
    height = round((output.shape[1] * size[0] / size[1]) ** 0.5)
    width = output.shape[1] // height
    # A class token stands before the others.
    return output[0, -height * width :].T.unflatten(1, (height, width))


def extract_stages(model: BaseModel, inputs: Tensor) -> dict[str, Tensor]:
    """Compute the maps (C, h, w) of each stage for one normalised image."""
    backbone, stages = common.backbone_of(model), {}

    def keep(name: str, module: nn.Module, args: tuple, output: object) -> None:
        # A later layer may work in place.
        stages[name] = as_map(output, inputs.shape[2:]).clone()

    for name in find_stages(backbone):
        backbone.get_submodule(name).register_forward_hook(partial(keep, name))
    with torch.no_grad():
        backbone(inputs)
    return stages


def choose_channels(maps: Tensor, number: int) -> list[int]:
    """Choose the channels with the largest standard deviation, largest first."""
    spread = maps.flatten(1).std(1, correction=0)
    return spread.argsort(descending=True, stable=True)[:number].tolist()


def draw(rows: list[tuple], number: int) -> Figure:
    """Draw rows of a StatedModel, its image and its stages, ``number`` maps of each."""
    columns = 2 + max(len(stages) for _, _, stages in rows)
    side = int(number**0.5)
    # In inches: two lines of title above maps of the image's proportions.
    heights = [0.34 + 2.06 * min(1, im.shape[0] / im.shape[1]) for _, im, _ in rows]
    figure = Figure((2.1 * columns, sum(heights) + 0.4), layout='constrained')
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for axes in grid.flat:
        axes.set_axis_off()
    for line, (source, image, stages) in zip(grid, rows):
        common.state(line[0], source, image)
        line[1].imshow(image)
        line[1].set_title('input', fontsize=8)
        for axes, (name, maps) in zip(line[2:], stages.items()):
            stride = round(image.shape[0] / maps.shape[1])
            text = '{} maps of {} x {}, stride {}'.format(*maps.shape, stride)
            axes.set_title(f'{name}\n{text}', fontsize=8)
            for place, channel in enumerate(choose_channels(maps, number)):
                y, x = divmod(place, side)
                low, high = np.percentile(maps[channel], (1, 99))
                box = (x + 0.01, x + 0.99, y + 0.99, y + 0.01)
                axes.imshow(maps[channel], vmin=low, vmax=high, extent=box)
                box = dict(facecolor='black', alpha=0.55, lw=0, pad=1)
                style = dict(fontsize=6, color='white', va='top', bbox=box)
                axes.text(x + 0.04, y + 0.04, channel, **style)
            aspect = maps.shape[1] / maps.shape[2]
            axes.set(xlim=(0, side), ylim=(side, 0), aspect=aspect)
    figure.supxlabel(RULE.format(number), x=0.01, ha='left', fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('image', help='image to look at')
    common.add_arguments(parser)
    squares = [n * n for n in range(1, 9)]
    parser.add_argument('--channels', type=int, default=9, choices=squares)
    args = parser.parse_args()
    with one_line_errors():
        image = read_image(args.image)
        sources = common.load_models(args, need_head=False)
        rows = [
            (source, *common.run(source, image, args.size, extract_stages))
            for source in sources
        ]
    common.save_figure(args.out, draw(rows, args.channels), args.overwrite, sources)


if __name__ == '__main__':
    main()
