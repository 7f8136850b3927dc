#!/usr/bin/env python
"""Draw what decides the predictions of several classifiers, image by image.

A column for each image with its ground truth above, a row for each classifier with its
predictions below the maps (paper Appendix A, Figure 5). What is drawn is also written
as arrays, to a file of the same name with the ending .npz. See docs/figures.md.
"""

import argparse

from convmlp_mm.analysis.common import (
    add_model_arguments,
    check_arguments,
    load_models,
)
from convmlp_mm.analysis.images import read_image, save_sheet
from convmlp_mm.analysis.saliency import (
    METHODS,
    collect_arrays,
    draw_saliency,
    find_label,
    map_classifiers,
)
from convmlp_mm.launch import one_line_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('images', nargs='+', help='pictures to look at')
    add_model_arguments(parser)
    parser.add_argument(
        '--labels',
        nargs='+',
        metavar='LABEL',
        help='ground truth of each image: name of a class, or its number from 0',
    )
    parser.add_argument(
        '--method', choices=METHODS, default=METHODS[0], help='default: %(default)s'
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with one_line_errors():
        truths = args.labels or [None] * len(args.images)
        if len(truths) != len(args.images):
            raise ValueError(
                f'--labels must be one for each of the {len(args.images)} images, but '
                f'there are {len(truths)}'
            )
        images = [read_image(path) for path in args.images]
        check_arguments(args)
        models = load_models(args.models, args.weights, args.names, args.seed)
        truths = [truth and find_label(truth, models) for truth in truths]
        size = tuple(args.size or (224, 224))
        rows = map_classifiers(models, images, size, args.method)
    figure = draw_saliency(rows, truths, args.method)
    arrays = collect_arrays(rows, truths, args.method)
    for path in save_sheet(args.out, figure, arrays):
        print(f'wrote {path}')


if __name__ == '__main__':
    main()
