"""Build configured models and inferencers, of this package and of the toolkits."""

import copy
import warnings
from collections import Counter

import numpy as np
from mmcv.cnn import ConvModule, fuse_conv_bn
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.infer import BaseInferencer
from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.utils import get_object_from_string
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .checkpoint import fit_checkpoint, read_checkpoint, some_of
from .hooks.data import walk_datasets
from .hooks.model import use_channels_last
from .swap import swap_backbone  # noqa: F401
from .toolkits import toolkit_of
from .zoo import find_config, give_visualizer, published_weights


def build_model(cfg: Config) -> BaseModel:
    """Build the model of a configuration in the scope of its toolkit.

    It is in evaluation mode, on the CPU, with random weights, the configuration as
    ``cfg`` and the names of the classes in ``dataset_meta``.

    Raises:
        ValueError: If the configuration does not name one of the toolkits.
    """
    # Its own copy is shallow, and models take entries out of theirs.
    cfg = copy.deepcopy(cfg)
    toolkit = toolkit_of(cfg.get('default_scope'))
    if cfg.get('data_preprocessor') is not None:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    toolkit.register()
    with DefaultScope.overwrite_default_scope(toolkit.scope):
        model = MODELS.build(cfg.model)
    model.cfg = cfg
    model.dataset_meta = _dataset_meta(cfg)
    # LAD of mmdet does not return itself here.
    model.eval()
    return model


def get_model(
    name: str, pretrained: bool | str = False, device: str | None = None, **changes
) -> BaseModel:
    """Build a classifier, detector or segmentor by its name, in evaluation mode.

    Args:
        name: See :func:`find_config`.
        pretrained: Whether to load the published weights, or the path or URL of others.
        device: Where the model goes. Defaults to the CPU.
        **changes: What to merge into ``model`` of the configuration, for instance
            ``backbone=dict(out_indices=(0, 1, 2, 3))``.

    Raises:
        ValueError: If there is no such model, if it has no published weights, or if
            the weights do not fit.
    """
    weights = _find_weights(name, pretrained)
    cfg = find_config(name)
    cfg.merge_from_dict(dict(model=changes))
    model = build_model(cfg)
    if weights is not None:
        load_weights(model, weights)
    return model.to(device or 'cpu')


def get_inferencer(
    name: str | Config, weights: bool | str = True, device: str | None = None
) -> BaseInferencer:
    """Build the inferencer of the toolkit that a model belongs to, by name.

    Those of the toolkits know no names of this package, and load weights unchecked.

    Args:
        name: See :func:`find_config`.
        weights: Whether to load the published weights, or the path or URL of others.
        device: Where the model goes. Defaults to a GPU if there is one.

    Raises:
        ValueError: See :func:`get_model`; and if the head in the file has another
            number of classes, since the model could not predict.
    """
    weights = _find_weights(name, weights)
    cfg = find_config(name)
    toolkit = toolkit_of(cfg.get('default_scope'))
    toolkit.register()
    meta = _dataset_meta(cfg)
    give_visualizer(cfg)
    # mmengine's inferencer takes a name here, unlike its Runner.
    loader = cfg.get('test_dataloader') or {}
    if isinstance(loader.get('collate_fn'), dict):
        loader.collate_fn = loader.collate_fn['type']
    if toolkit.scope == 'mmseg':
        _give_palette(meta)
    with warnings.catch_warnings(), DefaultScope.overwrite_default_scope(toolkit.scope):
        # The toolkits warn of weights that are not loaded and classes that are
        # guessed, which is put right below.
        warnings.simplefilter('ignore')
        build = get_object_from_string(toolkit.inferencer)
        inferencer = build(cfg, None, device=device or get_device())
    model = inferencer.model
    model.cfg = cfg
    # The visualizer shares the dict of a detector or segmentor.
    model.dataset_meta = getattr(model, 'dataset_meta', {})
    model.dataset_meta.update(meta)
    if weights is not None:
        load_weights(model, weights, skip_heads=False)
        if toolkit.scope == 'mmseg':
            _give_palette(model.dataset_meta)
    # That of mmpretrain takes the names of the classes from here.
    inferencer.classes = model.dataset_meta.get('classes')
    return inferencer


def _give_palette(meta: dict) -> None:
    """Draw colours: mmseg's visualizer takes those of another data set otherwise."""
    drawn = np.random.RandomState(42).randint(0, 255, (len(meta['classes']), 3))
    meta.setdefault('palette', drawn.tolist())


def _find_weights(name: str | Config, wanted: bool | str) -> str | None:
    """Return the path or URL of the weights that are wanted, if any are."""
    if wanted is not True:
        return wanted or None
    if isinstance(name, Config):
        raise ValueError('the weights of a configuration that was read must be named')
    return published_weights(name)


def load_weights(
    model: BaseModel, weights: str, partial: bool = False, skip_heads: bool = True
) -> None:
    """Load a checkpoint into a classifier, detector or segmentor, or nothing.

    A line in the log says how many tensors matched and what was skipped. Where all of
    the model is in the file, the names of the classes are those in the file, too.

    Args:
        model: See :func:`build_model`.
        weights: Path or URL, see :func:`convmlp_mm.checkpoint.read_checkpoint`.
        partial: See :func:`convmlp_mm.checkpoint.fit_checkpoint`.
        skip_heads: Likewise.

    Raises:
        OSError: If there is no such file.
        ValueError: If it is no file of weights, or does not fit.
    """
    checkpoint = read_checkpoint(weights)
    state_dict, message = fit_checkpoint(
        model, checkpoint, weights, partial, skip_heads
    )
    # Only what may be missing is missing, as has been checked, so this is not strict.
    model.load_state_dict(state_dict, strict=False)
    print_log(message, logger='current')
    # A Runner that is given the model would initialise it once more.
    model.is_init = True
    # The Runner saves the names of the classes that a head was trained with.
    meta = (checkpoint.get('meta') or {}).get('dataset_meta') or {}
    names, given = list(meta.get('classes') or ()), model.dataset_meta.get('classes')
    whole = model.state_dict().keys() <= state_dict.keys()
    if names and (whole or not given) and names != list(given or ()):
        model.dataset_meta['classes'] = names
        if len(model.dataset_meta.get('palette') or names) != len(names):
            del model.dataset_meta['palette']
        model.dataset_meta.update({k: v for k, v in meta.items() if k == 'palette'})
        if given:
            text = f'The classes are those of {weights}: {some_of(map(str, names))}'
            print_log(f'{text}; the configuration has {some_of(given)}', 'current')


def switch_to_deploy(model: nn.Module) -> None:
    """Fold each BN that can be folded into the convolution before it.

    The model is changed in place, for inference only; its outputs stay, to rounding.
    Folded are the BNs of backbones that have ``switch_to_deploy``, such as
    :class:`ConvMLP` and RepVGG, and of mmcv's ``ConvModule``, unless several norms
    share its convolution. Necks and heads get channels-last maps, see
    :func:`convmlp_mm.hooks.model.use_channels_last`.
    """
    model.eval()
    modules = list(model.modules())
    for module in modules:
        if module is not model and hasattr(module, 'switch_to_deploy'):
            module.switch_to_deploy()
    # A convolution that stands in several places may be followed by several norms.
    uses = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    for module in modules:
        if _can_fold(module) and uses[id(module)] == uses[id(module.conv)] == 1:
            fuse_conv_bn(module)
    use_channels_last(model)


def _can_fold(module: nn.Module) -> bool:
    """Tell whether a BN with statistics of its own follows the convolution at once."""
    return (
        isinstance(module, ConvModule)
        and type(module.conv) is nn.Conv2d
        and module.order[:2] == ('conv', 'norm')
        and isinstance(module.norm, _BatchNorm)
        and module.norm.affine
        and module.norm.track_running_stats
    )


def _dataset_meta(cfg: Config) -> dict:
    """Return the names and colours of the classes that a configuration tests on."""
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    _, dataset = next(walk_datasets(dataset))
    kind = dataset.get('type')
    # A registry fails at an empty name.
    if kind and isinstance(kind, str):
        with DATASETS.switch_scope_and_registry(cfg.default_scope) as registry:
            kind = registry.get(kind)
    return {**getattr(kind, 'METAINFO', {}), **(dataset.get('metainfo') or {})}
