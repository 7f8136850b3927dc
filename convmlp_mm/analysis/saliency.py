"""Saliency maps of classifiers side by side (paper Appendix A, Figure 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from .common import StatedModel
from .images import fit_image, fixed_size, preprocess

__all__ = [
    'METHODS',
    'Saliency',
    'class_names',
    'collect_arrays',
    'compute_saliency',
    'draw_saliency',
    'find_label',
    'map_classifiers',
]

METHODS = ('saliency', 'smoothgrad', 'integrated_gradients')
RULE = (
    'Method: {}, for the class that is predicted; largest magnitude over the colours, '
    'each map scaled from 0 to its own 99th percentile.'
)
PANEL, LABEL = 1.9, 1.6  # inches
RIGHT, WRONG, UNKNOWN = '#1a7f37', '#c00000', '#303030'


@dataclass
class Saliency:
    """What decides the prediction of one classifier for one image.

    Attributes:
        source (StatedModel): The classifier and the statement of its weights.
        image (ndarray): What it saw, (H, W, 3), uint8, red first.
        values (ndarray): Saliency of each pixel, (H, W), float32, from 0.
        label (int): The predicted class.
        name (str): Its name, or its number if it has none.
        score (float): Its probability.
    """

    source: StatedModel
    image: np.ndarray
    values: np.ndarray
    label: int
    name: str
    score: float


def class_names(model: nn.Module) -> list[str]:
    """Return the names of a classifier's classes, the first of its synonyms each.

    Args:
        model (nn.Module): With ``dataset_meta``.

    Returns:
        list[str]: Empty if they are not known.
    """
    classes = (model.dataset_meta or {}).get('classes') or ()
    return [str(name).partition(',')[0] for name in classes]


def find_label(label: str, sources: Sequence[StatedModel]) -> str:
    """Check that a ground truth is a class of each classifier.

    Args:
        label (str): Name, or number from 0.
        sources (Sequence[StatedModel]): The classifiers.

    Returns:
        str: The name, or the number where names are not known.

    Raises:
        ValueError: If a classifier has no such class.
    """
    found = label
    for source in sources:
        names = class_names(source.model)
        if label.isdigit() and int(label) < len(names):
            found = names[int(label)]
        elif names and label.lower() not in map(str.lower, names):
            raise ValueError(
                f'--labels: {source.name} has no class {label!r}; it has {len(names)} '
                f'classes: {", ".join(names[:10])}' + ', ...' * (len(names) > 10)
            )
    return found


def compute_saliency(
    model: nn.Module, inputs: Tensor, method: str = 'saliency'
) -> tuple[Tensor, Tensor]:
    """Attribute the score of the predicted class to the pixels, with captum.

    Args:
        model (nn.Module): Classifier of mmpretrain in evaluation mode.
        inputs (Tensor): One normalised image, (1, 3, H, W).
        method (str): ``'saliency'``, the gradient of the score before the
            softmax (Simonyan et al., 2014); ``'smoothgrad'``, its mean over 16
            copies with noise of a tenth of the range; or
            ``'integrated_gradients'`` from the mean colour in 32 steps.
            Defaults to ``'saliency'``.

    Returns:
        tuple[Tensor, Tensor]: Saliency (H, W), and scores (classes,).

    Raises:
        ValueError: If there is no such method.
    """
    if method not in METHODS:
        raise ValueError(f'method must be one of {METHODS}, but got {method!r}')
    from captum import attr

    def score(x: Tensor) -> Tensor:
        if hasattr(model, 'head') and hasattr(model, 'extract_feat'):
            # What mmpretrain's classifiers give without it are features.
            return model.head(model.extract_feat(x))
        return model(x)

    with torch.no_grad():
        scores = score(inputs)[0]
    target = int(scores.argmax())
    if method == 'saliency':
        found = attr.Saliency(score).attribute(inputs.clone(), target)
    elif method == 'smoothgrad':
        # Noise from a seed: the same picture each time.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found = attr.NoiseTunnel(attr.Saliency(score)).attribute(
                inputs.clone(),
                nt_type='smoothgrad',
                nt_samples=16,
                nt_samples_batch_size=1,
                stdevs=0.1 * float(inputs.max() - inputs.min()),
                target=target,
            )
    else:
        found = attr.IntegratedGradients(score).attribute(
            inputs, target=target, n_steps=32, internal_batch_size=1
        )
    return found.detach()[0].abs().amax(0), scores


def map_classifiers(
    sources: Sequence[StatedModel],
    images: Sequence[np.ndarray],
    size: tuple[int, int] = (224, 224),
    method: str = 'saliency',
) -> list[list[Saliency]]:
    """Compute the saliency maps of several classifiers for several images.

    Args:
        sources (Sequence[StatedModel]): See
            :func:`~convmlp_mm.analysis.common.load_models`.
        images (Sequence[ndarray]): Each (H, W, 3), uint8, blue first.
        size (tuple[int, int]): Height and width that they see, in pixels; a
            classifier that takes one size only keeps its own. Defaults to
            (224, 224).
        method (str): See :func:`compute_saliency`. Defaults to ``'saliency'``.

    Returns:
        list[list[Saliency]]: One list for each classifier.

    Raises:
        ValueError: If a model is no classifier or does not take the size.
    """
    for source in sources:
        if source.model.cfg.default_scope != 'mmpretrain':
            raise ValueError(f'{source.name} is no classifier of mmpretrain or timm')
    rows = []
    for source in sources:
        names = class_names(source.model)
        row = []
        for image in images:
            seen = fit_image(image, fixed_size(source.model) or size)
            inputs = preprocess(source.model, seen)
            try:
                values, scores = compute_saliency(source.model, inputs, method)
            except (AssertionError, RuntimeError) as error:
                raise ValueError(
                    f'{source.name} does not take {seen.shape[0]} x {seen.shape[1]} '
                    f'pixels: {error}'
                ) from error
            label = int(scores.argmax())
            row.append(
                Saliency(
                    source,
                    np.ascontiguousarray(seen[..., ::-1]),
                    values.float().cpu().numpy(),
                    label,
                    names[label] if label < len(names) else f'class {label}',
                    float(scores.softmax(0)[label]),
                )
            )
        rows.append(row)
    return rows


def collect_arrays(
    rows: Sequence[Sequence[Saliency]], truths: Sequence[str | None], method: str
) -> dict[str, np.ndarray]:
    """Lay out what a sheet shows for ``numpy.savez``.

    Args:
        rows (Sequence[Sequence[Saliency]]): One list for each classifier.
        truths (Sequence[str | None]): Ground truth of each image.
        method (str): See :func:`compute_saliency`.

    Returns:
        dict[str, ndarray]: ``models``, ``weights`` (statements), ``truths`` (empty
        if not given), ``method``; for classifier i and image j ``<i>/<j>/saliency``
        (H, W), ``<i>/<j>/image`` (H, W, 3), ``<i>/<j>/prediction`` and
        ``<i>/<j>/score``.
    """
    arrays = dict(
        models=np.array([row[0].source.name for row in rows]),
        weights=np.array([row[0].source.weights for row in rows]),
        truths=np.array([truth or '' for truth in truths]),
        method=np.array(method),
    )
    for i, row in enumerate(rows):
        for j, found in enumerate(row):
            arrays[f'{i}/{j}/saliency'] = found.values
            arrays[f'{i}/{j}/image'] = found.image
            arrays[f'{i}/{j}/prediction'] = np.array(found.name)
            arrays[f'{i}/{j}/score'] = np.array(found.score)
    return arrays


def _colour(name: str, truth: str | None) -> str:
    if truth is None:
        return UNKNOWN
    return RIGHT if name.lower() == truth.lower() else WRONG


def draw_saliency(
    rows: Sequence[Sequence[Saliency]],
    truths: Sequence[str | None],
    method: str = 'saliency',
) -> Figure:
    """Draw the sheet: a column for each image, a row for each classifier.

    Args:
        rows (Sequence[Sequence[Saliency]]): One list for each classifier.
        truths (Sequence[str | None]): Ground truth of each image, which stands
            above it; predictions stand below the maps, green if they are right
            and red if they are wrong.
        method (str): See :func:`compute_saliency`. Defaults to ``'saliency'``.

    Returns:
        Figure: The sheet.
    """
    columns = len(rows[0])
    figure = Figure(
        figsize=(LABEL + columns * PANEL, (len(rows) + 1) * (PANEL + 0.25) + 0.5),
        layout='constrained',
    )
    grid = figure.subplots(
        len(rows) + 1,
        columns + 1,
        squeeze=False,
        width_ratios=[LABEL, *[PANEL] * columns],
    )
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    for axes, found, truth in zip(grid[0, 1:], rows[0], truths):
        axes.imshow(found.image)
        axes.set_title(truth or 'ground truth not given', fontsize=9)
    for axes, row in zip(grid[1:, 0], rows):
        source = row[0].source
        height, width = row[0].image.shape[:2]
        axes.text(0, 0.62, source.name, fontsize=9, weight='bold', va='center')
        # Names of files are long.
        statement = source.weights.replace(' (', '\n(')
        text = f'at {height} x {width}\n{statement}'
        axes.text(0, 0.56, text, fontsize=7, color=source.colour, va='top')
    for line, row in zip(grid[1:, 1:], rows):
        for axes, found, truth in zip(line, row, truths):
            top = max(np.percentile(found.values, 99), np.finfo(np.float32).tiny)
            axes.imshow(found.values, cmap='magma', vmin=0, vmax=top)
            if not found.values.any():
                # As of a head that starts from zeros.
                axes.text(
                    0.5, 0.5, 'zero everywhere', fontsize=8, color='white',
                    ha='center', transform=axes.transAxes,
                )  # fmt: skip
            text = f'{found.name} {found.score:.2f}'
            axes.set_xlabel(text, fontsize=8, color=_colour(found.name, truth))
    figure.supxlabel(RULE.format(method), fontsize=7, wrap=True)
    return figure
