"""What the figures of maps share: stated models, images, files."""

import argparse
import io
import json
import os.path as osp
from collections.abc import Callable, Sequence
from textwrap import wrap
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mmengine.model import BaseModel
from PIL import Image, ImageOps
from torch import nn

from convmlp_mm.apis import get_model, load_weights
from convmlp_mm.checkpoint import check_output, describe_checkpoint, write_file
from convmlp_mm.zoo import published_weights


class StatedModel(NamedTuple):
    """A model in evaluation mode, and what a figure says about its weights."""

    name: str
    model: BaseModel
    weights: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that all figures have."""
    add = parser.add_argument
    add('--out', required=True, type=osp.expanduser, help='figure to write, .png')
    text = (
        'models in the form [TITLE=]NAME[@WEIGHTS]: NAME is of this package, a file, '
        'mmdet:: (...) and a file, or timm:: and a name; WEIGHTS is published, a path '
        'or a URL, random without it'
    )
    add('--models', nargs='+', required=True, metavar='MODEL', help=text)
    text = 'pixels that the models see; one that takes a single size keeps it'
    add('--size', nargs=2, type=int, default=(224, 224), metavar=('H', 'W'), help=text)
    add('--overwrite', action='store_true', help='replace the figure')


def load_models(args: argparse.Namespace, need_head: bool = True) -> list[StatedModel]:
    """Check the options of :func:`add_arguments`, then load the models."""
    if not args.out.endswith('.png'):
        raise ValueError(f'--out must end with .png, but got {args.out!r}')
    check_output(args.out, args.overwrite)
    return [load_model(text, need_head) for text in args.models]


def load_model(text: str, need_head: bool = True) -> StatedModel:
    """Build ``[TITLE=]NAME[@WEIGHTS]``, load the weights, and state which they are.

    They must be all of the model, or without ``need_head`` of its backbone.
    """
    text, _, weights = text.partition('@')
    title, _, name = text.rpartition('=')
    title = title or osp.basename(name.rpartition('::')[2])
    torch.manual_seed(0)
    model = get_model(name).requires_grad_(False)
    if not weights:
        return StatedModel(title, model, 'random weights (seed 0)')
    if weights == 'published':
        weights = published_weights(name)
    partial = not need_head and hasattr(model, 'backbone')
    load_weights(model, weights, partial, skip_heads=not need_head)
    return StatedModel(title, model, f'weights: {describe_checkpoint(weights)}')


def run(
    source: StatedModel, image: np.ndarray, size: tuple[int, int], compute: Callable
) -> tuple:
    """Cut the centre of an image to the size that a model sees, and compute with it.

    Returns the image (H, W, 3), red first, and what ``compute`` makes of the model and
    of its normalised input (1, 3, H, W).
    """
    network = backbone_of(source.model)
    given = getattr(network, 'pretrained_cfg', {})
    if given.get('fixed_input_size'):
        size = given['input_size'][1:]
    elif type(network).__name__ == 'MlpMixer' and not given:
        size = network.img_size
    seen = np.array(ImageOps.fit(Image.fromarray(image), (size[1], size[0])))
    planes = torch.from_numpy(seen).permute(2, 0, 1)
    inputs = source.model.data_preprocessor(dict(inputs=[planes]))['inputs']
    try:
        return seen[..., ::-1], compute(source.model, inputs)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f'{source.name} cannot run at this size: {error}') from error


def backbone_of(model: BaseModel) -> nn.Module:
    """Return the backbone; classifiers of timm have none of their own."""
    return getattr(model, 'backbone', None) or model.model


def state(axes: Axes, source: StatedModel, image: np.ndarray) -> None:
    """Write the name, size and weights of a model into axes, random ones in red."""
    axes.text(0, 0.6, source.name, fontsize=10, weight='bold', va='bottom')
    # Names of files are long.
    lines = [f'at {image.shape[0]} x {image.shape[1]}', *wrap(source.weights, 26)]
    colour = '#c00000' if source.weights.startswith('random') else '#303030'
    axes.text(0, 0.56, '\n'.join(lines), fontsize=8, color=colour, va='top')


def save_figure(
    path: str, figure: Figure, overwrite: bool, sources: Sequence[StatedModel] = ()
) -> None:
    """Write a figure whole, the same bytes each time, and state the weights in it."""
    stated = json.dumps({source.name: source.weights for source in sources})
    stream, metadata = io.BytesIO(), dict(Description=stated, Software=None)
    figure.savefig(stream, format='png', metadata=metadata)
    write_file(path, stream.getvalue(), overwrite)
    print(f'wrote {path}')
