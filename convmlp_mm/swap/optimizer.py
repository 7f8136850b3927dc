"""Carry the special rules of an optimizer over to another backbone."""

from mmengine.config import Config
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from ..convmlp import ConvMLP
from .rewire import Report

# Constructors of mmdet and mmseg, which know their own backbones only.
DECAYS = ('LearningRateDecayOptimizerConstructor', 'LayerDecayOptimizerConstructor')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class BackboneDecayConstructor(DefaultOptimWrapperConstructor):
    """Learning rates that decay with the depth of the backbone, as in BEiT.

    The rate of a layer is ``layer_decay_rate`` of ``paramwise_cfg`` to the power of the
    layers after it in the backbone, see :meth:`ConvMLP.get_layer_depth`. Biases and
    norms have no weight decay.
    """

    def add_params(self, params: list[dict], module: nn.Module, **kwargs) -> None:
        """Make a group for each layer of the backbone, with and without decay."""
        rate, groups = self.paramwise_cfg['layer_decay_rate'], {}
        for name, param in module.named_parameters():
            if not param.requires_grad:
                continue
            layer, number = module.backbone.get_layer_depth(name, 'backbone.')
            scale, decays = rate ** (number - 1 - layer), param.ndim > 1
            decay = {} if decays else dict(weight_decay=0.0)
            new = dict(params=[], lr=self.base_lr * scale, lr_scale=scale, **decay)
            groups.setdefault((layer, decays), new)['params'].append(param)
        params.extend(groups.values())


def carry_over(cfg: Config, backbone: ConvMLP, report: Report) -> None:
    """Replace layer-wise decay, and drop rules for parameters that are no longer."""
    wrapper = cfg.get('optim_wrapper') or {}
    settings = wrapper.get('paramwise_cfg') or {}
    kind = str(wrapper.get('constructor')).rpartition('.')[2]
    if kind in DECAYS:
        rate = settings.get('layer_decay_rate') or settings.get('decay_rate')
        wrapper.constructor = 'BackboneDecayConstructor'
        wrapper.paramwise_cfg = dict(layer_decay_rate=rate)
        report.append(f'optim_wrapper: {kind} -> BackboneDecayConstructor, {rate}')
        return
    keys = settings.get('custom_keys') or {}
    names = [f'backbone.{name}' for name, _ in backbone.named_parameters()]
    # Of the old backbone alone are what it names, and the usual parts of transformers.
    usual = ('absolute_pos_embed', 'relative_position_bias_table', 'pos_embed')
    old = [k for k in keys if k.startswith('backbone.') or k.strip('.') in usual]
    dropped = [k for k in old if not any(k in name for name in names)]
    for key in dropped:
        keys.pop(key)
    if dropped:
        report.append(f'optim_wrapper: no rule for {", ".join(dropped)}')
