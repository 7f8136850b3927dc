#!/usr/bin/env python
"""Count parameters, multiply-accumulates and activations of configurations.

Models are run on torch's meta device, which has shapes but no values. Parameters are in
millions, multiply-accumulates (MACs) of convolutions and matrix products in 1e9,
activations (elements of their outputs) in millions; CSV has the whole numbers. Nothing
but the table is written to the standard output.
"""

import argparse
import contextlib
import math
import sys
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from convmlp_mm import launch
from convmlp_mm.apis import build_model
from convmlp_mm.launch.tables import FORMATS, format_table
from convmlp_mm.toolkits import default_shape


class Complexity(NamedTuple):
    """Costs of a model for one image of ``shape`` (height, width).

    Auxiliary heads and frozen parameters count, buffers do not. ``activations`` are as
    in "Designing Network Design Spaces" (Sec. 3.1), but of matrix products too.
    """

    name: str
    shape: tuple[int, int]
    params: int
    trainable: int
    macs: int
    activations: int


def measure_complexity(
    cfg: Config, shape: tuple[int, int] | None = None, name: str = 'the model'
) -> Complexity:
    """Count what the toolkit's mode ``'tensor'`` costs, which has no post-processing.

    What cannot be built, or run without values, is a ValueError.
    """
    usual = default_shape(cfg)
    shape = shape or usual
    sizes = dict.fromkeys(('img_shape', 'batch_input_shape'), shape)
    samples = [DetDataSample(metainfo=sizes)]
    flops = FlopCounterMode(display=False)
    # This one counts the outputs of the same operators in place of their work.
    counts = dict.fromkeys(flop_registry, _numel)
    numels = FlopCounterMode(display=False, custom_mapping=counts)
    try:
        model = build_model(cfg).to('meta')
        _give_boxes(model)
        with torch.no_grad(), numels, flops:
            model(torch.zeros(1, 3, *shape, device='meta'), samples, mode='tensor')
    except Exception as error:  # Each model fails in its own way.
        reason = str(error).strip().partition('\n')[0] or type(error).__name__
        raise ValueError(
            f'{name} cannot be counted at {shape[0]} x {shape[1]} pixels (it is tested '
            f'at {usual[0]} x {usual[1]}): {reason}'
        ) from error
    params = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    macs, activations = flops.get_total_flops() // 2, numels.get_total_flops()
    return Complexity(name, shape, params, trainable, macs, activations)


def _give_boxes(model: nn.Module) -> None:
    """Let a two-stage detector propose boxes and cut them out, as shapes only.

    Which boxes an RPN keeps depends on values; as many as it may keep are counted.
    """

    def propose(feats: Sequence[Tensor], *args, **kwargs) -> list[InstanceData]:
        model.rpn_head(feats)
        boxes = feats[0].new_zeros(model.test_cfg.rpn.max_per_img, 4)
        return [InstanceData(bboxes=boxes)]

    def extract(align: nn.Module, feats: object, rois: Tensor, **kwargs) -> Tensor:
        size = align.roi_layers[0].output_size
        return rois.new_zeros(len(rois), align.out_channels, *size)

    if hasattr(model, 'rpn_head'):
        model.rpn_head.predict = propose
    for module in model.modules():
        if hasattr(module, 'roi_layers'):
            module.forward = partial(extract, module)


def _numel(*args: object, out_shape: Sequence = (), **kwargs: object) -> int:
    # Attention has several outputs, of which the first is the result.
    return math.prod(out_shape if isinstance(out_shape[0], int) else out_shape[0])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('models', nargs='+', help='zoo names, files, mmdet::FILE, ..., timm::NAME')
    text = 'height and width in pixels; by default those of the tests'
    add('--shape', nargs=2, type=int, metavar=('H', 'W'), help=text)
    add('--format', choices=FORMATS, default='text')
    launch.add_backbone(parser)
    args = parser.parse_args(argv)
    # What the toolkits print does not belong into the table.
    with launch.one_line_errors(), contextlib.redirect_stdout(sys.stderr):
        # All of them are found before the first is counted.
        found = []
        for name in args.models:
            args.config = name
            found.append((launch.read_model(args), name))
        shape = args.shape and tuple(args.shape)
        costs = [measure_complexity(cfg, shape, name) for cfg, name in found]
    header, rows = ['params (M)', 'MACs (G)', 'activations (M)'], []
    if args.format == 'csv':
        header = ['params', 'MACs', 'activations']
    for cost in costs:
        counts = [cost.params, cost.macs, cost.activations]
        if args.format != 'csv':
            counts = [f'{n / unit:.2f}' for n, unit in zip(counts, (1e6, 1e9, 1e6))]
        rows.append([cost.name, '{}x{}'.format(*cost.shape), *map(str, counts)])
    sys.stdout.write(format_table(['model', 'shape', *header], rows, args.format))


if __name__ == '__main__':
    main()
