"""Names of configurations and models, for this package and for the toolkits.

What is known about a model stands in ``configs/metafile_*.yml`` and nowhere
else; ``model-index.yml`` lists these files. Both travel with the package in
``convmlp_mm/.mim``, where mim and mmengine look for them.
"""

from __future__ import annotations

import fnmatch
import functools
from pathlib import Path

from mmengine.fileio import load
from mmengine.runner import CheckpointLoader

from .checkpoint_io import ROOT, read_checkpoint
from .layouts import name_as_model

__all__ = [
    'carried_folder',
    'config_path',
    'list_models',
    'published_weights',
    'register_classifiers',
]

SCOPE = __package__
CLASSIFICATION = 'configs/metafile_classification.yml'


def carried_folder() -> Path:
    """Return the folder of the configurations, metafiles and tools.

    Returns:
        Path: ``.mim`` in the package, else the checkout.

    Raises:
        FileNotFoundError: If the package was copied without them.
    """
    package = Path(__file__).parent
    # The second is a checkout on PYTHONPATH, which nothing has installed.
    for folder in (package / '.mim', package.parent):
        if (folder / 'model-index.yml').is_file():
            return folder
    raise FileNotFoundError(
        f'{SCOPE} has no configurations: neither {package / ".mim"} nor '
        f'{package.parent} holds model-index.yml; install it with pip'
    )


@functools.lru_cache(maxsize=1)
def _entries() -> dict[str, dict]:
    """Read the metafiles: entries by name, in their order."""
    mim = carried_folder()
    metafiles = [load(mim / path) for path in load(mim / 'model-index.yml')['Import']]
    return {model['Name']: model for file in metafiles for model in file['Models']}


def list_models(pattern: str | None = None) -> list[str]:
    """List the models of the zoo.

    Args:
        pattern (str, optional): Wildcards that a name must match, for instance
            ``'retinanet*'``. Defaults to None, which is all.

    Returns:
        list[str]: Names, in the order of the metafiles.
    """
    return fnmatch.filter(_entries(), pattern or '*')


def config_path(name: str) -> str:
    """Find a configuration that this package carries.

    Args:
        name (str): A name of :func:`list_models`, or a path in the folder
            ``configs``, with ``.py`` or without: ``'retinanet_convmlp_s'``,
            ``'ablation/pure_mlp_100e.py'``.

    Returns:
        str: The absolute path.

    Raises:
        ValueError: If there is none.
    """
    configs = carried_folder() / 'configs'
    if name in _entries():
        path = carried_folder() / _entries()[name]['Config']
    else:
        path = configs / f'{name.removesuffix(".py")}.py'
    if '..' in Path(name).parts or not path.is_file():
        files = sorted(str(p.relative_to(configs)) for p in configs.rglob('*.py'))
        raise ValueError(
            f'{SCOPE} has no configuration {name!r}; there are '
            + ', '.join(file for file in files if not file.startswith('_base_'))
        )
    return str(path)


def published_weights(name: str) -> str:
    """Return the URL of the weights that a model's authors publish.

    Args:
        name (str): A name of :func:`list_models`.

    Returns:
        str: The URL.

    Raises:
        ValueError: If there are none.
    """
    weights = _entries().get(name, {}).get('Weights')
    if weights is None:
        raise ValueError(
            f'{name!r} has no published weights; the models that have are '
            + ', '.join(n for n, entry in _entries().items() if 'Weights' in entry)
        )
    return weights


def register_classifiers() -> None:
    """Add the classifiers to the hub of mmpretrain.

    After it, ``mmpretrain.list_models()``, ``mmpretrain.get_model()`` and the
    inferencers of mmpretrain know them by name. Calling it again changes nothing.

    Raises:
        ImportError: If mmpretrain is not installed.
    """
    from mmpretrain.apis.model import ModelHub

    folder = carried_folder()
    if not ModelHub.has('convmlp_s_imagenet'):
        ModelHub.register_model_index(folder / CLASSIFICATION, config_prefix=folder)


@CheckpointLoader.register_scheme(ROOT)
def load_from_convmlp_zoo(filename: str, map_location: object = None) -> dict:
    """Read the authors' files for mmengine and mmpretrain, safely.

    Args:
        filename (str): A URL that begins as the authors' do.
        map_location (str, optional): Where the tensors go. Defaults to the CPU.

    Returns:
        dict: ``state_dict`` with the names that the toolkits use.
    """
    checkpoint = read_checkpoint(filename, map_location or 'cpu')
    meta = checkpoint.get('meta', {})
    return dict(state_dict=name_as_model(checkpoint), meta=meta)
