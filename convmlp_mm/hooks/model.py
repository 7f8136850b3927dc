"""Hooks that change or check the model before it runs."""

from __future__ import annotations

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.utils import digit_version
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..checkpoint_io import CheckpointError, check_content
from ..convmlp import ConvMLP
from ..layouts import without_module
from ..weights import check_tensors, fit_checkpoint
from ._mmengine import is_resumed, is_training, load_from
from .latest import check_resumable, named_checkpoint
from .saving import keep_own_files

__all__ = [
    'ChannelsLastHook',
    'CheckWeightsHook',
    'CompileBackboneHook',
    'needs_contiguous',
    'operator_of_mmcv',
    'unwrap_model',
    'use_channels_last',
]


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model in DDP and in test-time augmentation."""
    while not hasattr(model, 'backbone') and hasattr(model, 'module'):
        model = model.module
    return model


@HOOKS.register_module()
class CheckWeightsHook(Hook):
    """Check the checkpoints of a run, and take published files as they are.

    The Runner loads a checkpoint as far as names and shapes match and warns
    about the rest. With this hook a backbone that is not all there stops the
    run, and a published classifier gets the names of the model. Training may
    start without neck and head; testing may not. Of models without ConvMLP only the
    values are checked, but a run is resumed from its own model only, whatever that is.

    Nothing in a checkpoint is acted upon: the configuration that toolkits up to 2021
    noted there, which the Runner would execute, is dropped, and so are the names of
    files that are not the run's own, which it would remove in time.
    """

    # Before EMAHook reads the checkpoint.
    priority = 'VERY_HIGH'

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Change the checkpoint in place.

        Args:
            runner (Runner): The runner.
            checkpoint (dict): What the file holds.

        Raises:
            ValueError: See :func:`convmlp_mm.weights.fit_checkpoint`, and if a run
                cannot be resumed from it.
        """
        # mmengine, too, takes what is noted in the work dir if nothing is named.
        name = load_from(runner) or named_checkpoint(runner.work_dir) or ''
        model = unwrap_model(runner.model)
        check_content(checkpoint, name)
        if (checkpoint.get('meta') or {}).pop('config', None) is not None:
            print_log(f'meta.config of {name} is not read.', logger='current')
        if is_resumed(runner):
            self._check_resumed(runner, model, checkpoint, name)
            return
        if not isinstance(getattr(model, 'backbone', None), ConvMLP):
            check_tensors(without_module(checkpoint), name)
            return
        training = is_training(runner)
        state_dict, message = fit_checkpoint(model, checkpoint, name, partial=training)
        print_log(message, logger='current')
        if 'state_dict' not in checkpoint:
            checkpoint.clear()
        checkpoint['state_dict'] = state_dict
        # EMAHook has saved the average as state_dict, and takes it from there.
        checkpoint.pop('ema_state_dict', None)

    def _check_resumed(
        self, runner: Runner, model: nn.Module, checkpoint: dict, name: str
    ) -> None:
        try:
            check_resumable(checkpoint)
        except ValueError as error:
            raise CheckpointError(
                f'checkpoint {name!r} cannot be resumed: {error}'
            ) from error
        # EMAHook has saved the average as the one, and the model as the other.
        for key in ('state_dict', 'ema_state_dict'):
            if key in checkpoint:
                state_dict = {**(checkpoint[key] or {})}
                # The count of EMAHook.
                state_dict.pop('steps', None)
                fit_checkpoint(model, dict(state_dict=state_dict), name, exact=True)
        keep_own_files(runner, checkpoint['message_hub']['runtime_info'], name)


# What computes the same values from channels-last maps as from contiguous ones, which
# tests/test_layout.py holds. Any other neck or head gets contiguous maps.
ANY_LAYOUT = (
    'mmdet.RetinaNet',
    'mmdet.FPN',
    'mmdet.RetinaHead',
    'mmseg.EncoderDecoder',
    'mmseg.FPN',
    'mmseg.FPNHead',
    'mmpretrain.ImageClassifier',
    'mmpretrain.GlobalAveragePooling',
    'mmpretrain.LinearClsHead',
)
# In the backward pass of torch 2.2, GroupNorm in bfloat16 fails on channels-last maps.
OLD_TORCH = digit_version(torch.__version__) < digit_version('2.4')


def needs_contiguous(model: nn.Module) -> str | None:
    """Name the part of a model that has not been shown to take channels-last maps.

    mmcv's operators (RoIAlign, deformable convolutions and others) read the memory of
    a map as if it were contiguous: some refuse any other layout, most compute wrong
    values without a word. Other heads call ``view``, which fails.

    Args:
        model (nn.Module): A model of mmpretrain, mmdet or mmseg.

    Returns:
        str | None: The class, or None if every part takes any layout.
    """
    parts = [model]
    for name, child in model.named_children():
        if name not in ('data_preprocessor', 'backbone'):
            parts.append(child)
    for part in parts:
        package = type(part).__module__.partition('.')[0]
        kind = f'{package}.{type(part).__name__}'
        if kind not in ANY_LAYOUT:
            return kind
    if OLD_TORCH and any(isinstance(m, nn.GroupNorm) for m in model.modules()):
        return 'torch.GroupNorm'
    return operator_of_mmcv(model)


def operator_of_mmcv(model: nn.Module) -> str | None:
    """Name the first of mmcv's operators in a model; they take contiguous maps only.

    Args:
        model (nn.Module): Any model.

    Returns:
        str | None: The class, such as ``'mmcv.RoIAlign'``, or None.
    """
    for module in model.modules():
        if type(module).__module__.startswith('mmcv.ops'):
            return f'mmcv.{type(module).__name__}'
    return None


def use_channels_last(model: nn.Module) -> bool:
    """Keep the maps of a :class:`ConvMLP` channels-last up to the end of the model.

    The images come to the backbone in that layout, so that its maps have it, and the
    weights of neck and head get it. The logits of mmseg's heads leave it in training:
    the loss wants one map for each class, and would else copy them after they have
    been enlarged to the size of the image, sixteen times as large.

    Args:
        model (nn.Module): It is changed, unless its backbone is another or
            :func:`needs_contiguous` names a part of it.

    Returns:
        bool: Whether the model works in channels-last memory.
    """
    backbone = getattr(model, 'backbone', None)
    if not isinstance(backbone, ConvMLP) or needs_contiguous(model):
        return False
    if not getattr(backbone, 'gets_channels_last', False):
        # An attribute, so that a copy of the model knows it, too.
        backbone.gets_channels_last = True
        backbone.register_forward_pre_hook(_images_channels_last)
        if hasattr(getattr(model, 'decode_head', None), 'conv_seg'):
            model.decode_head.conv_seg.register_forward_hook(_logits_for_loss)
        model.to(memory_format=torch.channels_last)
    return True


def _images_channels_last(module: nn.Module, inputs: tuple) -> tuple:
    return tuple(x.contiguous(memory_format=torch.channels_last) for x in inputs)


def _logits_for_loss(module: nn.Module, inputs: tuple, logits: Tensor) -> Tensor:
    return logits.contiguous() if module.training else logits


@HOOKS.register_module()
class ChannelsLastHook(Hook):
    """Let neck and head work in the layout that the backbone computes in.

    A convolution of channels-last maps answers in channels-last, but has to bring
    contiguous weights into that layout again in every forward, and its gradients
    into that of the weights: 2.4 MB for each use of a 3x3 convolution of 256
    channels, which the head of RetinaNet makes 40 times.

    Only necks and heads that have been shown to compute the same are changed (see
    :func:`needs_contiguous`); all others get contiguous maps from the backbone, as if
    the hook were not there.
    """

    # Before EMAHook copies the model.
    priority = 'VERY_HIGH'

    def before_run(self, runner: Runner) -> None:
        """Change the layout of the model's weights in place.

        DDP has made its buckets by then, with the strides of the old layout, and
        would give wrong gradients of every changed weight: in the first step, and
        with ``find_unused_parameters`` in all. It is therefore made again, around
        the same parameters.

        Args:
            runner (Runner): The runner.
        """
        model = runner.model
        inner = unwrap_model(model)
        if not isinstance(getattr(inner, 'backbone', None), ConvMLP):
            return
        part = needs_contiguous(inner)
        if part is not None:
            runner.logger.info(
                f'{part} gets contiguous maps: it has not been shown to compute the '
                'same from channels-last ones.'
            )
        elif not is_model_wrapper(model):
            use_channels_last(inner)
        elif isinstance(model, DistributedDataParallel):
            layouts = [p.stride() for p in inner.parameters()]
            use_channels_last(inner)
            # The loops of a runner call this hook once each.
            if layouts != [p.stride() for p in inner.parameters()]:
                runner.model = runner.wrap_model(
                    runner.cfg.get('model_wrapper_cfg'), model.module
                )


def _inductor_options() -> dict:
    """Return what torch 2.14 needs where outputs are views of unknown size.

    Channels-last maps are; it fails to sort their strides in training.
    """
    from torch._inductor import config

    name = 'strict_output_strides'
    return {name: True} if hasattr(config, name) else {}


@HOOKS.register_module()
class CompileBackboneHook(Hook):
    """Compile the backbone where the configuration says ``compile``.

    The key is mmengine's, which compiles ``train_step`` as a whole: of a detector
    that is dozens of graphs, which are compiled again with each number of objects
    until the compiler gives up, and nothing in a test. With this hook it is one
    graph, of the backbone alone, in training and in testing. ``compile`` is True or
    the arguments of ``torch.compile``.

    The second size of images is compiled for all sizes (``dynamic`` of
    ``torch.compile``), so that others need no graph of their own.
    """

    # Before EMAHook copies the model, and before mmengine looks for the key.
    priority = 'VERY_HIGH'

    def before_run(self, runner: Runner) -> None:
        """Compile in place, and take the key from mmengine.

        Args:
            runner (Runner): The runner.

        Raises:
            TypeError: If ``compile`` is neither a bool nor a dict.
        """
        options = runner.cfg.get('compile')
        if options is not None and not isinstance(options, (bool, dict)):
            raise TypeError(
                'compile of the configuration must be True, False or a dict of the '
                f'arguments of torch.compile, but got {options!r}'
            )
        # The loops of a runner call this hook once each.
        backbone = getattr(unwrap_model(runner.model), 'backbone', None)
        if not isinstance(backbone, ConvMLP) or options is None or options is False:
            return
        options = {} if options is True else dict(options)
        if options.get('backend', 'inductor') == 'inductor' and 'mode' not in options:
            options['options'] = {**_inductor_options(), **options.get('options', {})}
        backbone.compile(**options)
        runner.cfg.compile = None
        runner.logger.info(
            'The backbone is compiled when it first runs, which takes a while.'
        )
