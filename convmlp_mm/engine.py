"""What mmengine's Runner lacks: hooks for ``custom_hooks`` of a configuration."""

from __future__ import annotations

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, Runner

from .convmlp import ConvMLP
from .weights import fit_checkpoint

__all__ = ['ChannelsLastHook', 'CheckWeightsHook']


@HOOKS.register_module(force=True)
class CheckWeightsHook(Hook):
    """Check what ``load_from`` names, and take published files as they are.

    The Runner loads a checkpoint as far as names and shapes match and warns
    about the rest. With this hook a backbone that is not all there stops the
    run, and a published classifier gets the names of the model. Training may
    start without neck and head; testing may not. Models without ConvMLP, and
    checkpoints that a run is resumed from, are left alone.
    """

    # Before EMAHook reads the checkpoint.
    priority = 'VERY_HIGH'

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Change the checkpoint in place.

        Args:
            runner (Runner): The runner.
            checkpoint (dict): What the file holds.

        Raises:
            ValueError: See :func:`convmlp_mm.weights.fit_checkpoint`.
        """
        model = runner.model
        while not hasattr(model, 'backbone') and hasattr(model, 'module'):
            # Of DDP and of test-time augmentation.
            model = model.module
        if runner._resume or not isinstance(getattr(model, 'backbone', None), ConvMLP):
            return
        training = isinstance(runner._train_loop, BaseLoop)
        state_dict, message = fit_checkpoint(
            model, checkpoint, runner._load_from, partial=training
        )
        print_log(message, logger='current')
        if 'state_dict' not in checkpoint:
            checkpoint.clear()
        checkpoint['state_dict'] = state_dict
        # EMAHook has saved the average as state_dict, and takes it from there.
        checkpoint.pop('ema_state_dict', None)


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

        DDP has made its buckets by then, in the old layout, and makes them again
        after the first step.

        Args:
            runner (Runner): The runner.
        """
        runner.model.to(memory_format=torch.channels_last)
