"""What the published model computes, written down once more for the tests.

Plain functions on a dict of tensors, channels first with explicit permutes,
sharing no code with the package; the weights and inputs are drawn by the rule
behind ``data/published_outputs.json``.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

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


def _norm_relu(p, name, x, training):
    x = F.batch_norm(
        x,
        p[f'{name}.running_mean'].clone(),
        p[f'{name}.running_var'].clone(),
        p[f'{name}.weight'],
        p[f'{name}.bias'],
        training,
    )
    return F.relu(x)


def _layer_norm(p, name, x):
    return F.layer_norm(x, x.shape[-1:], p[f'{name}.weight'], p[f'{name}.bias'])


def _channel_mlp(p, name, x):
    x = F.gelu(F.linear(x, p[f'{name}.fc1.weight'], p[f'{name}.fc1.bias']))
    return F.linear(x, p[f'{name}.fc2.weight'], p[f'{name}.fc2.bias'])


def published_forward(p, x, training=False):
    """Feature maps F1 to F4 and logits of a published-layout state dict.

    Stochastic depth is left out: it is random.
    """
    for conv, norm, stride in ((0, 1, 2), (3, 4, 1), (6, 7, 1)):
        x = F.conv2d(x, p[f'tokenizer.block.{conv}.weight'], None, stride, 1)
        x = _norm_relu(p, f'tokenizer.block.{norm}', x, training)
    x = F.max_pool2d(x, 3, 2, 1)
    features = [x]
    block = 0
    while f'conv_stages.conv_blocks.{block}.0.weight' in p:
        name = f'conv_stages.conv_blocks.{block}'
        y = x
        for conv, norm, padding in ((0, 1, 0), (3, 4, 1), (6, 7, 0)):
            y = F.conv2d(y, p[f'{name}.{conv}.weight'], None, 1, padding)
            y = _norm_relu(p, f'{name}.{norm}', y, training)
        x = x + y
        block += 1
    name = 'conv_stages.downsample'
    x = F.conv2d(x, p[f'{name}.weight'], p[f'{name}.bias'], 2, 1)
    features.append(x)
    for stage in range(3):
        block = 0
        while f'stages.{stage}.blocks.{block}.norm1.weight' in p:
            name = f'stages.{stage}.blocks.{block}'
            x = x.permute(0, 2, 3, 1)
            x = x + _channel_mlp(
                p, f'{name}.channel_mlp1', _layer_norm(p, f'{name}.norm1', x)
            )
            x = _layer_norm(p, f'{name}.connect_norm', x).permute(0, 3, 1, 2)
            weight = p[f'{name}.connect.weight']
            x = F.conv2d(x.contiguous(), weight, None, 1, 1, 1, weight.shape[0])
            x = x.permute(0, 2, 3, 1)
            x = x + _channel_mlp(
                p, f'{name}.channel_mlp2', _layer_norm(p, f'{name}.norm2', x)
            )
            x = x.permute(0, 3, 1, 2).contiguous()
            block += 1
        name = f'stages.{stage}.downsample_mlp.downsample'
        if f'{name}.weight' in p:
            x = F.conv2d(x, p[f'{name}.weight'], p[f'{name}.bias'], 2, 1)
        if stage != 1:
            features.append(x)
    x = _layer_norm(p, 'norm', x.permute(0, 2, 3, 1)).mean(dim=(1, 2))
    return features, F.linear(x, p['head.weight'], p['head.bias'])
