"""Mixed precision where mmengine has none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner.amp import autocast
from torch import nn

__all__ = ['BFloat16OptimWrapper', 'has_bfloat16']


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

    bfloat16 has the range of float32, so that no loss is scaled; that is all that
    ``AmpOptimWrapper``, which refuses the CPU, has besides. The tools take this
    wrapper on a CPU where ``AmpOptimWrapper`` has ``dtype='bfloat16'``.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Run the forward pass in mixed precision.

        Args:
            model (nn.Module): The model.

        Yields:
            None: In the context.
        """
        with super().optim_context(model), autocast(dtype=torch.bfloat16):
            yield
