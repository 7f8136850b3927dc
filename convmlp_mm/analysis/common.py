"""What the pictures of maps share: models with stated weights, images, files."""

from __future__ import annotations

import argparse
import os.path as osp
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from mmengine import fileio

from ..apis import get_model, load_weights
from ..checkpoint_io import hash_file, locate_checkpoint
from ..config_files import TOOLKITS, find_config, mim_folder
from ..files import check_output
from ..zoo import SCOPE, published_weights
from .images import MIN_SIZE, arrays_path

if TYPE_CHECKING:
    from mmengine.model import BaseModel

__all__ = [
    'StatedModel',
    'add_model_arguments',
    'check_arguments',
    'find_weights',
    'load_models',
]

# How pictures set a model with random weights apart.
RANDOM_COLOUR, LOADED_COLOUR = '#c00000', '#303030'


@dataclass
class StatedModel:
    """A model and what must be said about it wherever it is shown.

    Attributes:
        name (str): What pictures call it.
        model (BaseModel): In evaluation mode, without gradients of weights.
        weights (str): The statement: the file with the first 8 digits of its
            SHA-256, or that the weights are random.
        random (bool): Whether nothing was loaded.
    """

    name: str
    model: BaseModel
    weights: str
    random: bool

    @property
    def colour(self) -> str:
        """Colour of the statement in pictures."""
        return RANDOM_COLOUR if self.random else LOADED_COLOUR


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command lines that draw maps of several models.

    Args:
        parser (ArgumentParser): It is changed.
    """
    parser.add_argument(
        '--out', required=True, type=osp.expanduser, help='picture to write, .png'
    )
    parser.add_argument(
        '--models',
        nargs='+',
        required=True,
        metavar='MODEL',
        help='configurations: a name of this package, the path of a file, '
        'mmpretrain::, mmdet:: or mmseg:: and a file that the toolkit carries, or '
        'timm:: and a classifier',
    )
    parser.add_argument(
        '--weights',
        nargs='+',
        metavar='WEIGHTS',
        help='one for each model: none (random weights), published, or a path or '
        'URL. Default: none',
    )
    parser.add_argument(
        '--names', nargs='+', metavar='NAME', help='what the picture calls the models'
    )
    parser.add_argument('--seed', type=int, default=0, help='of random weights')
    parser.add_argument(
        '--size',
        nargs=2,
        type=int,
        metavar=('H', 'W'),
        help='pixels that the models see, at least 32 each; a model that takes one '
        'size only keeps its own',
    )
    parser.add_argument(
        '--overwrite', action='store_true', help='replace files that are there'
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Check the options of :func:`add_model_arguments`, and complete them.

    Args:
        args (Namespace): ``weights`` becomes a list of paths, URLs and None,
            and ``names`` a list.

    Raises:
        ValueError: If there is no such model, if it has no published weights,
            or if the number of weights or names is not that of the models.
        OSError: If a file of weights or the folder for the picture does not
            exist, or a file to write does.
    """
    for option in ('weights', 'names'):
        given = getattr(args, option)
        if given and len(given) != len(args.models):
            raise ValueError(
                f'--{option} must be one for each of the {len(args.models)} models, '
                f'but there are {len(given)}'
            )
    if args.size and min(args.size) < MIN_SIZE:
        raise ValueError(
            f'--size must be at least {MIN_SIZE} {MIN_SIZE}, but got '
            f'{args.size[0]} {args.size[1]}'
        )
    if not args.out.endswith('.png'):
        raise ValueError(f'--out must end with .png, but got {args.out!r}')
    for path in (args.out, arrays_path(args.out)):
        check_output(path, args.overwrite)
    for name in args.models:
        find_config(name)
    weights = args.weights or ['none'] * len(args.models)
    args.weights = [find_weights(*pair) for pair in zip(args.models, weights)]
    args.names = args.names or [_short_name(name) for name in args.models]


def _short_name(name: str) -> str:
    return name.rpartition('::')[2].rpartition('/')[2].removesuffix('.py')


def find_weights(name: str, wanted: str) -> str | None:
    """Find the weights that a command line names.

    Args:
        name (str): See :func:`~convmlp_mm.config_files.find_config`.
        wanted (str): ``'none'``, ``'published'``, a path or a URL.

    Returns:
        str, optional: Path or URL; None for none.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the model has no published weights.
    """
    if wanted == 'none':
        return None
    if wanted == 'published':
        return _published(name)
    if '://' not in wanted and not osp.isfile(osp.expanduser(wanted)):
        raise FileNotFoundError(f'weights {wanted!r} (for {name}) do not exist')
    return wanted


def _published(name: str) -> str:
    """Find the published weights of any model that :func:`find_config` knows."""
    scope, _, rest = name.rpartition('::')
    if scope in TOOLKITS:
        config = f'configs/{rest.removesuffix(".py")}.py'
        for metafile in (mim_folder(scope) / config).parent.glob('metafile.y*ml'):
            for model in fileio.load(metafile)['Models']:
                if model.get('Config') == config and model.get('Weights'):
                    return model['Weights']
        raise ValueError(f'{scope} has no published weights of {rest!r}')
    if scope == 'timm':
        import timm
        from huggingface_hub import hf_hub_download

        hub = timm.get_pretrained_cfg(rest).hf_hub_id
        if not hub:
            raise ValueError(f'timm has no published weights of {rest!r}')
        return hf_hub_download(hub, 'pytorch_model.bin')
    return published_weights(name.removeprefix(f'{SCOPE}::'))


def load_models(
    models: Sequence[str],
    weights: Sequence[str | None],
    names: Sequence[str] | None = None,
    seed: int = 0,
    need_head: bool = True,
) -> list[StatedModel]:
    """Build models, load their weights and state which they are.

    Args:
        models (Sequence[str]): See :func:`~convmlp_mm.config_files.find_config`.
        weights (Sequence[str | None]): Path or URL for each, None for random
            weights: those that the layers are built with.
        names (Sequence[str], optional): What to call them. Defaults to the
            last part of each name in ``models``.
        seed (int): Of random weights, for each model anew. Defaults to 0.
        need_head (bool): Whether a file must have every tensor of the model;
            else those of the backbone are enough. Defaults to True.

    Returns:
        list[StatedModel]: In the order given.

    Raises:
        ValueError: If there is no such model, or weights do not fit.
        FileNotFoundError: If there is no such file.
    """
    names = names or [_short_name(name) for name in models]
    return [_load_model(*each, seed, need_head) for each in zip(names, models, weights)]


def _load_model(
    name: str, config: str, weights: str | None, seed: int, need_head: bool
) -> StatedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_model(config)
    model.requires_grad_(False)
    if weights is None:
        return StatedModel(name, model, f'random weights (seed {seed})', True)
    # Without such names nothing would tell the backbone from the rest.
    partial = not need_head and any(
        k.startswith('backbone.') for k in model.state_dict()
    )
    load_weights(model, weights, partial, skip_heads=not need_head)
    path = locate_checkpoint(weights)
    digest = f' (SHA-256 {hash_file(path)[:8]})' if '://' not in path else ''
    statement = f'weights: {osp.basename(weights)}{digest}'
    return StatedModel(name, model, statement, False)
