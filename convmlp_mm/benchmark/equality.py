"""Put the published structure in the place of a backbone that computes the same."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..convmlp import ConvMLP
from .published import PublishedConvMLP

__all__ = ['check_equal', 'replace_backbone']

# Largest difference over the largest value, in float64.
TOLERANCE = 1e-6


def replace_backbone(model: nn.Module, settings: Mapping) -> None:
    """Put the published structure in the place of a model's backbone.

    It gets the weights of the backbone, and is checked to compute the same.

    Args:
        model (nn.Module): With a :class:`convmlp_mm.ConvMLP` as ``backbone``.
        settings (Mapping): The backbone's configuration.

    Raises:
        TypeError: If the backbone is another.
        ValueError: If the release has no such backbone, or if it does not compute
            the same.
    """
    ours = model.backbone
    if not isinstance(ours, ConvMLP):
        raise TypeError(
            "'published' replaces a ConvMLP backbone, but the model has "
            f'{type(ours).__name__}'
        )
    settings = {k: v for k, v in settings.items() if k not in ('type', '_scope_')}
    published = PublishedConvMLP(**settings)
    published.load_state_dict(ours.state_dict())
    published.train(ours.training)
    check_equal(ours, published)
    model.backbone = published


def check_equal(ours: nn.Module, published: nn.Module, size: int = 64) -> None:
    """Check that two backbones compute the same.

    In float64, from drawn BN statistics: the outputs in evaluation mode, and in
    training mode, with the same stochastic depth, outputs, gradients and the BN
    statistics thereafter. Neither is changed.

    Args:
        ours (nn.Module): A backbone.
        published (nn.Module): Another with the same names of weights.
        size (int): Height and width of the two pictures. Defaults to 64.

    Raises:
        ValueError: If the weights differ, or the outputs, gradients or statistics
            by more than 1e-6 of the largest value; the message names the first.
    """
    for name, value in ours.state_dict().items():
        other = published.state_dict().get(name)
        if other is None or not torch.equal(value, other):
            raise ValueError(f'the published structure has another {name}')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        image = torch.randn(2, ours.in_channels, size, size, dtype=torch.float64)
        first, second = _compute(ours, image), _compute(published, image)
    for name, value in first.items():
        other = second.get(name)
        if other is None or other.shape != value.shape:
            raise ValueError(f'the published structure has no such {name}')
        difference = (value - other).abs().max() / value.abs().max().clamp(min=1e-300)
        if not difference <= TOLERANCE:
            raise ValueError(
                f'the published structure does not compute the same: {name} differs '
                f'by {difference:.1e} of its largest value'
            )


def _compute(backbone: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Run a copy in both modes; what it computes, by name."""
    backbone = copy.deepcopy(backbone).cpu().double()
    norms = [m for m in backbone.modules() if isinstance(m, _BatchNorm)]
    torch.manual_seed(1)
    for norm in norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 1.5)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    found = {}
    backbone.eval()
    with torch.no_grad():
        for i, out in enumerate(backbone(image)):
            found[f'output {i}'] = out
    backbone.train()
    image = image.clone().requires_grad_()
    # For stochastic depth.
    torch.manual_seed(2)
    outs = backbone(image)
    sum((out * out).mean() for out in outs).backward()
    for i, out in enumerate(outs):
        found[f'output {i} of training'] = out.detach()
    found['gradient of the image'] = image.grad
    for name, parameter in backbone.named_parameters():
        if parameter.grad is not None:
            found[f'gradient of {name}'] = parameter.grad
    for name, buffer in backbone.named_buffers():
        found[f'buffer {name} after training'] = buffer.double()
    return found
