"""FSDP of mmengine's FlexibleRunner, such that its checkpoints are of use."""

from __future__ import annotations

import torch
from mmengine._strategy import FSDPStrategy
from mmengine.device import get_device
from mmengine.registry import STRATEGIES
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ..convmlp import ConvMLPStage

__all__ = ['FullStateFSDPStrategy', 'wrap_stages']


def wrap_stages(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """Let FSDP gather one MLP stage of the backbone at a time, and then the rest.

    Args:
        module (Module): The module in question.
        recurse (bool): Whether the question is if its parts are to be asked.
        nonwrapped_numel (int): Not used.

    Returns:
        bool: The answer.
    """
    return recurse or isinstance(module, ConvMLPStage)


@STRATEGIES.register_module(force=True)
class FullStateFSDPStrategy(FSDPStrategy):
    """Shard the model over the processes, and save it as one process has it.

    mmengine's ``FSDPStrategy`` saves a shard for each process, which only as many
    processes can load; hands torch the state of the optimizer in an order that torch
    changed in 2.1, so that nothing can be resumed; and asks for a GPU.

    Args:
        state_dict_cfg (str or dict): What is saved. Defaults to ``'full'``, one file
            that the Runner loads too, without FSDP.
        kwargs: See ``FSDPStrategy``, of which ``model_wrapper`` says what is sharded.
            Its ``auto_wrap_policy`` is :func:`wrap_stages` by default. Policies that
            go by size do not work for detectors: heads are called by methods other
            than ``forward``, which FSDP does not see.
    """

    def __init__(self, *, state_dict_cfg: str | dict = 'full', **kwargs) -> None:
        super().__init__(state_dict_cfg=state_dict_cfg, **kwargs)
        if state_dict_cfg == 'full':
            # In all processes: CheckWeightsHook compares files with it, and where
            # mmengine's setting leaves it empty, nothing would be loaded.
            self.state_dict_config.rank0_only = False
            # And what each process has read, torch need not broadcast.
            self.optim_state_dict_config.rank0_only = False

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        self.model_wrapper = dict(
            dict(type='MMFullyShardedDataParallel', auto_wrap_policy=wrap_stages),
            **(self.model_wrapper or {}),
        )
        if get_device() == 'cpu':
            # By default the number of a GPU.
            self.model_wrapper.setdefault('device_id', 'cpu')
            # There, torch takes buffers that it will use again for copies on another
            # device: 2.14 saves exp_avg_sq for exp_avg too, 2.2 reads freed memory.
            self.state_dict_config.offload_to_cpu = False
            self.optim_state_dict_config.offload_to_cpu = False
        # Of weights in channels-last layout, torch loads the optimizer's state in
        # another order than it saves it.
        model.to(memory_format=torch.contiguous_format)
        return super()._wrap_model(model)

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Load the state of the optimizer.

        Args:
            state_dict (dict): As ``optim_state_dict`` returns it, of all parameters.
        """
        self.optim_wrapper.load_state_dict(
            FullyShardedDataParallel.optim_state_dict_to_load(
                model=self.model,
                optim=self.optim_wrapper.optimizer,
                optim_state_dict=state_dict,
            )
        )
