#!/usr/bin/env python
"""Draw ground truth and detections side by side on one sheet.

The input is what ``tools/test.py --out`` has dumped, so that nothing is computed
twice and what is drawn is what was evaluated.
"""

import argparse
import math
import os.path as osp

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import mmcv
import mmengine
import numpy as np

from convmlp_mm.cli import one_line_errors

PANEL_INCHES = 2.6


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        'predictions', type=osp.expanduser, help='file written by tools/test.py --out'
    )
    parser.add_argument(
        'annotations', type=osp.expanduser, help='COCO annotation file, for class names'
    )
    parser.add_argument('out', type=osp.expanduser, help='picture to write, .png')
    parser.add_argument('--num', type=int, default=6, help='pictures to show')
    parser.add_argument('--score-thr', type=float, default=0.4)
    parser.add_argument('--title', default='')
    return parser.parse_args()


def class_names(annotations: str) -> list[str]:
    """Names by label: mmdet numbers the categories in the order of the file."""
    return [c['name'] for c in mmengine.load(annotations)['categories']]


def draw(axes, image: np.ndarray, boxes, labels, texts) -> None:
    """Draw boxes (N, 4) as x1, y1, x2, y2 in pixels of the image."""
    axes.imshow(image, interpolation='bilinear')
    axes.set_axis_off()
    colours = plt.get_cmap('tab10').colors
    for box, label, text in zip(boxes, labels, texts):
        x1, y1, x2, y2 = box
        colour = colours[label % len(colours)]
        axes.add_patch(
            plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colour, lw=1.6)
        )
        axes.text(
            x1,
            max(y1, 0),
            text,
            fontsize=6,
            color='white',
            # Above the box, but for boxes at the upper edge.
            va='bottom' if y1 > 0.06 * image.shape[0] else 'top',
            bbox=dict(facecolor=colour, edgecolor='none', pad=0.8),
        )


def draw_sheet(samples: list[dict], names: list[str], score_thr: float, title: str):
    """Draw pairs of ground truth and detections, two pairs in a row.

    Args:
        samples (list[dict]): Dumped data samples of mmdet.
        names (list[str]): Class names by label.
        score_thr (float): Lowest score to draw.
        title (str): Stands above the sheet.

    Returns:
        matplotlib.figure.Figure: The sheet.
    """
    rows = math.ceil(len(samples) / 2)
    figure, grid = plt.subplots(
        rows,
        4,
        figsize=(4 * PANEL_INCHES, rows * PANEL_INCHES + 0.4),
        squeeze=False,
        layout='constrained',
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for i, sample in enumerate(samples):
        left, right = grid[i // 2, 2 * (i % 2) : 2 * (i % 2) + 2]
        image = mmcv.imread(sample['img_path'], channel_order='rgb')
        truth, found = sample['gt_instances'], sample['pred_instances']
        # mmdet's test pipelines load it after resizing: both are in pixels of the file.
        labels = truth['labels'].tolist()
        draw(
            left,
            image,
            truth['bboxes'].numpy(),
            labels,
            [names[label] for label in labels],
        )
        keep = found['scores'] >= score_thr
        labels = found['labels'][keep].tolist()
        texts = [
            f'{names[label]} {score:.2f}'
            for label, score in zip(labels, found['scores'][keep].tolist())
        ]
        draw(right, image, found['bboxes'][keep].numpy(), labels, texts)
        left.set_title('ground truth', fontsize=8)
        right.set_title(f'detections, score >= {score_thr}', fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure


def main() -> None:
    args = parse_args()
    with one_line_errors():
        if args.num < 1:
            raise ValueError(f'--num must be at least 1, but got {args.num}')
        for path in (args.predictions, args.annotations):
            if not osp.isfile(path):
                raise FileNotFoundError(f'file {path!r} does not exist')
    # Spread over the set rather than its first pictures.
    samples = mmengine.load(args.predictions)
    index = np.linspace(0, len(samples) - 1, min(args.num, len(samples))).astype(int)
    names = class_names(args.annotations)
    figure = draw_sheet([samples[i] for i in index], names, args.score_thr, args.title)
    figure.savefig(args.out, dpi=120)
    print(f'wrote {args.out}')


if __name__ == '__main__':
    main()
