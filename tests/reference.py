"""The twin of the published model: what it computes, and how the release is built.

Contiguous (B, C, H, W) convolutions, permutes around the channel MLPs, BN as a layer
of its own, and no word on memory formats. Names of parameters are those of the
published weights; the code is new and shares none with the package. The weights and
inputs are drawn by the rule behind ``data/published_outputs.json``.
``tools/analysis/benchmark.py`` reads this file for its entries ``published::NAME``.
"""

import copy
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from mmcv.cnn.bricks import DropPath
from torch import nn
from torch.func import functional_call

DATA = Path(__file__).parent / 'data'


def published_shapes(arch):
    """Names and shapes of the published ImageNet checkpoint of an arch."""
    return json.loads((DATA / 'published_keys.json').read_text())[arch]


def published_outputs():
    """Reference summaries of feature maps and logits."""
    return json.loads((DATA / 'published_outputs.json').read_text())


def draw(name, shape, seed=0):
    """A tensor of a checkpoint, from a generator seeded by its name."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()) + seed))
    if name.endswith('num_batches_tracked'):
        return torch.zeros(shape, dtype=torch.long)
    if name.endswith('running_var'):
        value = rng.uniform(0.5, 1.5, shape)
    elif len(shape) > 1:
        value = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    elif name.endswith('weight'):
        value = rng.uniform(0.5, 1.5, shape)
    else:
        value = rng.standard_normal(shape) * 0.1
    return torch.from_numpy(np.asarray(value))


def draw_checkpoint(arch, seed=0):
    """A whole published-layout state dict in float64."""
    return {k: draw(k, s, seed) for k, s in published_shapes(arch).items()}


def draw_image(height, width, seed=0, batch=1):
    """An input of shape (batch, 3, height, width) in float64."""
    rng = np.random.Generator(np.random.PCG64(1000 + seed))
    return torch.from_numpy(rng.standard_normal((batch, 3, height, width)))


def summary(tensor, samples=12):
    """Shape, mean, root mean square and evenly spaced samples."""
    flat = tensor.detach().contiguous().double().reshape(-1).numpy()
    index = np.linspace(0, flat.size - 1, samples).astype(int)
    return dict(
        shape=list(tensor.shape),
        mean=float(flat.mean()),
        rms=float(np.sqrt((flat**2).mean())),
        samples=[float(v) for v in flat[index]],
    )


def assert_summary_equal(tensor, expected, rtol=1e-9):
    """Compare a tensor with a stored summary, relative to its scale."""
    got = summary(tensor, len(expected['samples']))
    assert got['shape'] == expected['shape']
    tolerance = dict(rtol=rtol, atol=rtol * expected['rms'])
    np.testing.assert_allclose(got['rms'], expected['rms'], **tolerance)
    np.testing.assert_allclose(got['mean'], expected['mean'], **tolerance)
    np.testing.assert_allclose(got['samples'], expected['samples'], **tolerance)


def conv_bn_relu(in_channels, out_channels, kernel, stride=1):
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


class Tokenizer(nn.Module):
    def __init__(self, in_channels, channels):
        super().__init__()
        self.block = nn.Sequential(
            *conv_bn_relu(in_channels, channels // 2, 3, 2),
            *conv_bn_relu(channels // 2, channels // 2, 3),
            *conv_bn_relu(channels // 2, channels, 3),
            nn.MaxPool2d(3, 2, 1),
        )

    def forward(self, x):
        return self.block(x)


class ConvStage(nn.Module):
    def __init__(self, channels, out_channels, blocks):
        super().__init__()
        self.conv_blocks = nn.ModuleList(
            nn.Sequential(
                *conv_bn_relu(channels, out_channels, 1),
                *conv_bn_relu(out_channels, out_channels, 3),
                *conv_bn_relu(out_channels, channels, 1),
            )
            for _ in range(blocks)
        )
        self.downsample = nn.Conv2d(channels, out_channels, 3, 2, 1)

    def forward(self, x):
        for block in self.conv_blocks:
            x = x + block(x)
        return self.downsample(x)


class MLP(nn.Module):
    def __init__(self, channels, hidden, drop_rate):
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, channels)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Block(nn.Module):
    def __init__(self, channels, ratio, drop_rate, drop_path_rate):
        super().__init__()
        hidden = int(channels * ratio)
        self.norm1 = nn.LayerNorm(channels)
        self.channel_mlp1 = MLP(channels, hidden, drop_rate)
        self.connect_norm = nn.LayerNorm(channels)
        self.connect = nn.Conv2d(
            channels, channels, 3, 1, 1, groups=channels, bias=False
        )
        self.norm2 = nn.LayerNorm(channels)
        self.channel_mlp2 = MLP(channels, hidden, drop_rate)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x):
        """Map (B, H, W, C) to the same shape."""
        x = x + self.drop_path(self.channel_mlp1(self.norm1(x)))
        x = self.connect(self.connect_norm(x).permute(0, 3, 1, 2))
        x = x.permute(0, 2, 3, 1)
        return x + self.drop_path(self.channel_mlp2(self.norm2(x)))


class Downsample(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.downsample = nn.Conv2d(in_channels, out_channels, 3, 2, 1)

    def forward(self, x):
        return self.downsample(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Stage(nn.Module):
    def __init__(self, channels, out_channels, depth, ratio, drop_rate, drop_path_rate):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(channels, ratio, drop_rate, drop_path_rate * i / max(depth - 1, 1))
            for i in range(depth)
        )
        self.downsample_mlp = nn.Identity()
        if out_channels is not None:
            self.downsample_mlp = Downsample(channels, out_channels)

    def forward(self, x):
        """Map (B, H, W, C) to (B, H', W', C')."""
        for block in self.blocks:
            x = block(x)
        return self.downsample_mlp(x)


class PublishedConvMLP(nn.Module):
    """The published model, as a backbone or, with ``num_classes``, as a classifier.

    ``arch`` has the keys of a custom ``arch`` of ``convmlp_mm.ConvMLP``; the other
    arguments of the same name mean the same. Indices count from 0. Like there, modules
    after the last feature point that is asked for are not built.
    """

    def __init__(
        self,
        arch,
        in_channels=3,
        drop_rate=0.0,
        drop_path_rate=0.1,
        out_indices=(0, 1, 2, 3),
        final_norm=False,
        num_classes=None,
    ):
        super().__init__()
        c1, widths = arch['tokenizer_channels'], list(arch['channels'])
        names = [
            'tokenizer',
            'conv_stages',
            *(f'stages.{i}' for i in range(len(widths))),
        ]
        # The last stage refines the map of the one before, at the same stride.
        points = names[:-2] + names[-1:]
        self.out_names = [points[i] for i in out_indices]
        built = names[: names.index(self.out_names[-1]) + 1]
        self.tokenizer = Tokenizer(in_channels, c1)
        self.conv_stages = None
        if 'conv_stages' in built:
            self.conv_stages = ConvStage(c1, widths[0], arch['conv_blocks'])
        self.stages = nn.ModuleList(
            Stage(*sizes, drop_rate, drop_path_rate)
            for sizes, _ in zip(
                zip(widths, [*widths[1:], None], arch['depths'], arch['mlp_ratios']),
                built[2:],
            )
        )
        classifies = num_classes is not None
        self.norm = nn.LayerNorm(widths[-1]) if final_norm or classifies else None
        self.head = nn.Linear(widths[-1], num_classes) if classifies else None

    def forward(self, x):
        """Map (B, C, H, W) to feature maps, and of a classifier also to the logits.

        The maps of a classifier are those before its norm, as detectors get them.
        """
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
                outs.append(x.permute(0, 3, 1, 2).contiguous())
        if self.head is not None:
            return tuple(outs), self.head(self.norm(x).mean(dim=(1, 2)))
        if self.norm is not None:
            outs[-1] = self.norm(x).permute(0, 3, 1, 2).contiguous()
        return tuple(outs)


def published_arch(p):
    """The sizes of a published-layout state dict, as ``arch`` of the model."""
    sizes = dict(channels=[], depths=[], mlp_ratios=[])
    while (first := f'stages.{len(sizes["depths"])}.blocks') + '.0.norm1.weight' in p:
        hidden, channels = p[f'{first}.0.channel_mlp1.fc1.weight'].shape
        blocks = {key.split('.')[3] for key in p if key.startswith(f'{first}.')}
        sizes['channels'].append(channels)
        sizes['depths'].append(len(blocks))
        sizes['mlp_ratios'].append(hidden / channels)
    blocks = {k.split('.')[2] for k in p if k.startswith('conv_stages.conv_blocks.')}
    c1 = p['tokenizer.block.6.weight'].shape[0]
    return dict(tokenizer_channels=c1, conv_blocks=len(blocks), **sizes)


def published_forward(p, x, training=False):
    """Feature maps F1 to F4 and logits of a published-layout state dict.

    Stochastic depth is left out: it is random. The state dict stays as it is, and
    gradients reach its tensors.
    """
    model = PublishedConvMLP(
        published_arch(p), drop_path_rate=0.0, num_classes=len(p['head.bias'])
    )
    # In training, BN would move its statistics in place.
    p = {
        k: v.clone() if 'running' in k or 'num_batches' in k else v
        for k, v in p.items()
    }
    return functional_call(model.train(training), p, (x,), strict=True)


def check_equal(ours: nn.Module, twin: nn.Module) -> None:
    """Refuse two backbones that do not compute the same; neither is changed.

    In float64, from drawn BN statistics: the maps in both modes, with the same
    stochastic depth, and in training the gradients and the BN statistics thereafter.
    Each may differ by 1e-6 of its largest value.
    """
    found = _compute(twin)
    for name, expected in _compute(ours).items():
        scale = expected.abs().max().clamp(min=1e-300)
        difference = float((found[name] - expected).abs().max() / scale)
        if not difference <= 1e-6:
            raise ValueError(
                'the published structure does not compute the same and is not timed: '
                f'{name} differs by {difference:.1e} of its largest value'
            )


def _compute(backbone: nn.Module) -> dict:
    """Run a copy in both modes; what it computes, by name."""
    backbone = copy.deepcopy(backbone).cpu().double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        channels = backbone.tokenizer.block[0].in_channels
        image = torch.randn(2, channels, 64, 64, dtype=torch.double).requires_grad_()
        for norm in (m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 1.5)
        maps, trained = backbone.eval()(image), backbone.train()(image)
    sum((x * x).mean() for x in trained).backward()
    found = {f'map {i}': x for i, x in enumerate((*maps, *trained))}
    found['gradient of the image'] = image.grad
    found.update({f'gradient of {k}': p.grad for k, p in backbone.named_parameters()})
    found.update(backbone.named_buffers())
    return {k: v.detach().double() for k, v in found.items() if v is not None}
