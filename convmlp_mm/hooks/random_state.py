"""The random numbers of a process, as tensors that a checkpoint can carry."""

from __future__ import annotations

import random

import numpy as np
import torch
from mmengine.device import get_device

__all__ = ['get_random_state', 'set_random_state']


def _accelerator():
    """Return torch.cuda or what stands for it on this machine; None on a CPU."""
    module = getattr(torch, get_device(), None)
    return module if hasattr(module, 'get_rng_state') else None


def get_random_state() -> dict:
    """Read the states of Python, numpy, torch and the process's own device.

    Returns:
        dict: Tensors and numbers, which :func:`torch.load` reads without unpickling
        anything else.
    """
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state = dict(
        python=(version, torch.tensor(words), gauss),
        numpy=(
            kind,
            torch.from_numpy(keys.astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ),
        torch=torch.get_rng_state(),
    )
    accelerator = _accelerator()
    if accelerator is not None:
        state['device'] = accelerator.get_rng_state()
    return state


def set_random_state(state: dict) -> None:
    """Set what :func:`get_random_state` has read.

    Args:
        state (dict): Its result; the state of a device is left out where there is none.
    """
    version, words, gauss = state['python']
    random.setstate((version, tuple(words.tolist()), gauss))
    kind, keys, position, has_gauss, cached = state['numpy']
    keys = keys.cpu().numpy().astype(np.uint32)
    np.random.set_state((kind, keys, position, has_gauss, cached))
    torch.set_rng_state(state['torch'].cpu())
    accelerator = _accelerator()
    if accelerator is not None and 'device' in state:
        accelerator.set_rng_state(state['device'].cpu())
