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
from mmengine.config import Config
from mmengine.model import BaseModel
from PIL import Image, ImageOps
from torch import Tensor

from convmlp_mm.apis import get_model, load_weights
from convmlp_mm.checkpoint import check_output, hash_file, locate_checkpoint, write_file
from convmlp_mm.zoo import find_config, published_weights


class StatedModel(NamedTuple):
    """A model in evaluation mode, and what a figure says about its weights."""

    name: str
    model: BaseModel
    weights: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that all figures have."""
    add = parser.add_argument
    add('--out', required=True, type=osp.expanduser, help='figure to write, .png')
    text = 'names of this package, files, mmdet:: (...) and a file, timm:: and a name'
    add('--models', nargs='+', required=True, metavar='MODEL', help=text)
    text = 'for each model: none (random, the default), published, or a path or URL'
    add('--weights', nargs='+', metavar='WEIGHTS', help=text)
    add('--names', nargs='+', metavar='NAME', help='what the figure calls the models')
    text = 'pixels that the models see; one that takes a single size keeps it'
    add('--size', nargs=2, type=int, default=(224, 224), metavar=('H', 'W'), help=text)
    add('--overwrite', action='store_true', help='replace the figure')


def load_models(args: argparse.Namespace, need_head: bool = True) -> list[StatedModel]:
    """Check all options of :func:`add_arguments`, then load the models."""
    count = len(args.models)
    weights = args.weights or ['none'] * count
    names = args.names or [osp.basename(name.split('::')[-1]) for name in args.models]
    for option, given in (('weights', weights), ('names', names)):
        if len(given) != count:
            raise ValueError(
                f'--{option} must be one for each of the {count} models, but there are '
                f'{len(given)}'
            )
    if not args.out.endswith('.png'):
        raise ValueError(f'--out must end with .png, but got {args.out!r}')
    check_output(args.out, args.overwrite)
    jobs = [
        (find_config(model), find_weights(model, wanted), name, need_head)
        for model, wanted, name in zip(args.models, weights, names)
    ]
    return [load_model(*job) for job in jobs]


def find_weights(model: str, wanted: str) -> str | None:
    """Turn ``none``, ``published``, a path or a URL into None, a path or a URL."""
    if wanted == 'published':
        return published_weights(model)
    return None if wanted == 'none' else locate_checkpoint(wanted)


def load_model(
    cfg: Config, weights: str | None, name: str, need_head: bool = True
) -> StatedModel:
    """Build a model, load its weights if there are any, and state which they are.

    The file must have every tensor of the model, or without ``need_head`` of its
    backbone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_model(cfg).requires_grad_(False)
    if weights is None:
        return StatedModel(name, model, 'random weights (seed 0)')
    partial = not need_head and hasattr(model, 'backbone')
    load_weights(model, weights, partial, skip_heads=not need_head)
    path = locate_checkpoint(weights)
    digest = f' (SHA-256 {hash_file(path)[:8]})' if '://' not in path else ''
    return StatedModel(name, model, f'weights: {osp.basename(weights)}{digest}')


def prepare(
    source: StatedModel, image: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, Tensor]:
    """Cut the centre of an image to the size that a model sees, and normalise it.

    Returns the image (H, W, 3), red first, and the input of the model (1, 3, H, W).
    """
    model = source.model
    backbone = getattr(model, 'backbone', None)
    given = getattr(getattr(model, 'model', None), 'pretrained_cfg', None) or {}
    if type(backbone).__name__ == 'MlpMixer':
        size = backbone.img_size
    elif given.get('fixed_input_size'):
        size = given['input_size'][1:]
    seen = np.array(ImageOps.fit(Image.fromarray(image), (size[1], size[0])))
    planes = torch.from_numpy(seen).permute(2, 0, 1)
    return seen[..., ::-1], model.data_preprocessor(dict(inputs=[planes]))['inputs']


def run(
    source: StatedModel, image: np.ndarray, size: tuple[int, int], compute: Callable
) -> tuple:
    """Return the part of an image that a model sees, and what is computed of it."""
    seen, inputs = prepare(source, image, size)
    try:
        return seen, compute(source.model, inputs)
    except (AssertionError, RuntimeError) as error:
        message = f'{source.name} cannot be run at this size: {error}'
        raise ValueError(message) from error


def state(axes: Axes, source: StatedModel, image: np.ndarray) -> None:
    """Write the name, size and weights of a model into axes, random ones in red."""
    axes.set_axis_off()
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
    stream = io.BytesIO()
    metadata = dict(Description=stated, Software=None)
    figure.savefig(stream, format='png', metadata=metadata)
    write_file(path, stream.getvalue(), overwrite)
    print(f'wrote {path}')
