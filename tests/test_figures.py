"""Feature maps and saliency maps: what they show, and of which weights."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from common import load_model, run, state
from feature_maps import as_map, choose_channels, extract_stages
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from saliency import compute_saliency

from convmlp_mm import get_model
from convmlp_mm.predict import read_image

RETINANET = 'retinanet_convmlp_s'
SWIN = 'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k'
CIFAR = 'transfer/convmlp_s_cifar10'
MIXER = 'mmpretrain::mlp_mixer/mlp-mixer-base-p16_64xb64_in1k'


@pytest.fixture(scope='module')
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp('image') / 'a.png'
    pixels = np.random.default_rng(0).integers(0, 255, (80, 100, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """A classifier's file as the Runner saves it, with the names of classes."""
    path = tmp_path_factory.mktemp('weights') / 'epoch_1.pth'
    meta = dict(dataset_meta=dict(classes=('ship', 'dog, hound', *'cdefghij')))
    torch.manual_seed(5)
    state_dict = get_model(CIFAR).state_dict()
    torch.save(dict(state_dict=state_dict, meta=meta), path)
    return str(path)


@pytest.mark.parametrize(
    'name', ['retinanet_convmlp_s', 'baselines/retinanet_resnet18']
)
def test_maps_are_those_that_the_backbone_gives(image, name):
    source = load_model(name)
    seen, inputs = run(source, read_image(image), (64, 96), lambda model, x: x)
    assert seen.shape == (64, 96, 3)
    stages = extract_stages(source.model, inputs)
    with torch.no_grad():
        expected = source.model.backbone(inputs)
    for maps, output in zip(stages.values(), expected, strict=True):
        torch.testing.assert_close(maps, output[0])


def test_channels_are_chosen_by_their_spread():
    maps = torch.randn(6, 5, 5) * torch.tensor([1, 5, 0, 3, 5, 2.0]).view(6, 1, 1)
    order = maps.flatten(1).std(1).argsort(descending=True).tolist()
    assert choose_channels(maps, 3) == order[:3]
    assert choose_channels(torch.ones(4, 2, 2), 9) == [0, 1, 2, 3]


def test_model_of_one_size_keeps_it_and_its_tokens_become_maps(image):
    source = load_model(MIXER)
    seen, inputs = run(source, read_image(image), (64, 64), lambda model, x: x)
    assert seen.shape[:2] == (224, 224)
    stages = extract_stages(source.model, inputs)
    assert list(stages) == [f'layers.{i}' for i in (2, 5, 8, 11)]
    assert {maps.shape for maps in stages.values()} == {(768, 14, 14)}
    with torch.no_grad():
        tokens = source.model.backbone(inputs)[-1][0]
    # The norm after the last block works on each token by itself.
    maps = source.model.backbone.norm1(stages['layers.11'].permute(1, 2, 0))
    torch.testing.assert_close(maps[1, 3], tokens[:, 17])


@pytest.mark.parametrize('extra', [0, 1])
@pytest.mark.parametrize('grid, size', [((7, 4), (100, 60)), ((14, 28), (224, 448))])
def test_tokens_return_to_their_grid_without_a_class_token(grid, size, extra):
    maps = torch.arange(3.0 * grid[0] * grid[1]).view(3, *grid)
    tokens = torch.cat([torch.full((extra, 3), -1.0), maps.flatten(1).T])
    assert torch.equal(as_map((tokens[None], grid), size), maps)


def test_statement_tells_random_from_loaded_weights(weights):
    random, loaded = load_model(CIFAR), load_model(f'{CIFAR}@{weights}')
    digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    assert random.weights == 'random weights (seed 0)'
    assert loaded.weights == f'weights: epoch_1.pth (SHA-256 {digest[:8]})'
    saved = torch.load(weights)['state_dict']
    for key, value in loaded.model.state_dict().items():
        assert torch.equal(saved[key], value)
    colours = []
    for source in (random, loaded):
        axes = Figure().subplots()
        state(axes, source, np.zeros((2, 3, 3)))
        assert 'random' in axes.texts[1].get_text() or 'SHA' in axes.texts[1].get_text()
        colours.append(to_rgb(axes.texts[1].get_color()))
    assert colours[0][0] > 0.7 > max(colours[0][1:] + colours[1])


def test_saliency_is_the_gradient_of_the_predicted_score(image):
    source = load_model(CIFAR)
    _, inputs = run(source, read_image(image), (64, 64), lambda model, x: x)
    found, scores = compute_saliency(source.model, inputs)
    x = inputs.clone().requires_grad_()
    fc = source.model.head.fc
    features = source.model.backbone(x)[-1].mean((2, 3))
    expected = torch.nn.functional.linear(features, fc.weight, fc.bias)[0]
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    expected.max().backward()
    torch.testing.assert_close(found, x.grad[0].abs().amax(0), rtol=1e-3, atol=1e-6)


def test_saliency_of_the_command_line(tool, image, weights, tmp_path):
    out = tmp_path / 'figure.png'
    command = ['analysis/saliency.py', f'{image}=dog', f'{image}=ship', image]
    command += ['--models', f'ours={CIFAR}@{weights}', f'untrained={CIFAR}']
    command += ['--size', '64', '96', '--out', out]
    done = tool(*command)
    assert done.returncode == 0, done.stderr
    stated = json.loads(Image.open(out).text['Description'])
    assert 'SHA-256' in stated['ours'] and 'random' in stated['untrained']
    before = out.read_bytes()
    again = tool(*command)
    assert again.returncode == 2 and 'is already there' in again.stderr
    # The same seed gives the same figure.
    assert tool(*command, '--overwrite').returncode == 0
    assert out.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ['figure.png']


def test_feature_maps_of_the_command_line(tool, image, tmp_path):
    out = tmp_path / 'figure.png'
    command = ['analysis/feature_maps.py', image, '--models', f'ours={CIFAR}']
    command += ['--size', 64, 64, '--out', out]
    done = tool(*command)
    assert done.returncode == 0, done.stderr
    stated = json.loads(Image.open(out).text['Description'])
    assert stated == dict(ours='random weights (seed 0)')
    before = out.read_bytes()
    assert tool(*command, '--overwrite', '--channels', 4).returncode == 0
    assert out.read_bytes() != before


@pytest.mark.parametrize(
    'options, fragment',
    [
        (['--models', 'nothing'], "no configuration 'nothing'"),
        (['--models', f'{CIFAR}@no.pth'], "checkpoint 'no.pth' does not exist"),
        (['hub.png=hub', '--models', 'convmlp_s_imagenet'], "has no class {'hub'}"),
        (['--models', 'retinanet_convmlp_s'], 'is no classifier'),
        (['--models', SWIN, '--size', '64', '96'], 'cannot run at this size'),
        (['--models', CIFAR, '--out', 'no/x.png'], "folder 'no' does not exist"),
        (['--models', CIFAR, '--out', 'x.jpg'], '--out must end with .png'),
    ],
)
def test_mistakes_are_said_in_one_line(tool, image, tmp_path, options, fragment):
    out = [] if '--out' in options else ['--out', tmp_path / 'x.png']
    named = [option.replace('hub.png', image) for option in options]
    done = tool('analysis/saliency.py', image, *named, *out)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if 'error:' in line]
    assert len(lines) == 1 and fragment in lines[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('name', ['text.png', 'no.png'])
def test_unreadable_images_are_named(tool, tmp_path, name):
    (tmp_path / 'text.png').write_text('no image')
    command = ['analysis/feature_maps.py', tmp_path / name, '--models', CIFAR]
    done = tool(*command, '--out', tmp_path / 'x.png')
    assert done.returncode == 2
    assert 'cannot be read' in done.stderr and name in done.stderr
