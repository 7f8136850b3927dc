#!/usr/bin/env python
"""Draw what decides the predictions of several classifiers, image by image.

A column for each image with its ground truth above, a row for each classifier with its
predictions below the maps, as in Appendix A and Figure 5 of the paper:
docs/figures.md.
"""

import argparse

import common
import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine.model import BaseModel
from torch import Tensor

from convmlp_mm.launch import one_line_errors
from convmlp_mm.predict import read_image

RULE = (
    'Gradient of the score of the predicted class, before the softmax;\nlargest '
    'magnitude over the colours, each map scaled from 0 to its 99th percentile.'
)


def compute_saliency(model: BaseModel, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradient of the predicted class's score (Simonyan et al., 2014).

    Returns its largest magnitude over the colours (H, W), and the scores before the
    softmax (classes,). ``inputs`` is one normalised image (1, 3, H, W).
    """
    x = inputs.clone().requires_grad_()
    scores = model(x, mode='tensor')[0]
    (gradient,) = torch.autograd.grad(scores.max(), x)
    return gradient[0].abs().amax(0), scores.detach()


def class_names(source: common.StatedModel) -> list[str]:
    """Return the first synonym of each class, nothing if they are not known."""
    classes = source.model.dataset_meta.get('classes') or ()
    return [str(name).partition(',')[0] for name in classes]


def draw(sources: list[common.StatedModel], rows: list, truths: list) -> Figure:
    """Draw the images in the first row, and a row of maps for each classifier."""
    shape = len(rows) + 1, len(truths) + 1
    figure = Figure((1.9 * shape[1], 2.15 * shape[0] + 0.4), layout='constrained')
    bare = dict(xticks=[], yticks=[], frameon=False)
    grid = figure.subplots(*shape, squeeze=False, subplot_kw=bare)
    for axes, (image, _), truth in zip(grid[0, 1:], rows[0], truths):
        axes.imshow(image)
        axes.set_title(truth or 'ground truth not given', fontsize=9)
    for line, source, row in zip(grid[1:], sources, rows):
        common.state(line[0], source, row[0][0])
        names = dict(enumerate(class_names(source)))
        for axes, (_, (values, scores)), truth in zip(line[1:], row, truths):
            top = np.percentile(values, 99)
            axes.imshow(values, cmap='magma', vmin=0, vmax=top or 1)
            if not values.any():
                # A head that starts from zeros has no gradient.
                style = dict(color='white', ha='center', transform=axes.transAxes)
                axes.text(0.5, 0.5, 'zero everywhere', fontsize=8, **style)
            score, label = scores.softmax(0).max(0)
            name = names.get(int(label), f'class {int(label)}')
            verdict = '#1a7f37' if name == truth else '#c00000'
            colour = verdict if truth else '#303030'
            axes.set_xlabel(f'{name} {score:.2f}', fontsize=9, color=colour)
    figure.supxlabel(RULE, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    text = 'images to look at, with the name of their class or without: IMAGE[=CLASS]'
    parser.add_argument('images', nargs='+', metavar='IMAGE', help=text)
    common.add_arguments(parser)
    args = parser.parse_args()
    with one_line_errors():
        # Without a class, all is before the mark.
        paths, _, truths = zip(*(text.partition('=') for text in args.images))
        images = [read_image(path) for path in paths]
        sources = common.load_models(args)
        for source in sources:
            if source.model.cfg.default_scope != 'mmpretrain':
                raise ValueError(f'{source.name} is no classifier')
            names = class_names(source)
            unknown = names and {*truths} - {'', *names}
            if unknown:
                raise ValueError(f'{source.name} has no class {unknown}')
        rows = [
            [common.run(source, image, args.size, compute_saliency) for image in images]
            for source in sources
        ]
    common.save_figure(args.out, draw(sources, rows, truths), args.overwrite, sources)


if __name__ == '__main__':
    main()
