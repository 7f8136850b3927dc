"""Names of configurations and models, for this package and for the toolkits.

What is known about a model stands in ``configs/metafile_*.yml`` and nowhere
else; ``model-index.yml`` lists these files. Both travel with the package in
``convmlp_mm/.mim``, where mim and mmengine look for them.
"""

from __future__ import annotations

import fnmatch
import functools
import sys
from pathlib import Path

import wrapt
from mmengine.config import Config, utils
from mmengine.fileio import load

__all__ = [
    'carried_folder',
    'config_path',
    'list_models',
    'open_scope',
    'published_weights',
]

SCOPE = __package__
# Where the authors publish.
ROOT = 'https://shi-labs.com/projects/convmlp/checkpoints/'
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


def open_scope() -> None:
    """Let mmengine and mmpretrain find this package's configurations by name.

    After it, in the same process, ``_base_ = 'convmlp_mm::NAME.py'``,
    ``mmengine.hub.get_config('convmlp_mm::NAME.py')``,
    ``mmpretrain.list_models()`` and ``mmpretrain.get_model()`` know them, and
    mmengine reads the authors' weights from their URLs.
    Importing the package calls it; calling it again changes nothing.

    mmengine has a closed list of packages (its issue 1410), asks for a folder
    before the name, and marks what comes from a package with a scope to build
    it in, which would be wrong here: each of our configurations belongs to the
    toolkit that its ``default_scope`` names. So two functions of mmengine are
    wrapped; other names pass through them unchanged.
    """
    if SCOPE in utils.MODULE2PACKAGE:
        return
    # A module inside of the package, not its distribution: mmengine 0.10.7
    # does not find the files of an editable install by the latter.
    utils.MODULE2PACKAGE[SCOPE] = f'{SCOPE}.zoo'
    prefix = f'{SCOPE}::'
    get_cfg_path = Config._get_cfg_path
    get_package_and_cfg_path = utils._get_package_and_cfg_path

    @functools.wraps(get_cfg_path)
    def for_base(cfg_path: str, filename: str) -> tuple[str, str | None]:
        if cfg_path.startswith(prefix):
            return config_path(cfg_path.removeprefix(prefix)), None
        return get_cfg_path(cfg_path, filename)

    @functools.wraps(get_package_and_cfg_path)
    def for_hub(cfg_path: str) -> tuple[str, str]:
        if cfg_path.startswith(prefix):
            return utils.MODULE2PACKAGE[SCOPE], cfg_path.removeprefix(prefix)
        return get_package_and_cfg_path(cfg_path)

    Config._get_cfg_path = staticmethod(for_base)
    # The hub has a name of its own for it, taken when it is imported.
    for module in (utils, sys.modules.get('mmengine.hub.hub')):
        if module is not None:
            module._get_package_and_cfg_path = for_hub
    # Now, or whenever somebody imports them.
    wrapt.when_imported('mmengine.runner.checkpoint')(_register_root)
    wrapt.when_imported('mmpretrain.apis.model')(_register_classifiers)


def load_from_convmlp_zoo(filename: str, map_location: object = None) -> dict:
    """Read the authors' files for mmengine and mmpretrain, safely.

    Args:
        filename (str): A URL that begins as the authors' do.
        map_location (str, optional): Where the tensors go. Defaults to the CPU.

    Returns:
        dict: ``state_dict`` with the names that the toolkits use.
    """
    from .checkpoint_io import read_checkpoint
    from .layouts import name_as_model

    checkpoint = read_checkpoint(filename, map_location or 'cpu')
    meta = checkpoint.get('meta', {})
    return dict(state_dict=name_as_model(checkpoint), meta=meta)


def _register_root(module: object) -> None:
    """Let mmengine read the authors' files."""
    module.CheckpointLoader.register_scheme(ROOT, load_from_convmlp_zoo)


def _register_classifiers(module: object) -> None:
    """Add the classifiers to the hub of mmpretrain."""
    mim = carried_folder()
    module.ModelHub.register_model_index(mim / CLASSIFICATION, config_prefix=mim)
