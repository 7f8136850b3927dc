"""Hooks that change or check the model before it runs."""

from __future__ import annotations

import os.path as osp

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, Runner
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..checkpoint_io import CheckpointError, check_content
from ..convmlp import ConvMLP
from ..layouts import without_module
from ..weights import check_tensors, fit_checkpoint
from .latest import check_resumable, named_checkpoint
from .saving import keep_own_files

__all__ = [
    'ChannelsLastHook',
    'CheckWeightsHook',
    'CompileBackboneHook',
    'use_channels_last',
]


def _unwrap(model: nn.Module) -> nn.Module:
    """Return the model in DDP and in test-time augmentation."""
    while not hasattr(model, 'backbone') and hasattr(model, 'module'):
        model = model.module
    return model


@HOOKS.register_module(force=True)
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
        name = runner._load_from or named_checkpoint(runner.work_dir) or ''
        model = _unwrap(runner.model)
        check_content(checkpoint, name)
        if (checkpoint.get('meta') or {}).pop('config', None) is not None:
            print_log(f'meta.config of {name} is not read.', logger='current')
        if runner._resume:
            # DeepSpeed saves a folder.
            if 'state_dict' in checkpoint or not osp.isdir(name):
                self._check_resumed(runner, model, checkpoint, name)
            return
        if not isinstance(getattr(model, 'backbone', None), ConvMLP):
            check_tensors(without_module(checkpoint), name)
            return
        training = isinstance(runner._train_loop, BaseLoop)
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


def use_channels_last(model: nn.Module) -> None:
    """Put a model into the layout of the maps of :class:`ConvMLP`.

    The logits of mmseg's heads leave it in training: the loss wants one map for each
    class, and would else copy them after they have been enlarged to the size of the
    picture, sixteen times as large.

    Args:
        model (nn.Module): It is changed: the layout of its weights, and a forward
            hook on each ``conv_seg``.
    """
    model.to(memory_format=torch.channels_last)
    for name, module in model.named_modules():
        if name.rpartition('.')[2] == 'conv_seg' and not module._forward_hooks:
            module.register_forward_hook(_logits_for_loss)


def _logits_for_loss(module: nn.Module, inputs: tuple, logits: Tensor) -> Tensor:
    return logits.contiguous() if module.training else logits


@HOOKS.register_module(force=True)
class ChannelsLastHook(Hook):
    """Put the weights of neck and head into the layout of the backbone's maps.

    A convolution of channels-last maps answers in channels-last, but has to bring
    contiguous weights into that layout again in every forward, and its gradients
    into that of the weights: 2.4 MB for each use of a 3x3 convolution of 256
    channels, which the head of RetinaNet makes 40 times.
    """

    # Before EMAHook copies the model.
    priority = 'VERY_HIGH'

    def before_run(self, runner: Runner) -> None:
        """Change the layout of the model's weights in place.

        DDP has made its buckets by then, with the strides of the old layout, and
        would give wrong gradients of every changed weight: in the first step, and
        with ``find_unused_parameters`` in all. It is therefore made again, around
        the same parameters. (The strategies of the FlexibleRunner keep what they
        have wrapped; there, the layout stays as it is.)

        Args:
            runner (Runner): The runner.
        """
        model = runner.model
        if not is_model_wrapper(model):
            use_channels_last(model)
        elif isinstance(model, DistributedDataParallel) and hasattr(
            runner, 'wrap_model'
        ):
            inner = model.module
            layouts = [p.stride() for p in inner.parameters()]
            use_channels_last(inner)
            # The loops of a runner call this hook once each.
            if layouts != [p.stride() for p in inner.parameters()]:
                runner.model = runner.wrap_model(
                    runner.cfg.get('model_wrapper_cfg'), inner
                )


def _inductor_options() -> dict:
    """Return what torch 2.14 needs where outputs are views of unknown size.

    Channels-last maps are; it fails to sort their strides in training.
    """
    from torch._inductor import config

    name = 'strict_output_strides'
    return {name: True} if hasattr(config, name) else {}


@HOOKS.register_module(force=True)
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
        backbone = getattr(_unwrap(runner.model), 'backbone', None)
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
