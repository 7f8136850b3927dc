#!/usr/bin/env python
"""Draw ground truth and detections side by side on one sheet.

The input is what mmdet's CocoMetric has written in its evaluation, so that nothing is
computed twice and what is drawn is what was evaluated::

    tools/test.py ... --cfg-options test_evaluator.outfile_prefix=out/predictions
"""

import argparse
import os.path as osp

import mmcv
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mmengine.fileio import load
from pycocotools.coco import COCO

from convmlp_mm.launch import one_line_errors

PANEL_INCHES = 2.6


def draw(axes: Axes, image: np.ndarray, records: list[dict], names: dict) -> None:
    """Draw COCO's boxes, which are x, y, width and height in pixels of the image."""
    axes.imshow(image, interpolation='bilinear')
    for record in records:
        x, y, width, height = record['bbox']
        label = record['category_id']
        colour = f'C{list(names).index(label) % 10}'
        score = f' {record["score"]:.2f}' if 'score' in record else ''
        axes.add_patch(Rectangle((x, y), width, height, fill=False, ec=colour, lw=1.6))
        # Above the box, but for boxes at the upper edge.
        place = 'bottom' if y > 0.06 * image.shape[0] else 'top'
        box = dict(facecolor=colour, edgecolor='none', pad=0.8)
        text = dict(fontsize=6, color='white', va=place, bbox=box)
        axes.text(x, max(y, 0), names[label] + score, **text)


def draw_sheet(truth: COCO, found: COCO, args: argparse.Namespace) -> Figure:
    """Draw pairs of ground truth and detections, two pairs in a row."""
    names = {c['id']: c['name'] for c in truth.dataset['categories']}
    ids = sorted(truth.imgs)
    # Spread over the set rather than its first images.
    index = np.linspace(0, len(ids) - 1, min(args.num, len(ids))).astype(int)
    rows = -(-len(index) // 2)
    size = 4 * PANEL_INCHES, rows * PANEL_INCHES + 0.4
    figure = Figure(figsize=size, layout='constrained')
    grid = figure.subplots(rows, 4, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for i, (left, right) in zip(index, grid.reshape(-1, 2)):
        path = osp.join(args.images, truth.imgs[ids[i]]['file_name'])
        image = mmcv.imread(path, channel_order='rgb')
        boxes = [b for b in found.imgToAnns[ids[i]] if b['score'] >= args.score_thr]
        draw(left, image, truth.imgToAnns[ids[i]], names)
        draw(right, image, boxes, names)
        left.set_title('ground truth', fontsize=8)
        right.set_title(f'detections, score >= {args.score_thr}', fontsize=8)
    figure.suptitle(args.title, fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, path = parser.add_argument, osp.expanduser
    add('predictions', type=path, help='.bbox.json of CocoMetric')
    add('annotations', type=path, help='COCO file of the same images')
    add('images', type=path, help='folder of the images')
    add('out', type=path, help='sheet to write, .png')
    add('--num', type=int, default=6, help='images to show, from 1 on')
    add('--score-thr', type=float, default=0.4)
    add('--title', default='')
    args = parser.parse_args()
    with one_line_errors():
        if args.num < 1:
            raise ValueError(f'--num must be at least 1, but got {args.num}')
        records, truth = load(args.predictions), COCO(args.annotations)
        # pycocotools fails where nothing was found.
        found = truth.loadRes(records) if records else COCO()
        figure = draw_sheet(truth, found, args)
    figure.savefig(args.out, dpi=120)
    print(f'wrote {args.out}')


if __name__ == '__main__':
    main()
