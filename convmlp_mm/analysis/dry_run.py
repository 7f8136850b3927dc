"""Run models of the toolkits without values, only for the shapes.

On torch's meta device a pass takes seconds at any size and on any machine. The few
models that need values, as operators of mmcv do, are run on the CPU. What stands
between a model and such a run is put aside here: groups of processes, files to
download, boxes that depend on the picture, operators without implementation.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ..apis import build_model

if TYPE_CHECKING:
    from mmengine.model import BaseModel
    from torch import Tensor, nn

__all__ = ['Costs', 'Counted', 'build_for_dry_run', 'dry_run']

# Of detectors that are given their boxes, as many as an RPN keeps by default.
GIVEN_PROPOSALS = 1000


class Costs(NamedTuple):
    """What one pass cost.

    Attributes:
        macs (int): Multiply-accumulates.
        activations (int): Elements in the outputs of the same operators.
        maps (list): What the backbone has handed on, in each of its calls.
    """

    macs: int
    activations: int
    maps: list


def build_for_dry_run(cfg: Config, device: str = 'meta') -> BaseModel:
    """Build a model whose weights, groups of processes and files do not matter.

    Args:
        cfg (Config): Of mmpretrain, mmdet or mmseg; it is not changed.
        device (str): ``'meta'`` or ``'cpu'``. Defaults to ``'meta'``.

    Returns:
        BaseModel: In evaluation mode, on the device, with BN for SyncBN.
    """
    cfg = copy.deepcopy(cfg)
    _make_local(cfg._cfg_dict)
    if device != 'meta':
        model = build_model(cfg).requires_grad_(False)
    else:
        try:
            with torch.device('meta'):
                # Again, since the old constructor torch.Tensor ignores the device.
                model = build_model(cfg).to('meta')
        except (NotImplementedError, RuntimeError):
            # Some read values while they are built, such as rates of stochastic
            # depth.
            model = build_model(cfg).to('meta')
    return revert_sync_batchnorm(model)


def _make_local(node: object) -> None:
    """Take out of a configuration what needs other processes or the network."""
    if isinstance(node, dict):
        # mmcv's own SyncBN asks for the group when it is built.
        if node.get('type') == 'MMSyncBN':
            node['type'] = 'BN'
        # Of timm's models; those of teachers; and links between tracks.
        if node.get('pretrained') is True:
            node['pretrained'] = False
        if 'teacher_ckpt' in node:
            node['teacher_ckpt'] = None
        if node.get('type') == 'AppearanceFreeLink':
            node['checkpoint'] = None
    if isinstance(node, (dict, list, tuple)):
        for child in node.values() if isinstance(node, dict) else node:
            _make_local(child)


def dry_run(model: BaseModel, shape: tuple[int, int], predict: bool = False) -> Costs:
    """Run a model on one picture and count.

    Args:
        model (BaseModel): Of :func:`build_for_dry_run`. Of a tracker, the detector
            is run.
        shape (tuple[int, int]): Height and width in pixels.
        predict (bool): Run the toolkit's mode ``'predict'`` in place of
            ``'tensor'``. Defaults to False.

    Returns:
        Costs: The counts and the maps of the backbone.
    """
    device = next(model.parameters()).device
    scope = model.cfg.default_scope
    mean = getattr(getattr(model, 'data_preprocessor', None), 'mean', None)
    channels = 3 if mean is None else mean.numel()
    x = torch.zeros(1, channels, *shape, device=device)
    model = getattr(model, 'detector', model)
    args = [_data_samples(shape, device)] if scope == 'mmdet' else []
    kwargs = dict(mode='predict' if predict else 'tensor')
    if scope == 'mmpretrain' and not predict:
        kwargs = {}

    maps = []
    counted = Counted()
    flops = FlopCounterMode(display=False)
    # The counter's own table of operators, with their outputs for their work.
    # mmengine's count of activations traces the model, which needs values.
    numels = FlopCounterMode(
        display=False, custom_mapping=dict.fromkeys(flop_registry, _count_outputs)
    )
    with (
        counted.operators(model),
        _given_boxes(model),
        _outputs_of(model, maps),
        torch.no_grad(),
        numels,
        flops,
    ):
        model(x, *args, **kwargs)
    return Costs(
        macs=flops.get_total_flops() // 2 + counted.macs,
        activations=numels.get_total_flops() + counted.activations,
        maps=maps,
    )


def _count_outputs(*args: object, out_shape: object = None, **kwargs: object) -> int:
    # Of several outputs, as those of attention, the first is the result.
    first = out_shape[0] if out_shape and not isinstance(out_shape[0], int) else None
    return math.prod(out_shape if first is None else first)


@contextmanager
def _outputs_of(model: nn.Module, maps: list) -> Iterator[None]:
    """Keep what the backbone of a model returns."""
    # A semi-supervised detector holds two of them, and runs the teacher.
    model = getattr(model, 'teacher', model)
    backbone = getattr(model, 'backbone', None)
    if backbone is None:
        yield
        return
    handle = backbone.register_forward_hook(lambda m, args, out: maps.append(out))
    try:
        yield
    finally:
        handle.remove()


class Counted:
    """The costs of mmcv's operators, which torch's counter does not know.

    Attributes:
        macs (int): Multiply-accumulates.
        activations (int): Elements of their outputs.
    """

    def __init__(self) -> None:
        self.macs = self.activations = 0

    def add(self, output: Tensor, macs_of_each: int) -> Tensor:
        """Count an output of an operator and return it."""
        self.activations += output.numel()
        self.macs += output.numel() * macs_of_each
        return output

    @contextmanager
    def operators(self, model: nn.Module) -> Iterator[None]:
        """Count the operators of a model while the with block lasts."""
        from mmcv.ops import DeformConv2d, ModulatedDeformConv2d
        from mmcv.ops.carafe import CARAFEPack
        from mmcv.ops.psa_mask import PSAMask

        def deform(module: nn.Module, args: object, output: Tensor) -> None:
            self.add(output, module.weight[0].numel())

        def reassemble(module: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
            output = x.new_zeros(*x.shape[:2], *mask.shape[-2:])
            return self.add(output, module.up_kernel**2)

        def spread(module: nn.Module, mask: Tensor) -> Tensor:
            # A value for each pair of positions; only moved, so without MACs.
            n, _, height, width = mask.shape
            return mask.new_zeros(n, height * width, height, width)

        hooks = []
        with _Replaced() as replaced:
            for module in model.modules():
                if isinstance(module, (DeformConv2d, ModulatedDeformConv2d)):
                    hooks.append(module.register_forward_hook(deform))
                elif isinstance(module, CARAFEPack):
                    replaced.set(module, 'feature_reassemble', reassemble)
                elif isinstance(module, PSAMask):
                    replaced.set(module, 'forward', spread)
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()


class _Replaced:
    """Methods of modules replaced until the end of a with block."""

    def __init__(self) -> None:
        self._set = []

    def set(self, module: nn.Module, name: str, method: Callable) -> None:
        setattr(module, name, partial(method, module))
        self._set.append((module, name))

    def __enter__(self) -> _Replaced:
        return self

    def __exit__(self, *args: object) -> None:
        for module, name in self._set:
            module.__dict__.pop(name, None)


@contextmanager
def _given_boxes(model: nn.Module) -> Iterator[None]:
    """Let a two-stage detector propose boxes, and cut them out, as shapes only."""
    from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
    from mmengine.structures import InstanceData

    def extract(
        extractor: nn.Module,
        feats: tuple[Tensor],
        rois: Tensor,
        *args: object,
        **kwargs: object,
    ) -> Tensor:
        # RoIAlign only interpolates.
        size = extractor.roi_layers[0].output_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        return feats[0].new_zeros(len(rois), extractor.out_channels, *size)

    def propose(
        rpn: nn.Module, feats: tuple[Tensor], *args: object, **kwargs: object
    ) -> list:
        rpn(feats)
        count = holders[rpn].test_cfg.rpn.max_per_img
        return [InstanceData(bboxes=feats[0].new_zeros(count, 4))]

    holders = {}
    with _Replaced() as replaced:
        extractors = [m for m in model.modules() if isinstance(m, SingleRoIExtractor)]
        for extractor in extractors:
            replaced.set(extractor, 'forward', extract)
        # More than one where teacher and student are detectors.
        for holder in model.modules() if extractors else ():
            rpn = getattr(holder, 'rpn_head', None)
            # Where queries stand in the place of an RPN, it has no such settings.
            if rpn is not None and (getattr(holder, 'test_cfg', None) or {}).get('rpn'):
                holders[rpn] = holder
                replaced.set(rpn, 'predict', propose)
        yield


def _data_samples(shape: tuple[int, int], device: torch.device) -> list:
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    keys = ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape')
    meta = dict.fromkeys(keys, shape)
    sample = DetDataSample(metainfo=dict(scale_factor=(1.0, 1.0), **meta))
    # Some ask for objects outside of training too, others for their proposals.
    sample.gt_instances = InstanceData(
        bboxes=torch.zeros(0, 4, device=device),
        labels=torch.zeros(0, dtype=torch.long, device=device),
    )
    sample.proposals = InstanceData(
        bboxes=torch.zeros(GIVEN_PROPOSALS, 4, device=device)
    )
    return [sample]
