#!/usr/bin/env python
"""Draw the feature maps of several backbones for one image, stage by stage.

A row for each model, a column for each stage (paper Sec. 4.7, Figure 4). What is drawn
is also written as arrays, to a file of the same name with the ending .npz.
docs/figures.md describes both.
"""

import argparse

from convmlp_mm.analysis.common import (
    add_model_arguments,
    check_arguments,
    load_models,
)
from convmlp_mm.analysis.feature_maps import (
    collect_arrays,
    map_models,
)
from convmlp_mm.analysis.images import read_image, save_sheet
from convmlp_mm.analysis.montage import draw_feature_maps
from convmlp_mm.launch import one_line_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('image', help='picture to look at')
    add_model_arguments(parser)
    parser.add_argument(
        '--channels', type=int, default=9, help='to show of each stage, default 9'
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with one_line_errors():
        if not 1 <= args.channels <= 64:
            raise ValueError(
                f'--channels must be from 1 to 64, but got {args.channels}'
            )
        image = read_image(args.image)
        check_arguments(args)
        models = load_models(
            args.models, args.weights, args.names, args.seed, need_head=False
        )
        size = tuple(args.size or (224, 224))
        rows = map_models(models, image, size, args.channels)
    figure = draw_feature_maps(rows, args.channels)
    for path in save_sheet(args.out, figure, collect_arrays(rows)):
        print(f'wrote {path}')


if __name__ == '__main__':
    main()
