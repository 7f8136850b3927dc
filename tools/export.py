#!/usr/bin/env python
"""Export a model to ONNX or torch.export, and compare it with PyTorch before writing.

The graph takes pixels and gives results, at any batch and size: a classifier, a
segmentor (EncoderDecoder), RetinaNet with its post-processing, or the backbone of any
model. It is run in onnxruntime (or in torch) on the CPU; the file is written only if no
number differs by more than 1e-4. See docs/deployment.md.
"""

import argparse
import os.path as osp
import sys

from convmlp_mm import __version__
from convmlp_mm.analysis.common import find_weights, load_models
from convmlp_mm.analysis.complexity import default_shape
from convmlp_mm.analysis.images import read_image
from convmlp_mm.analysis.output import format_table
from convmlp_mm.config_files import find_config
from convmlp_mm.export import (
    FORMATS,
    OPSETS,
    PARTS,
    TOLERANCE,
    ExportReport,
    check_request,
    export_model,
)
from convmlp_mm.launch import add_cfg_options, merge_options, one_line_errors
from convmlp_mm.predict import list_images


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'config', help="configuration file, or a name such as 'retinanet_convmlp_s'"
    )
    parser.add_argument(
        'weights',
        help="checkpoint file or URL, 'published' for the authors', or 'none' for "
        'random ones (seed 0)',
    )
    parser.add_argument(
        'out',
        type=osp.expanduser,
        help='file to write: .onnx, or .pt2 of --format torch',
    )
    parser.add_argument('--format', choices=tuple(FORMATS), default='onnx')
    parser.add_argument(
        '--part', choices=PARTS, default='model', help='default: %(default)s'
    )
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        metavar=('H', 'W'),
        help='pixels at which it is compared and timed; by default those that the '
        'configuration is tested at (detectors: 800 1280). The file takes others too',
    )
    parser.add_argument(
        '--batch-size',
        type=int,
        default=1,
        help='pictures at once in the comparison and the timing; likewise '
        '(default: %(default)s)',
    )
    parser.add_argument(
        '--images',
        help='image, or folder, with the folders in it, all of which are compared; by '
        'default three that are drawn',
    )
    parser.add_argument(
        '--opset',
        type=int,
        choices=tuple(OPSETS),
        default=OPSETS[-1],
        help='version of the ONNX operators (default: %(default)s)',
    )
    parser.add_argument('--overwrite', action='store_true', help='replace the file')
    add_cfg_options(parser)
    return parser.parse_args()


def format_report(report: ExportReport, form: str) -> str:
    """Say in two tables what was compared and timed."""
    differences = [
        [name, str(batch), f'{height}x{width}', f'{value:.1e}']
        for (batch, height, width), result in report.differences
        for name, value in result.items()
    ]
    engine = 'onnxruntime' if form == 'onnx' else 'torch.export'
    times = [
        [name, f'{1000 * seconds:.1f}', f'{report.seconds[0] / seconds:.2f}']
        for name, seconds in zip(('PyTorch', engine), report.seconds)
    ]
    return '\n'.join(
        [
            format_table(
                ['output', 'batch', 'pixels', 'difference'], differences, left=(0, 2)
            ),
            format_table(['engine', 'ms per batch', 'speed-up'], times),
        ]
    )


def main() -> int:
    args = parse_args()
    with one_line_errors():
        cfg = find_config(args.config)
        merge_options(cfg, args.cfg_options or {})
        target = (args.out, args.part, args.format, args.opset, args.overwrite)
        check_request(cfg, *target)
        shape = tuple(args.shape or default_shape(cfg))
        images = None
        if args.images:
            images = [read_image(path) for path in list_images(args.images)]
        weights = find_weights(args.config, args.weights)
        (stated,) = load_models(
            [cfg], [weights], [args.config], need_head=args.part == 'model'
        )
        report = export_model(
            stated.model,
            args.out,
            shape,
            part=args.part,
            form=args.format,
            batch_size=args.batch_size,
            images=images,
            opset=args.opset,
            overwrite=args.overwrite,
            notes=dict(config=args.config, weights=stated.weights, version=__version__),
        )
    print(format_report(report, args.format))
    compared = f'{report.compared} images'
    if report.detections is not None:
        compared += f' with {report.detections} detections'
        if report.rounded:
            compared += f' ({report.rounded} chosen otherwise among equal scores)'
    print(
        f'{args.out}: {report.size / 1e6:.1f} MB, {stated.weights}; {compared} agree '
        f'within {TOLERANCE:g} (|difference| / max(1, |PyTorch|)); {report.threads} '
        f'thread{"s" * (report.threads > 1)}'
    )
    if report.detections == 0:
        print(
            'no detections: nothing but empty lists was compared; name images of the '
            'data set with --images',
            file=sys.stderr,
        )
    return 0


if __name__ == '__main__':
    sys.exit(main())
