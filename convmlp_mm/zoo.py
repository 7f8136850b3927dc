"""Names of configurations and models, for this package and for the toolkits.

What is known about a model stands in ``configs/metafile_*.yml`` and nowhere
else; ``model-index.yml`` lists these files. Both travel with the package in
``convmlp_mm/.mim``, where mim and mmengine look for them.
"""

from __future__ import annotations

import fnmatch
import functools
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import wrapt
from mmengine.config import Config, utils
from mmengine.fileio import load
from mmengine.logging import print_log
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import CheckpointLoader

from .weights import ROOT, load_model_weights, name_as_model, read_checkpoint

if TYPE_CHECKING:
    from mmengine.infer import BaseInferencer
    from mmengine.model import BaseModel

__all__ = [
    'config_path',
    'get_inferencer',
    'get_model',
    'list_models',
    'open_scope',
]

SCOPE = __package__
CLASSIFICATION = 'configs/metafile_classification.yml'


def _mim() -> Path:
    """Return the folder of the configurations and metafiles.

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
    mim = _mim()
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
    configs = _mim() / 'configs'
    if name in _entries():
        path = _mim() / _entries()[name]['Config']
    else:
        path = configs / f'{name.removesuffix(".py")}.py'
    if '..' in Path(name).parts or not path.is_file():
        files = sorted(str(p.relative_to(configs)) for p in configs.rglob('*.py'))
        raise ValueError(
            f'{SCOPE} has no configuration {name!r}; there are '
            + ', '.join(file for file in files if not file.startswith('_base_'))
        )
    return str(path)


def get_model(
    name: str,
    pretrained: bool | str = False,
    device: str | None = None,
    **changes: object,
) -> BaseModel:
    """Build a classifier, detector or segmentor by its name.

    Args:
        name (str): See :func:`config_path`.
        pretrained (bool | str): Whether to load the published weights of this
            model, or the path or URL of others. Defaults to False, which
            leaves the weights random.
        device (str, optional): Where the model goes. Defaults to the CPU.
        **changes: What to merge into ``model`` of the configuration, for
            instance ``backbone=dict(out_indices=(0, 1, 2, 3))``.

    Returns:
        BaseModel: In evaluation mode, with its configuration as ``cfg`` and
        the names of the classes in ``dataset_meta``.

    Raises:
        ValueError: If there is no such model, if it has no published weights,
            or if the weights do not fit.

    Examples:
        >>> model = get_model('convmlp_s_imagenet')
        >>> sum(p.numel() for p in model.parameters())
        9022920
    """
    weights = _find_weights(name, pretrained)
    cfg = Config.fromfile(config_path(name))
    cfg.merge_from_dict(dict(model=changes))
    if cfg.get('data_preprocessor') is not None:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    scope = cfg.default_scope
    import_module(f'{scope}.utils').register_all_modules(False)
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(cfg.model)
    model.cfg = cfg
    model.dataset_meta = _dataset_meta(cfg)
    if scope == 'mmpretrain':
        # Where its inferencers look.
        model._config, model._dataset_meta = cfg, model.dataset_meta
    if weights is not None:
        _load(model, weights)
    return model.to(device or 'cpu').eval()


def get_inferencer(
    name: str, weights: bool | str = True, device: str | None = None
) -> BaseInferencer:
    """Build the inferencer of the toolkit that a model belongs to, by name.

    mmengine's inferencers know names of OpenMMLab's own packages only, and
    load weights without checking them.

    Args:
        name (str): See :func:`config_path`.
        weights (bool | str): Whether to load the published weights, or the
            path or URL of others. Defaults to True.
        device (str, optional): Where the model goes. Defaults to a GPU if
            there is one.

    Returns:
        BaseInferencer: ``ImageClassificationInferencer`` of mmpretrain,
        ``DetInferencer`` of mmdet or ``MMSegInferencer`` of mmseg.

    Raises:
        ValueError: See :func:`get_model`.
    """
    from mmengine.device import get_device

    weights = _find_weights(name, weights)
    path = config_path(name)
    device = device or get_device()
    scope = Config.fromfile(path).default_scope
    if scope == 'mmpretrain':
        from mmpretrain import ImageClassificationInferencer

        model = get_model(name, weights or False, device)
        with DefaultScope.overwrite_default_scope(scope):
            return ImageClassificationInferencer(model)
    with warnings.catch_warnings():
        # Of weights that are not loaded and classes that are guessed: both
        # are put right below.
        warnings.simplefilter('ignore')
        if scope == 'mmdet':
            from mmdet.apis import DetInferencer

            inferencer = DetInferencer(path, device=device)
            meta = _dataset_meta(inferencer.cfg)
        else:
            from mmseg.apis import MMSegInferencer

            import_module(f'{scope}.utils').register_all_modules(False)
            meta = _dataset_meta(Config.fromfile(path))
            inferencer = MMSegInferencer(
                path,
                classes=meta['classes'],
                palette=meta.get('palette'),
                device=device,
            )
    # The visualizer shares this dict.
    inferencer.model.dataset_meta.update(meta)
    if weights is not None:
        _load(inferencer.model, weights)
    return inferencer


def _find_weights(name: str, wanted: bool | str) -> str | None:
    if wanted is not True:
        return wanted or None
    weights = _entries().get(name, {}).get('Weights')
    if weights is None:
        raise ValueError(
            f'{name!r} has no published weights; the models that have are '
            + ', '.join(n for n, entry in _entries().items() if 'Weights' in entry)
        )
    return weights


def _load(model: BaseModel, weights: str) -> None:
    print_log(load_model_weights(model, weights), logger='current')
    # Else a Runner that is given the model initialises it once more.
    model._is_init = True


def _dataset_meta(cfg: Config) -> dict:
    """Return the names and colours of the classes that a configuration tests on."""
    dataset = cfg.test_dataloader.dataset
    registry = import_module(f'{cfg.default_scope}.registry').DATASETS
    meta = dict(getattr(registry.get(dataset.type), 'METAINFO', {}))
    meta.update(dataset.get('metainfo') or {})
    return meta


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
    CheckpointLoader.register_scheme(ROOT, load_from_convmlp_zoo)
    # Now, or whenever somebody imports mmpretrain.
    wrapt.when_imported('mmpretrain.apis.model')(_register_classifiers)


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


def _register_classifiers(module: object) -> None:
    """Add the classifiers to the hub of mmpretrain."""
    mim = _mim()
    module.ModelHub.register_model_index(mim / CLASSIFICATION, config_prefix=mim)
