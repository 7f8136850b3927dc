#!/usr/bin/env python
"""Predict an image or a folder of images: drawings and results for other programs.

OUT/vis has the drawings, OUT/results.json the results: the five best classes of a
classifier; boxes and run-length encoded masks of a detector as in COCO; and for a
segmentor the pixels of each class, with the label maps in OUT/label_maps (class numbers
from 0). Unreadable images are named and skipped; then the exit code is 1.
"""

import argparse
import json
import os
import os.path as osp
import sys

import cv2
import numpy as np
from mmengine.device import get_device
from mmengine.utils import track_iter_progress

from convmlp_mm import get_inferencer, launch, predict
from convmlp_mm.apis import switch_to_deploy
from convmlp_mm.checkpoint import check_output, write_file
from convmlp_mm.toolkits import toolkit_of
from convmlp_mm.zoo import published_weights


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add, path = parser.add_argument, osp.expanduser
    add('config', help="configuration file, or a name such as 'retinanet_convmlp_s'")
    add('weights', help="checkpoint file or URL, or 'published' for the authors'")
    add('input', type=path, help='image, or folder, with the folders in it')
    add('--out', required=True, type=path, help='folder for what is written')
    add('--device', help="such as 'cuda:1'; by default a GPU if any")
    text = 'lowest score of the detections that are kept (default: %(default)s)'
    add('--score-thr', type=float, default=0.3, help=text)
    add('--overwrite', action='store_true', help='replace files in OUT')
    launch.add_backbone(parser)
    launch.add_cfg_options(parser)
    return parser.parse_args()


def save_image(path: str, pixels: np.ndarray) -> None:
    """Write an image, RGB or one channel, in the format that its name says."""
    os.makedirs(osp.dirname(path), exist_ok=True)
    pixels = pixels[..., ::-1] if pixels.ndim == 3 else pixels
    content = cv2.imencode(osp.splitext(path)[1], pixels)[1]
    write_file(path, content.tobytes(), overwrite=True)


def main() -> int:
    args = parse_args()
    with launch.one_line_errors():
        if not 0 <= args.score_thr <= 1:
            raise ValueError(f'--score-thr must be in [0, 1], got {args.score_thr}')
        images = predict.list_images(args.input, args.out)
        report = osp.join(args.out, 'results.json')
        if osp.isdir(args.out):
            check_output(report, args.overwrite)
        cfg = launch.read_model(args)
        public = args.weights == 'published'
        weights = published_weights(args.config) if public else args.weights
        if (args.device or get_device()) == 'cpu':
            launch.keep_memory()
        inferencer = get_inferencer(cfg, weights, args.device)
        switch_to_deploy(inferencer.model)
        os.makedirs(args.out, exist_ok=True)
    root = args.input if osp.isdir(args.input) else osp.dirname(args.input) or '.'
    names = predict.name_outputs(images, root)
    kind = getattr(predict, toolkit_of(cfg.default_scope).predictor)
    results = kind(inferencer, args.score_thr)
    for path in track_iter_progress(images, file=sys.stderr):
        name, stem = osp.relpath(path, root), names[path]
        try:
            pixels = predict.read_image(path)
            sample = results.predict(path)
            drawing = results.draw(pixels[..., ::-1], sample)
            save_image(osp.join(args.out, 'vis', f'{stem}.jpg'), drawing)
            if cfg.default_scope == 'mmseg':
                # Label maps of more than 256 classes need 16 bits.
                bits = np.min_scalar_type(len(results.classes) - 1)
                labels = predict.labels_of(sample).astype(bits)
                save_image(osp.join(args.out, 'label_maps', f'{stem}.png'), labels)
        except (OSError, ValueError) as error:
            print(f'\nskipped {name}: {error}', file=sys.stderr)
            results.skipped.append(dict(file_name=name, reason=str(error)))
        else:
            results.add(name, pixels.shape[:2], sample, stem)
    info = dict(config=args.config, weights=weights, score_thr=args.score_thr)
    content = json.dumps(results.content(**info), indent=1, allow_nan=False)
    with launch.one_line_errors():
        write_file(report, content, overwrite=True)
    done = f'{len(results.images)} of {len(images)} images'
    print(f'predicted {done}: {report} and {osp.join(args.out, "vis")}')
    return 1 if results.skipped else 0


if __name__ == '__main__':
    sys.exit(main())
