"""ConvMLP: a hierarchical backbone of convolutions and channel MLPs.

Paper: Li, Hassani, Walton, Shi, `ConvMLP: Hierarchical Convolutional MLPs for
Vision <https://arxiv.org/abs/2109.04454>`_. The authors' own code and weights:
https://github.com/SHI-Labs/Convolutional-MLPs. Parameter names here are those
of the published weights, so that they load without renaming; the code is new.

The file reads from small to large: channel MLP, Conv-MLP block,
down-samplings, tokenizer, stages, the table of architectures, the backbone.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmcv.cnn import fuse_conv_bn
from mmcv.cnn.bricks import DropPath, build_activation_layer, build_norm_layer
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.model.weight_init import PretrainedInit, update_init_info
from mmengine.registry import MODELS
from mmengine.utils import digit_version
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from .checkpoint import load_backbone_weights

if hasattr(torch.compiler, 'is_compiling'):
    from torch.compiler import is_compiling
else:
    from torch._utils import is_compiling
# In a compiled checkpoint, torch 2.2 loses updates of buffers, and 2.8 repeats them.
COMPILES_CHECKPOINTS = digit_version(torch.__version__) >= digit_version('2.12')

__all__ = ['ConvMLP']

# Read-only, so that no caller can change a default for everybody else.
BN_CFG = MappingProxyType(dict(type='BN', requires_grad=True))
RELU_CFG = MappingProxyType(dict(type='ReLU', inplace=True))
GELU_CFG = MappingProxyType(dict(type='GELU'))


@contextlib.contextmanager
def _running_stats_kept(module: nn.Module):
    """Let BN normalise by the batch without moving its running statistics."""
    norms = [
        (m, m.momentum, m.num_batches_tracked)
        for m in module.modules()
        if isinstance(m, _BatchNorm) and m.training and m.track_running_stats
    ]
    for norm, _, count in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, count.clone()
    try:
        yield
    finally:
        for norm, momentum, count in norms:
            norm.momentum, norm.num_batches_tracked = momentum, count


def _run(module: nn.Module, x: Tensor, with_cp: bool) -> Tensor:
    """Call ``module``, recomputing its activations in backward if asked to.

    The second forward of a checkpoint sees the same batch again: the running
    statistics of BN must not count it twice.
    """
    if not (with_cp and torch.is_grad_enabled()):
        return module(x)
    if is_compiling():
        # The compiler refuses context_fn, and does not repeat buffer updates.
        if COMPILES_CHECKPOINTS:
            return checkpoint(module, x, use_reentrant=False)
        return module(x)
    return checkpoint(
        module,
        x,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _running_stats_kept(module)),
    )


class ChannelMLP(nn.Module):
    """Two linear layers over the channels of every position (paper Sec. 3.4).

    Args:
        channels (int): Number of input and output channels.
        hidden_channels (int): Width between the two layers.
        drop_rate (float): Dropout after each layer. Defaults to 0.
        act_cfg (Mapping): Activation between the layers. Defaults to GELU.
    """

    def __init__(
        self,
        channels: int,
        hidden_channels: int,
        drop_rate: float = 0.0,
        act_cfg: Mapping = GELU_CFG,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden_channels)
        self.act = build_activation_layer(dict(act_cfg))
        self.fc2 = nn.Linear(hidden_channels, channels)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., channels) to (..., channels)."""
        x = self.drop(self.act(self.fc1(x)))
        return self.drop(self.fc2(x))


class ConvMLPBlock(nn.Module):
    """Channel MLP, 3x3 depth-wise convolution, channel MLP (paper Sec. 3.4).

    The MLPs sit on residual branches; the convolution does not.

    Args:
        channels (int): Number of input and output channels.
        mlp_ratio (float): Hidden width of the MLPs over ``channels``.
        depthwise_conv (bool): Keep the convolution and the norm before it
            (paper Table 2). Defaults to True.
        drop_rate (float): Dropout in the MLPs. Defaults to 0.
        drop_path_rate (float): Stochastic depth of both MLP branches. Defaults to 0.
        act_cfg (Mapping): Activation in the MLPs. Defaults to GELU.
    """

    def __init__(
        self,
        channels: int,
        mlp_ratio: float,
        depthwise_conv: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_cfg: Mapping = GELU_CFG,
    ) -> None:
        super().__init__()
        hidden_channels = int(channels * mlp_ratio)
        self.norm1 = nn.LayerNorm(channels)
        self.channel_mlp1 = ChannelMLP(channels, hidden_channels, drop_rate, act_cfg)
        self.connect_norm = self.connect = None
        if depthwise_conv:
            self.connect_norm = nn.LayerNorm(channels)
            self.connect = nn.Conv2d(
                channels, channels, 3, padding=1, groups=channels, bias=False
            )
        self.norm2 = nn.LayerNorm(channels)
        self.channel_mlp2 = ChannelMLP(channels, hidden_channels, drop_rate, act_cfg)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, channels) to the same shape."""
        x = x + self.drop_path(self.channel_mlp1(self.norm1(x)))
        if self.connect is not None:
            x = self.connect_norm(x).permute(0, 3, 1, 2)
            x = self.connect(x).permute(0, 2, 3, 1)
        return x + self.drop_path(self.channel_mlp2(self.norm2(x)))


class ConvDownsample(nn.Module):
    """3x3 convolution of stride 2 between two stages (paper Sec. 3.3).

    Args:
        in_channels (int): Number of input channels.
        out_channels (int): Number of output channels.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.downsample = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C_in) to (B, ceil(H / 2), ceil(W / 2), C_out)."""
        return self.downsample(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PatchMerging(nn.Module):
    """Concatenate 2x2 neighbours, normalise, project (Swin, Sec. 3.1).

    What the Pure-MLP baseline of the paper's Table 2 has in place of
    :class:`ConvDownsample`. mmcv's class of this name orders the neighbours
    otherwise and imports compiled operators.

    Args:
        in_channels (int): Number of input channels.
        out_channels (int): Number of output channels.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * in_channels)
        self.reduction = nn.Linear(4 * in_channels, out_channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C_in) to (B, ceil(H / 2), ceil(W / 2), C_out)."""
        _, height, width, _ = x.shape
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        neighbours = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(neighbours, dim=-1)))


def _conv_norm_act(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    norm_cfg: Mapping,
    act_cfg: Mapping,
    stride: int = 1,
) -> list[nn.Module]:
    """Three layers, not a ConvModule: the published keys count them singly."""
    padding = kernel_size // 2
    return [
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False),
        build_norm_layer(dict(norm_cfg), out_channels)[1],
        build_activation_layer(dict(act_cfg)),
    ]


class ConvTokenizer(nn.Module):
    """Three 3x3 convolutions and a max pool, stride 4 (paper Sec. 3.2).

    Args:
        in_channels (int): Number of image channels.
        channels (int): Number of output channels C1, even.
        norm_cfg (Mapping): Norm after each convolution. Defaults to BN.
        act_cfg (Mapping): Activation after each norm. Defaults to ReLU.
        with_cp (bool): Recompute activations in backward. Defaults to False.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        norm_cfg: Mapping = BN_CFG,
        act_cfg: Mapping = RELU_CFG,
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        half = channels // 2
        self.block = nn.Sequential(
            *_conv_norm_act(in_channels, half, 3, norm_cfg, act_cfg, stride=2),
            *_conv_norm_act(half, half, 3, norm_cfg, act_cfg),
            *_conv_norm_act(half, channels, 3, norm_cfg, act_cfg),
            nn.MaxPool2d(3, stride=2, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C1, ceil(H / 4), ceil(W / 4))."""
        return _run(self.block, x, self.with_cp)


class ConvStage(nn.Module):
    """Residual 1x1 - 3x3 - 1x1 blocks, then a stride of 2 (paper Sec. 3.3).

    Args:
        in_channels (int): Number of input channels C1.
        out_channels (int): Number of output channels C2, also the hidden
            width of the blocks.
        num_blocks (int): Number of blocks.
        norm_cfg (Mapping): Norm after each convolution. Defaults to BN.
        act_cfg (Mapping): Activation after each norm. Defaults to ReLU.
        with_cp (bool): Recompute activations in backward. Defaults to False.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        norm_cfg: Mapping = BN_CFG,
        act_cfg: Mapping = RELU_CFG,
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.conv_blocks = nn.ModuleList(
            nn.Sequential(
                *_conv_norm_act(in_channels, out_channels, 1, norm_cfg, act_cfg),
                *_conv_norm_act(out_channels, out_channels, 3, norm_cfg, act_cfg),
                *_conv_norm_act(out_channels, in_channels, 1, norm_cfg, act_cfg),
            )
            for _ in range(num_blocks)
        )
        self.downsample = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C1, H, W) to (B, C2, ceil(H / 2), ceil(W / 2))."""
        for block in self.conv_blocks:
            x = x + _run(block, x, self.with_cp)
        return self.downsample(x)


class ConvMLPStage(nn.Module):
    """A row of Conv-MLP blocks and, but for the last stage, a stride of 2.

    Args:
        in_channels (int): Number of input channels, the width of the blocks.
        out_channels (int | None): Number of output channels of the
            down-sampling; None for a stage without one.
        depth (int): Number of blocks.
        mlp_ratio (float): Hidden width of the MLPs over ``in_channels``.
        conv_downsample (bool): Down-sample by convolution, else by patch
            merging (paper Table 2). Defaults to True.
        depthwise_conv (bool): See :class:`ConvMLPBlock`. Defaults to True.
        drop_rate (float): Dropout in the MLPs. Defaults to 0.
        drop_path_rate (float): Stochastic depth of the last block; it grows
            linearly from 0 at the first. Defaults to 0.
        act_cfg (Mapping): Activation in the MLPs. Defaults to GELU.
        with_cp (bool): Recompute activations in backward. Defaults to False.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None,
        depth: int,
        mlp_ratio: float,
        conv_downsample: bool = True,
        depthwise_conv: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_cfg: Mapping = GELU_CFG,
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.blocks = nn.ModuleList(
            ConvMLPBlock(
                in_channels,
                mlp_ratio,
                depthwise_conv=depthwise_conv,
                drop_rate=drop_rate,
                drop_path_rate=drop_path_rate * i / max(depth - 1, 1),
                act_cfg=act_cfg,
            )
            for i in range(depth)
        )
        self.downsample_mlp = None
        if out_channels is not None:
            downsample = ConvDownsample if conv_downsample else PatchMerging
            self.downsample_mlp = downsample(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, ceil(H / 2), ceil(W / 2)).

        Both are views of channels-last memory; without down-sampling the
        shape stays.
        """
        x = x.permute(0, 2, 3, 1)
        for block in self.blocks:
            x = _run(block, x, self.with_cp)
        if self.downsample_mlp is not None:
            x = self.downsample_mlp(x)
        return x.permute(0, 3, 1, 2)


class FeaturePoint(NamedTuple):
    """A map that the backbone can hand out.

    Attributes:
        name (str): Name of the module whose output it is.
        channels (int): Its number of channels.
        stride (int): Input pixels to one of its positions, along each side.
    """

    name: str
    channels: int
    stride: int


@MODELS.register_module()
class ConvMLP(BaseModule):
    """ConvMLP backbone for classification, detection and segmentation.

    One class serves mmpretrain, mmdet and mmseg: it stands in mmengine's root
    registry. It takes an image of any size from 32 pixels up, odd ones too
    (each stride of 2 rounds up), computes in channels-last memory, and hands out maps
    in the memory format of the images.

    ===== =========== ================ ====== ========
    index module      map (Sec. 3.1)   stride channels
    ===== =========== ================ ====== ========
    0     tokenizer   F1               4      C1
    1     conv_stages F2               8      C2
    2     stages.0    F3               16     C3
    3     stages.2    F4               32     C4
    ===== =========== ================ ====== ========

    The output of ``stages.1`` is not in the table: the last stage refines it at the
    same stride. So it is in a custom architecture: one feature point for each stride.

    ===== === === === === ======== ========= ==============================
    arch  C1  C2  C3  C4  depths   MLP ratio parameters with 1000 classes
    ===== === === === === ======== ========= ==============================
    s     64  128 256 512 2, 4, 2  2         9 022 920
    m     64  128 256 512 3, 6, 3  3         17 410 504
    l     96  192 384 768 4, 8, 3  3         42 728 440
    ===== === === === === ======== ========= ==============================

    Args:
        arch (str | dict): ``'s'``, ``'m'`` or ``'l'`` (paper Table 1), or a
            dict with the keys

            - **tokenizer_channels** (int): C1, even.
            - **conv_blocks** (int): Number of blocks of the conv stage.
            - **channels** (Sequence[int]): Width of each Conv-MLP stage.
            - **depths** (Sequence[int]): Number of blocks of each.
            - **mlp_ratios** (Sequence[float]): Hidden ratio R of each.

            Defaults to ``'s'``.
        in_channels (int): Number of image channels. Defaults to 3.
        norm_cfg (dict): Norm layer of the tokenizer and the conv stage.
            Defaults to ``dict(type='BN', requires_grad=True)``.
        act_cfg (dict): Activation of the tokenizer and the conv stage.
            Defaults to ``dict(type='ReLU', inplace=True)``.
        mlp_act_cfg (dict): Activation of the channel MLPs. Defaults to
            ``dict(type='GELU')``.
        conv_stage (bool): Keep the convolution stage; without it the first
            stage has channel MLPs of width C1 and the first ``mlp_ratios``
            (paper Table 2). Defaults to True.
        conv_downsample (bool): Down-sample after MLP stages by convolution,
            else by patch merging (paper Table 2). Defaults to True.
        depthwise_conv (bool): Keep the depth-wise convolution between the two
            channel MLPs of a block (paper Table 2). All three switches off is
            the Pure-MLP baseline. Defaults to True.
        drop_rate (float): Dropout in the channel MLPs. Defaults to 0.
        drop_path_rate (float): Stochastic depth, from 0 to this value
            linearly inside each stage. Defaults to 0.1.
        out_indices (int | Sequence[int]): Which rows of the table above to return,
            increasing; negative ones count from the last. Modules after the last one
            asked for are not built. Defaults to (0, 1, 2, 3), for a custom architecture
            of n stages to give explicitly when n is less than 3.
        final_norm (bool): LayerNorm on the last feature point, which
            classifiers want. Defaults to False.
        frozen_stages (int): Freeze the tokenizer (0), also the conv stage (1), also
            ``stages[0]`` (2), and so on; -1 freezes nothing. Defaults to -1.
        norm_eval (bool): Keep BN layers in evaluation mode while training.
            Defaults to False.
        with_cp (bool): Gradient checkpointing: recompute the activations of
            each block in backward. Outputs, gradients and BN statistics stay
            the same. Defaults to False.
        init_cfg (dict | list[dict], optional): Initialisation. The default is the
            authors': truncated normal (std 0.02) for linear layers, Kaiming normal (fan
            out) for convolutions. ``dict(type='Pretrained', checkpoint=...)`` is
            strict: every parameter must be in the file with the right shape. It takes
            ``prefix`` and ``map_location`` as in mmengine.

    Attributes:
        feature_points (tuple[FeaturePoint]): All rows of the table above.
        out_channels (tuple[int]): Channels of each returned map.
        strides (tuple[int]): Stride of each returned map.

    Raises:
        TypeError: If an argument or the input has the wrong type.
        ValueError: If an argument or the input has a value or shape outside
            of what is allowed; the message says what came and what is.

    Examples:
        >>> import torch
        >>> from convmlp_mm import ConvMLP
        >>> model = ConvMLP(arch='s', out_indices=(0, 1, 2, 3)).eval()
        >>> with torch.no_grad():
        ...     outs = model(torch.rand(1, 3, 64, 96))
        >>> for out, channels, stride in zip(
        ...     outs, model.out_channels, model.strides):
        ...     print(tuple(out.shape), channels, stride)
        (1, 64, 16, 24) 64 4
        (1, 128, 8, 12) 128 8
        (1, 256, 4, 6) 256 16
        (1, 512, 2, 3) 512 32
    """

    # Paper Table 1, and for conv_blocks and tokenizer_channels the released model.
    arch_settings = MappingProxyType(
        dict(
            s=dict(
                tokenizer_channels=64,
                conv_blocks=2,
                channels=(128, 256, 512),
                depths=(2, 4, 2),
                mlp_ratios=(2, 2, 2),
            ),
            m=dict(
                tokenizer_channels=64,
                conv_blocks=3,
                channels=(128, 256, 512),
                depths=(3, 6, 3),
                mlp_ratios=(3, 3, 3),
            ),
            l=dict(
                tokenizer_channels=96,
                conv_blocks=3,
                channels=(192, 384, 768),
                depths=(4, 8, 3),
                mlp_ratios=(3, 3, 3),
            ),
        )
    )
    min_size = 32

    def __init__(
        self,
        arch: str | dict = 's',
        in_channels: int = 3,
        norm_cfg: Mapping = BN_CFG,
        act_cfg: Mapping = RELU_CFG,
        mlp_act_cfg: Mapping = GELU_CFG,
        conv_stage: bool = True,
        conv_downsample: bool = True,
        depthwise_conv: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        final_norm: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        if init_cfg is None:
            init_cfg = [
                dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.0),
                dict(type='Kaiming', layer='Conv2d', mode='fan_out', bias=0.0),
                dict(type='Constant', layer=['_BatchNorm', 'LayerNorm'], val=1.0),
            ]
        super().__init__(init_cfg=init_cfg)
        self.arch = _check_arch(arch, self.arch_settings)
        self.in_channels = _check_int('in_channels', in_channels, 1)
        _check_rate('drop_rate', drop_rate)
        _check_rate('drop_path_rate', drop_path_rate)

        c1 = self.arch['tokenizer_channels']
        channels = self.arch['channels']
        depths, ratios = self.arch['depths'], self.arch['mlp_ratios']
        self.feature_points = _feature_points(c1, channels)
        self.out_indices = _check_out_indices(out_indices, len(self.feature_points))
        points = [self.feature_points[i] for i in self.out_indices]
        self.out_channels = tuple(p.channels for p in points)
        self.strides = tuple(p.stride for p in points)
        self._out_names = tuple(p.name for p in points)

        deepest = len(channels) + 1
        self.frozen_stages = _check_int('frozen_stages', frozen_stages, -1, deepest)
        self.norm_eval = norm_eval
        self.with_cp = with_cp
        last = self._out_names[-1]
        if final_norm and last != self.feature_points[-1].name:
            raise ValueError(
                'final_norm=True normalises the last feature point, '
                f'{len(self.feature_points) - 1}; out_indices must contain it '
                f'(or -1), but got {out_indices}'
            )

        mlp_stage = dict(
            conv_downsample=conv_downsample,
            depthwise_conv=depthwise_conv,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            act_cfg=mlp_act_cfg,
            with_cp=with_cp,
        )
        conv_layers = dict(norm_cfg=norm_cfg, act_cfg=act_cfg, with_cp=with_cp)
        self.tokenizer = ConvTokenizer(in_channels, c1, **conv_layers)
        # Without convolutions the first stage keeps its place and its name.
        self.conv_stages = None
        num_blocks = self.arch['conv_blocks']
        if last != 'tokenizer' and conv_stage:
            self.conv_stages = ConvStage(c1, channels[0], num_blocks, **conv_layers)
        elif last != 'tokenizer':
            self.conv_stages = ConvMLPStage(
                c1, channels[0], num_blocks, ratios[0], **mlp_stage
            )
        num_built = int(last.split('.')[1]) + 1 if '.' in last else 0
        self.stages = nn.ModuleList(
            ConvMLPStage(
                channels[i],
                channels[i + 1] if i + 1 < len(channels) else None,
                depths[i],
                ratios[i],
                **mlp_stage,
            )
            for i in range(num_built)
        )
        self.norm = nn.LayerNorm(channels[-1]) if final_norm else None

        # With the weights in the layout of the activations, neither forward
        # nor the gradient buckets of DDP have to reorder them.
        self.to(memory_format=torch.channels_last)
        self._freeze_stages()

    def _named_stages(self) -> list[tuple[str, nn.Module]]:
        """The built modules in the order of forward."""
        stages = [('tokenizer', self.tokenizer)]
        if self.conv_stages is not None:
            stages.append(('conv_stages', self.conv_stages))
        stages += [(f'stages.{i}', stage) for i, stage in enumerate(self.stages)]
        return stages

    def _freeze_stages(self) -> None:
        """Put the first ``frozen_stages`` + 1 modules out of training."""
        stages = self._named_stages()
        frozen = [stage for _, stage in stages[: self.frozen_stages + 1]]
        if self.norm is not None and len(frozen) == len(stages):
            frozen.append(self.norm)
        for stage in frozen:
            stage.eval()
            stage.requires_grad_(False)

    def train(self, mode: bool = True) -> ConvMLP:
        """Set the mode; frozen stages and ``norm_eval`` stay in force."""
        super().train(mode)
        self._freeze_stages()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def init_weights(self) -> None:
        """Initialise, or load pretrained weights strictly.

        mmengine loads ``Pretrained`` weights as far as they match and warns
        about the rest, so that a wrong file means training from random
        weights. Here it is an error.

        Raises:
            FileNotFoundError: If the checkpoint does not exist.
            ValueError: If it lacks parameters of the backbone or has them in
                other shapes; the message names them.
        """
        cfgs = [self.init_cfg] if isinstance(self.init_cfg, dict) else self.init_cfg
        kinds = ('Pretrained', PretrainedInit)
        pretrained = [cfg for cfg in cfgs if cfg['type'] in kinds]
        if self.is_init or not pretrained:
            super().init_weights()
            return
        for cfg in pretrained:
            cfg = {k: v for k, v in cfg.items() if k != 'type'}
            message = load_backbone_weights(self, **cfg)
            print_log(message, logger='current', level=logging.INFO)
            if hasattr(self, '_params_init_info'):
                update_init_info(self, init_info=message)
        self.is_init = True

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Return the layer of a parameter, for learning rates that decay with depth.

        ``LearningRateDecayOptimWrapperConstructor`` of mmpretrain asks for it. The
        tokenizer is layer 0, the conv stage 1, and each Conv-MLP block one more; what
        samples down after a block belongs to the next one, the final norm to the head.

        Args:
            param_name (str): Name of the parameter in the whole model.
            prefix (str): Name of the backbone in it, with a dot. Defaults to ``''``.

        Returns:
            tuple[int, int]: The layer, from 0, and the number of layers.
        """
        first = [2]
        for stage in self.stages:
            first.append(first[-1] + len(stage.blocks))
        last, parts = first[-1], param_name.removeprefix(prefix).split('.')
        if not param_name.startswith(prefix) or parts[0] == 'norm':
            layer = last
        elif parts[0] != 'stages':
            layer = 0 if parts[0] == 'tokenizer' else 1
        elif parts[2] == 'blocks':
            layer = first[int(parts[1])] + int(parts[3])
        else:
            layer = min(first[int(parts[1]) + 1], last - 1)
        return layer, last + 1

    def switch_to_deploy(self) -> None:
        """Fold each BN into the convolution before it, for inference.

        Outputs stay, to rounding; the module is put into evaluation mode. The way
        back is a new model: the names of the weights change with the layers. The
        method is called as that of mmpretrain's backbones, whose tools call it.

        Raises:
            ValueError: If a BN has no statistics or no weights to fold.

        Examples:
            >>> import torch
            >>> from convmlp_mm import ConvMLP
            >>> model = ConvMLP(arch='s').eval()
            >>> x = torch.rand(1, 3, 64, 64)
            >>> with torch.no_grad():
            ...     before = model(x)[-1]
            ...     model.switch_to_deploy()
            ...     print(torch.allclose(model(x)[-1], before, atol=1e-5))
            True
        """
        for name, module in self.named_modules():
            if isinstance(module, _BatchNorm) and (
                module.running_var is None or module.weight is None
            ):
                raise ValueError(
                    'only BN with running statistics and weights folds into a '
                    f'convolution, but {name} is {module}'
                )
        self.eval()
        fuse_conv_bn(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute feature maps.

        Args:
            x (Tensor): Images of shape (B, in_channels, H, W), H and W at
                least 32, in any memory format.

        Returns:
            tuple[Tensor]: A map of shape (B, C_i, ceil(H / s_i), ceil(W / s_i))
            for each of ``out_indices``, with C_i and s_i in
            ``out_channels`` and ``strides``. As of torch's own layers, they are
            channels-last in memory if the images are, and contiguous otherwise.
        """
        self._check_input(x)
        # Operators of mmcv such as RoIAlign read raw memory and take every map for
        # contiguous, so that the layout used in here must not leave unasked for.
        layout = torch.contiguous_format
        if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
            layout = torch.channels_last
        x = x.contiguous(memory_format=torch.channels_last)
        outs = []
        for name, stage in self._named_stages():
            x = stage(x)
            if name in self._out_names:
                outs.append(x)
        if self.norm is not None:
            outs[-1] = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return tuple(out.contiguous(memory_format=layout) for out in outs)

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(
                f'ConvMLP takes a Tensor of shape (B, {self.in_channels}, H, W), '
                f'but got {type(x).__name__}'
            )
        if (
            x.dim() != 4
            or x.shape[1] != self.in_channels
            or x.shape[2] < self.min_size
            or x.shape[3] < self.min_size
        ):
            raise ValueError(
                f'ConvMLP takes a Tensor of shape (B, {self.in_channels}, H, W) '
                f'with H and W of at least {self.min_size}, but got '
                f'{tuple(x.shape)}'
            )


def _feature_points(
    tokenizer_channels: int, channels: Sequence[int]
) -> tuple[FeaturePoint, ...]:
    """The deepest output at each stride, stride 4 first."""
    names = ['tokenizer', 'conv_stages']
    names += [f'stages.{i}' for i in range(len(channels) - 1)]
    # The last stage has no stride: its output replaces its own input.
    names[-1] = f'stages.{len(channels) - 1}'
    widths = enumerate((tokenizer_channels, *channels))
    return tuple(FeaturePoint(names[i], width, 4 * 2**i) for i, width in widths)


def _check_int(name: str, value: int, low: int, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f'{name} must be an int, but got {value!r}')
    if value < low or (high is not None and value > high):
        allowed = f'at least {low}' if high is None else f'from {low} to {high}'
        raise ValueError(f'{name} must be {allowed}, but got {value}')
    return value


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f'{name} must be a number, but got {value!r}')


def _check_rate(name: str, value: float) -> None:
    _check_number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f'{name} must be in [0, 1), but got {value}')


def _check_arch(arch: str | dict, settings: Mapping[str, dict]) -> dict:
    """Return a complete, checked architecture of its own."""
    if isinstance(arch, str):
        if arch.lower() not in settings:
            raise ValueError(
                f'arch must be one of {", ".join(map(repr, settings))} or a dict, '
                f'but got {arch!r}'
            )
        return dict(settings[arch.lower()])
    if not isinstance(arch, Mapping):
        raise TypeError(f'arch must be a str or a dict, but got {arch!r}')
    keys = set(settings['s'])
    if set(arch) != keys:
        raise ValueError(
            f'arch must have exactly the keys {sorted(keys)}, but '
            f'{sorted(keys - set(arch))} are missing and '
            f'{sorted(set(arch) - keys, key=str)} unknown'
        )
    arch = dict(arch)
    _check_int("arch['tokenizer_channels']", arch['tokenizer_channels'], 2)
    if arch['tokenizer_channels'] % 2:
        raise ValueError(
            "arch['tokenizer_channels'] must be even, but got "
            f'{arch["tokenizer_channels"]}'
        )
    _check_int("arch['conv_blocks']", arch['conv_blocks'], 1)
    for key in ('channels', 'depths', 'mlp_ratios'):
        if isinstance(arch[key], str) or not isinstance(arch[key], Sequence):
            raise TypeError(f'arch[{key!r}] must be a sequence, but got {arch[key]!r}')
        arch[key] = tuple(arch[key])
    lengths = {key: len(arch[key]) for key in ('channels', 'depths', 'mlp_ratios')}
    if len(set(lengths.values())) != 1 or not lengths['channels']:
        raise ValueError(
            'arch must give channels, depths and mlp_ratios for the same number '
            f'of stages, at least one, but got lengths {lengths}'
        )
    for i in range(lengths['channels']):
        _check_int(f"arch['channels'][{i}]", arch['channels'][i], 1)
        _check_int(f"arch['depths'][{i}]", arch['depths'][i], 1)
        ratio = arch['mlp_ratios'][i]
        _check_number(f"arch['mlp_ratios'][{i}]", ratio)
        if int(arch['channels'][i] * ratio) < 1:
            raise ValueError(
                f"arch['mlp_ratios'][{i}] must leave a hidden width of at least 1, "
                f'but got {ratio}'
            )
    return arch


def _check_out_indices(
    out_indices: int | Sequence[int], num_points: int
) -> tuple[int, ...]:
    """Return them as increasing indices from 0."""
    given = out_indices
    if isinstance(out_indices, int) and not isinstance(out_indices, bool):
        out_indices = (out_indices,)
    if isinstance(out_indices, str) or not isinstance(out_indices, Sequence):
        raise TypeError(
            f'out_indices must be an int or a sequence of ints, but got {given!r}'
        )
    indices = []
    for index in out_indices:
        _check_int('out_indices', index, -num_points, num_points - 1)
        indices.append(index % num_points)
    if not indices or sorted(set(indices)) != indices:
        raise ValueError(
            'out_indices must name at least one feature point, in increasing '
            f'order and none twice, of 0 to {num_points - 1} (or negative), '
            f'but got {given!r}'
        )
    return tuple(indices)
