"""What the figures of maps share: stated models, images, files."""

import argparse
import io
import json
import os.path as osp
from collections.abc import Callable
from textwrap import wrap
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.model import BaseModel
from PIL import Image, ImageOps
from torch import Tensor

from convmlp_mm.apis import get_model, load_weights
from convmlp_mm.checkpoint import check_output, hash_file, locate_checkpoint, write_file
from convmlp_mm.toolkits import TOOLKITS
from convmlp_mm.zoo import find_config, mim_folder, published_weights


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
    text = 'for each model: none (random), published, or a path or URL; default: none'
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
    if min(args.size) < 32:
        raise ValueError(f'--size must be at least 32 32, but got {args.size}')
    if not args.out.endswith('.png'):
        raise ValueError(f'--out must end with .png, but got {args.out!r}')
    check_output(args.out, args.overwrite)
    configs = [find_config(name) for name in args.models]
    weights = [find_weights(*pair) for pair in zip(args.models, weights)]
    jobs = zip(configs, weights, names)
    return [load_model(*job, need_head) for job in jobs]


def find_weights(name: str, wanted: str) -> str | None:
    """Turn ``none``, ``published``, a path or a URL into None, a path or a URL."""
    if wanted == 'none':
        return None
    if wanted != 'published':
        if '://' not in wanted and not osp.isfile(osp.expanduser(wanted)):
            raise FileNotFoundError(f'weights {wanted!r} (for {name}) do not exist')
        return wanted
    scope, _, rest = name.rpartition('::')
    if scope == 'timm':
        from huggingface_hub import hf_hub_download
        from timm import get_pretrained_cfg

        return hf_hub_download(get_pretrained_cfg(rest).hf_hub_id, 'pytorch_model.bin')
    if scope not in TOOLKITS:
        return published_weights(rest)
    config = f'configs/{rest.removesuffix(".py")}.py'
    for metafile in (mim_folder(scope) / config).parent.glob('metafile.y*ml'):
        for model in load(metafile)['Models']:
            if model.get('Config') == config and model.get('Weights'):
                return model['Weights']
    raise ValueError(f'{scope} has no published weights of {rest!r}')


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


def to_png(figure: Figure, dpi: int, **metadata: str) -> bytes:
    """Draw a figure as the bytes of a file, the same ones each time."""
    stream = io.BytesIO()
    metadata = dict(metadata, Software=None)
    figure.savefig(stream, dpi=dpi, format='png', metadata=metadata)
    return stream.getvalue()


def save_figure(args: argparse.Namespace, figure: Figure, sources: list) -> None:
    """Write a figure whole or not at all, with the statements in its metadata."""
    stated = json.dumps({source.name: source.weights for source in sources})
    write_file(args.out, to_png(figure, 100, Description=stated), args.overwrite)
    print(f'wrote {args.out}')
