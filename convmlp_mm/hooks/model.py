"""What changes or checks the model before it runs, and bfloat16 on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, OPTIM_WRAPPERS
from mmengine.runner import Runner
from mmengine.runner.amp import autocast
from mmengine.utils import digit_version
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..checkpoint import (
    CheckpointError,
    check_content,
    check_tensors,
    fit_checkpoint,
    without_module,
)
from ..convmlp import ConvMLP
from ._mmengine import is_resumed, is_training, load_from
from .checkpoint import check_resumable, keep_own_files, named_checkpoint


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model in DDP and in test-time augmentation."""
    while not hasattr(model, 'backbone') and hasattr(model, 'module'):
        model = model.module
    return model


@HOOKS.register_module()
class CheckWeightsHook(Hook):
    """Check the checkpoints of a run, and take published files as they are.

    The Runner loads a checkpoint as far as names and shapes match and warns about the
    rest. With this hook a backbone that is not all there stops the run, and a published
    classifier gets the names of the model. Training may start without neck and head;
    testing may not. Of models without ConvMLP only the values are checked, but a run is
    resumed from its own model only, whatever that is.

    Nothing in a checkpoint is acted upon: the configuration that toolkits up to 2021
    noted there, which the Runner would execute, is dropped, and so are the names of
    files that are not the run's own, which it would remove in time.
    """

    # This hook must run before EMAHook reads the checkpoint.
    priority = 'VERY_HIGH'

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Change the checkpoint in place; raise a CheckpointError if it is unfit."""
        # mmengine, too, takes what is noted in the work dir if nothing is named.
        name = load_from(runner) or named_checkpoint(runner.work_dir) or ''
        model = unwrap_model(runner.model)
        check_content(checkpoint, name)
        if (checkpoint.get('meta') or {}).pop('config', None) is not None:
            print_log(f'meta.config of {name} is not read.', logger='current')
        if is_resumed(runner):
            try:
                check_resumable(checkpoint)
            except ValueError as error:
                raise CheckpointError(
                    f'checkpoint {name!r} cannot be resumed: {error}'
                ) from error
            # EMAHook has saved the average as the one, and the model as the other.
            for key in ('state_dict', 'ema_state_dict'):
                if key in checkpoint:
                    weights = dict(checkpoint[key] or {})
                    # The count of EMAHook is no weight.
                    weights.pop('steps', None)
                    fit_checkpoint(model, dict(state_dict=weights), name, exact=True)
            keep_own_files(runner, checkpoint['message_hub']['runtime_info'], name)
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


# These classes compute the same values from channels-last maps as from contiguous ones,
# to which tests/test_layout.py holds them. Any other neck or head gets contiguous maps.
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
# The backward pass of GroupNorm in bfloat16 fails on channels-last maps in torch 2.2.
OLD_TORCH = digit_version(torch.__version__) < digit_version('2.4')


def needs_contiguous(model: nn.Module) -> str | None:
    """Name the part of a model that has not been shown to take channels-last maps.

    mmcv's operators (RoIAlign, deformable convolutions and others) read the memory of
    a map as if it were contiguous: some refuse any other layout, most compute wrong
    values without a word. Other heads call ``view``, which fails.

    None stands for a model all of whose parts do.
    """
    parts = {'': model, **dict(model.named_children())}
    for name, part in parts.items():
        package = type(part).__module__.partition('.')[0]
        kind = f'{package}.{type(part).__name__}'
        if name not in ('data_preprocessor', 'backbone') and kind not in ANY_LAYOUT:
            return kind
    if OLD_TORCH and any(isinstance(m, nn.GroupNorm) for m in model.modules()):
        return 'torch.GroupNorm'
    return operator_of_mmcv(model)


def operator_of_mmcv(model: nn.Module) -> str | None:
    """Name the first of mmcv's operators in a model, such as ``'mmcv.RoIAlign'``."""
    kinds = (type(module) for module in model.modules())
    names = (f'mmcv.{k.__name__}' for k in kinds if k.__module__.startswith('mmcv.ops'))
    return next(names, None)


def use_channels_last(model: nn.Module) -> bool:
    """Keep the maps of a :class:`ConvMLP` channels-last up to the end of the model.

    The images come to the backbone in that layout, so that its maps have it, and the
    weights of neck and head get it. The logits of mmseg's heads leave it in training:
    the loss wants one map for each class, and would else copy them when they have been
    enlarged to the size of the image, sixteen times as large.

    Returns:
        Whether the model works in channels-last memory: it is not changed if its
        backbone is another or :func:`needs_contiguous` names a part of it.
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

    A convolution of channels-last maps would bring contiguous weights into that layout
    in every forward, and their gradients back: 2.4 MB for each use of a 3x3 convolution
    of 256 channels, which the head of RetinaNet makes 40 times. A model of which
    :func:`needs_contiguous` names a part stays as without the hook.
    """

    # This hook must run before EMAHook copies the model.
    priority = 'VERY_HIGH'

    def before_run(self, runner: Runner) -> None:
        """Change the layout of the model's weights in place."""
        model = runner.model
        inner = unwrap_model(model)
        if not isinstance(getattr(inner, 'backbone', None), ConvMLP):
            return
        layouts = [p.stride() for p in inner.parameters()]
        if not use_channels_last(inner):
            runner.logger.info(
                f'{needs_contiguous(inner)} gets contiguous maps: it has not been '
                'shown to compute the same from channels-last ones.'
            )
        # DDP has made its buckets with the strides of the old layout, and would give
        # wrong gradients of every changed weight: in the first step, and with
        # find_unused_parameters in all. It is made again, around the same parameters;
        # but once, though each loop of a runner calls this hook.
        changed = layouts != [p.stride() for p in inner.parameters()]
        if changed and isinstance(model, DistributedDataParallel):
            wrapper = runner.cfg.get('model_wrapper_cfg')
            runner.model = runner.wrap_model(wrapper, model.module)


def compile_backbone(backbone: nn.Module, options: dict) -> None:
    """Compile a backbone in place by ``torch.compile``, when it first runs."""
    if options.get('backend', 'inductor') == 'inductor' and 'mode' not in options:
        from torch._inductor import config

        # torch 2.14 fails to sort the strides of outputs that are views of unknown
        # size in training, as channels-last maps are. Older ones have no such key.
        if hasattr(config, 'strict_output_strides'):
            inner = {'strict_output_strides': True, **options.get('options', {})}
            options = {**options, 'options': inner}
    backbone.compile(**options)


@HOOKS.register_module()
class CompileBackboneHook(Hook):
    """Compile the backbone where the configuration says ``compile``.

    The key is mmengine's, which compiles ``train_step`` as a whole: of a detector that
    is dozens of graphs, which are compiled again with each number of objects until the
    compiler gives up, and nothing in a test. With this hook it is one graph, of the
    backbone alone, in training and in testing, and from the second size of images on
    one for all sizes. ``compile`` is True or the arguments of ``torch.compile``.
    """

    # This hook must run before EMAHook copies the model and mmengine looks for the key.
    priority = 'VERY_HIGH'

    def before_run(self, runner: Runner) -> None:
        """Compile in place, and take the key from mmengine."""
        options = runner.cfg.get('compile')
        if options is True:
            options = {}
        backbone = getattr(unwrap_model(runner.model), 'backbone', None)
        # mmengine refuses what is neither a bool nor a dict.
        if not isinstance(backbone, ConvMLP) or not isinstance(options, dict):
            return
        compile_backbone(backbone, dict(options))
        # The loops of a runner call this hook once each.
        runner.cfg.compile = None
        runner.logger.info(
            'The backbone is compiled when it first runs, which takes a while.'
        )


def has_bfloat16() -> bool:
    """Tell whether this processor multiplies matrices in bfloat16 (Linux only)."""
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            flags = set(file.read().split())
    except OSError:
        return False
    return not flags.isdisjoint({'amx_bf16', 'avx512_bf16', 'bf16'})


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Train with ``torch.autocast`` in bfloat16, on a CPU too.

    bfloat16 has the range of float32, so that no loss is scaled. The tools take this
    wrapper where ``AmpOptimWrapper``, which refuses the CPU, has ``dtype='bfloat16'``.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), autocast(dtype=torch.bfloat16):
            yield
