"""The structure of the authors' release, to measure the backbone against.

Contiguous (B, C, H, W) convolutions, permutes around the channel MLPs, BN on its own,
and no word on memory formats: what a user of the release runs. Names of parameters are
those of the published weights, which are ours too. The code is new.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import torch
from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn

from ..convmlp import ConvMLP

__all__ = ['PublishedConvMLP']


def _conv_bn_relu(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1
) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


class _Tokenizer(nn.Module):
    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            *_conv_bn_relu(in_channels, channels // 2, 3, 2),
            *_conv_bn_relu(channels // 2, channels // 2, 3),
            *_conv_bn_relu(channels // 2, channels, 3),
            nn.MaxPool2d(3, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class _ConvStage(nn.Module):
    def __init__(self, channels: int, out_channels: int, blocks: int) -> None:
        super().__init__()
        self.conv_blocks = nn.ModuleList(
            nn.Sequential(
                *_conv_bn_relu(channels, out_channels, 1),
                *_conv_bn_relu(out_channels, out_channels, 3),
                *_conv_bn_relu(out_channels, channels, 1),
            )
            for _ in range(blocks)
        )
        self.downsample = nn.Conv2d(channels, out_channels, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.conv_blocks:
            x = x + block(x)
        return self.downsample(x)


class _MLP(nn.Module):
    def __init__(self, channels: int, hidden: int, drop_rate: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, channels)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class _Block(nn.Module):
    def __init__(
        self, channels: int, ratio: float, drop_rate: float, drop_path_rate: float
    ) -> None:
        super().__init__()
        hidden = int(channels * ratio)
        self.norm1 = nn.LayerNorm(channels)
        self.channel_mlp1 = _MLP(channels, hidden, drop_rate)
        self.connect_norm = nn.LayerNorm(channels)
        self.connect = nn.Conv2d(
            channels, channels, 3, 1, 1, groups=channels, bias=False
        )
        self.norm2 = nn.LayerNorm(channels)
        self.channel_mlp2 = _MLP(channels, hidden, drop_rate)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape."""
        x = x + self.drop_path(self.channel_mlp1(self.norm1(x)))
        x = self.connect(self.connect_norm(x).permute(0, 3, 1, 2))
        x = x.permute(0, 2, 3, 1)
        return x + self.drop_path(self.channel_mlp2(self.norm2(x)))


class _Downsample(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.downsample = nn.Conv2d(in_channels, out_channels, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class _Stage(nn.Module):
    def __init__(
        self,
        channels: int,
        out_channels: int | None,
        depth: int,
        ratio: float,
        drop_rate: float,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            _Block(channels, ratio, drop_rate, drop_path_rate * i / max(depth - 1, 1))
            for i in range(depth)
        )
        self.downsample_mlp = nn.Identity()
        if out_channels is not None:
            self.downsample_mlp = _Downsample(channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.downsample_mlp(x)


class PublishedConvMLP(nn.Module):
    """The backbone with the structure of the authors' release.

    Maps are handed on contiguous, which for the last two, computed channels last,
    takes a copy.

    Args:
        arch (str | dict): See :class:`convmlp_mm.ConvMLP`; so the rest.
        in_channels (int): Defaults to 3.
        drop_rate (float): Defaults to 0.
        drop_path_rate (float): Defaults to 0.1.
        out_indices (int | Sequence[int]): Defaults to (0, 1, 2, 3).
        final_norm (bool): Defaults to False.
        **others: What else ConvMLP takes, but only with its default, since the
            release has no such choice; ``init_cfg`` may be any, as the weights are
            to be loaded.

    Raises:
        TypeError: If ConvMLP has no such argument.
        ValueError: If an argument is not among those that the release has, or not
            legal.
    """

    def __init__(
        self,
        arch: str | dict = 's',
        in_channels: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        final_norm: bool = False,
        **others: object,
    ) -> None:
        super().__init__()
        _check_others(others)
        with torch.device('meta'):
            # Its checks, and what it makes of arch and out_indices.
            ours = ConvMLP(arch, in_channels, out_indices=out_indices)
        arch, names = ours.arch, ours._out_names
        c1, channels = arch['tokenizer_channels'], arch['channels']
        self.tokenizer = _Tokenizer(in_channels, c1)
        self.conv_stages = None
        if ours.conv_stages is not None:
            self.conv_stages = _ConvStage(c1, channels[0], arch['conv_blocks'])
        self.stages = nn.ModuleList(
            _Stage(
                channels[i],
                channels[i + 1] if i + 1 < len(channels) else None,
                arch['depths'][i],
                arch['mlp_ratios'][i],
                drop_rate,
                drop_path_rate,
            )
            for i in range(len(ours.stages))
        )
        self.norm = nn.LayerNorm(channels[-1]) if final_norm else None
        self.out_names = names

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute feature maps, as :class:`convmlp_mm.ConvMLP` does."""
        x = self.tokenizer(x)
        outs = [x] if 'tokenizer' in self.out_names else []
        if self.conv_stages is None:
            return tuple(outs)
        x = self.conv_stages(x)
        if 'conv_stages' in self.out_names:
            outs.append(x)
        x = x.permute(0, 2, 3, 1)
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if f'stages.{i}' in self.out_names:
                last = self.norm is not None and i + 1 == len(self.stages)
                out = self.norm(x) if last else x
                outs.append(out.permute(0, 3, 1, 2).contiguous())
        return tuple(outs)


def _check_others(others: Mapping[str, object]) -> None:
    parameters = inspect.signature(ConvMLP).parameters
    for name, value in others.items():
        if name not in parameters:
            raise TypeError(f'ConvMLP has no argument {name!r}')
        default = parameters[name].default
        if isinstance(default, Mapping):
            value, default = dict(value), dict(default)
        if name != 'init_cfg' and value != default:
            raise ValueError(
                f'the published structure has {name}={default!r} only, but got '
                f'{value!r}'
            )
