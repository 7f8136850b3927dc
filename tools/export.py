#!/usr/bin/env python
"""Export a model to ONNX or torch.export, and compare it with PyTorch before writing.

The file takes pixels and gives results, at any batch and size: of a classifier, a
segmentor (EncoderDecoder), RetinaNet with its post-processing, or the backbone of any
model. It is written only if it differs by no more than 1e-4. See docs/deployment.md.
"""

import argparse
import os.path as osp
import sys

import torch

from convmlp_mm import __version__
from convmlp_mm.apis import build_model, load_weights
from convmlp_mm.checkpoint import describe_checkpoint
from convmlp_mm.export import FORMATS, check_request, export, verify, write
from convmlp_mm.launch import add_cfg_options, one_line_errors, read_model
from convmlp_mm.predict import list_images, read_image
from convmlp_mm.toolkits import default_shape
from convmlp_mm.zoo import published_weights


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('config', help="configuration file, or a name such as 'retinanet_convmlp_s'")
    add('weights', help="file, URL, 'published', or 'none' for random ones (seed 0)")
    add('out', type=osp.expanduser, help='file to write: .onnx, or .pt2 (torch)')
    add('--format', choices=tuple(FORMATS), default='onnx', help='default: onnx')
    add('--part', choices=('model', 'backbone'), default='model', help='default: model')
    text = 'pixels to compare at; default: the size of its tests'
    add('--shape', nargs=2, type=int, metavar=('H', 'W'), help=text)
    add('--images', help='image or folder to compare on; default: three drawn images')
    add('--overwrite', action='store_true', help='replace the file')
    add_cfg_options(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with one_line_errors():
        cfg = read_model(args)
        wanted = (args.part, args.format)
        check_request(cfg, args.out, *wanted, args.overwrite)
        images = args.images and [read_image(path) for path in list_images(args.images)]
        weights = args.weights
        if weights == 'published':
            weights = published_weights(args.config)
        torch.manual_seed(0)
        model = build_model(cfg)
        stated = 'random weights (seed 0)'
        if weights != 'none':
            partial = args.part == 'backbone'
            load_weights(model, weights, partial, skip_heads=partial)
            stated = f'weights: {describe_checkpoint(weights)}'
        notes = dict(config=args.config, weights=stated, version=__version__)
        shape = tuple(args.shape or default_shape(cfg))
        exported = export(model, shape, *wanted, notes)
        verify(exported, model, images)
        write(exported, args.out, args.overwrite)
    print('largest |difference| / max(1, |PyTorch|):')
    for name, value in exported.differences.items():
        print(f'  {name}: {value:.1e}')
    if 'boxes' in exported.graph.outputs and not exported.detections:
        print('nothing was detected: compare on --images of the data', file=sys.stderr)
    print(f'{args.out}: {len(exported.content) / 1e6:.1f} MB, {stated}')


if __name__ == '__main__':
    main()
