"""Feature maps and saliency maps: what they show, and of which weights."""

import hashlib

import numpy as np
import pytest
import torch
from mmpretrain.datasets.categories import CIFAR10_CATEGORIES
from PIL import Image

from convmlp_mm.analysis.common import load_models
from convmlp_mm.analysis.feature_maps import choose_channels, map_models
from convmlp_mm.analysis.images import fit_image, preprocess, read_image
from convmlp_mm.analysis.saliency import compute_saliency, map_classifiers

CIFAR = 'transfer/convmlp_s_cifar10'
MIXER = 'mmpretrain::mlp_mixer/mlp-mixer-base-p16_64xb64_in1k'


@pytest.fixture(scope='module')
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp('picture') / 'a.png'
    pixels = np.random.default_rng(0).integers(0, 255, (80, 100, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """A classifier's file as the Runner saves it, with the names of classes."""
    (source,) = load_models([CIFAR], [None], seed=5)
    path = tmp_path_factory.mktemp('weights') / 'epoch_1.pth'
    meta = dict(dataset_meta=dict(classes=('ship', 'dog, hound', *'cdefghij')))
    torch.save(dict(state_dict=source.model.state_dict(), meta=meta), path)
    return path


def test_maps_are_those_that_the_backbone_gives(picture):
    image = read_image(str(picture))
    sources = load_models(
        ['retinanet_convmlp_s', 'baselines/retinanet_resnet18'], [None] * 2
    )
    rows = map_models(sources, image, (64, 96), number=4)
    for source, row in zip(sources, rows):
        assert [stage.stride for stage in row.stages] == [4, 8, 16, 32]
        assert row.image.shape == (64, 96, 3)
        inputs = preprocess(source.model, fit_image(image, (64, 96)))
        with torch.no_grad():
            maps = source.model.backbone(inputs)
        for stage, expected in zip(row.stages, maps, strict=True):
            assert stage.num_channels == expected.shape[1]
            np.testing.assert_allclose(
                stage.maps, expected[0, stage.channels], rtol=1e-5, atol=1e-6
            )


def test_channels_are_chosen_by_their_spread():
    maps = torch.randn(6, 5, 5) * torch.tensor([1, 5, 0, 3, 5, 2.0]).view(6, 1, 1)
    spread = maps.flatten(1).std(1)
    assert (
        choose_channels(maps, 3).tolist()
        == spread.argsort(descending=True)[:3].tolist()
    )
    assert choose_channels(torch.ones(4, 2, 2), 9).tolist() == [0, 1, 2, 3]


def test_model_of_one_size_keeps_it_and_its_tokens_become_maps(picture):
    sources = load_models([MIXER, 'ablation/pure_mlp_100e'], [None, None])
    mixer, mlp = map_models(sources, read_image(str(picture)), (64, 64), number=2)
    assert mixer.image.shape[:2] == (224, 224) and mlp.image.shape[:2] == (64, 64)
    assert [stage.name for stage in mixer.stages] == [
        f'layers.{i}' for i in (2, 5, 8, 11)
    ]
    assert {stage.maps.shape for stage in mixer.stages} == {(2, 14, 14)}
    assert {stage.stride for stage in mixer.stages} == {16}


def test_statement_tells_random_from_loaded_weights(weights):
    random, loaded = load_models([CIFAR, CIFAR], [None, str(weights)], seed=3)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert random.random and random.weights == 'random weights (seed 3)'
    assert not loaded.random
    assert loaded.weights == f'weights: epoch_1.pth (SHA-256 {digest[:8]})'
    assert random.colour != loaded.colour
    (again,) = load_models([CIFAR], [None], seed=5)
    for one, two in zip(again.model.parameters(), loaded.model.parameters()):
        assert torch.equal(one, two)


def test_saliency_is_the_gradient_of_the_predicted_score(picture):
    (source,) = load_models([CIFAR], [None])
    inputs = preprocess(source.model, fit_image(read_image(str(picture)), (64, 64)))
    found, scores = compute_saliency(source.model, inputs)
    x = inputs.clone().requires_grad_()
    features = source.model.backbone(x)[-1].mean((2, 3))
    expected = torch.nn.functional.linear(
        features, source.model.head.fc.weight, source.model.head.fc.bias
    )[0]
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    expected.max().backward()
    torch.testing.assert_close(found, x.grad[0].abs().amax(0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize('method', ['smoothgrad', 'integrated_gradients'])
def test_other_methods_are_reproducible(picture, method):
    sources = load_models([CIFAR], [None])
    image = read_image(str(picture))
    ((one,),) = map_classifiers(sources, [image], (32, 32), method)
    ((two,),) = map_classifiers(sources, [image], (32, 32), method)
    assert one.values.shape == (32, 32) and one.values.max() > 0
    np.testing.assert_allclose(one.values, two.values, rtol=1e-3, atol=1e-6)


def test_saliency_of_the_command_line(tool, picture, weights, tmp_path):
    out = tmp_path / 'sheet.png'
    command = ['saliency.py', picture, picture, '--labels', 'dog', '0']
    command += ['--models', CIFAR, CIFAR, '--weights', weights, 'none']
    done = tool(*command, '--size', '64', '96', '--out', out)
    assert done.returncode == 0, done.stderr
    assert Image.open(out).size[0] > 300
    arrays = np.load(out.with_suffix('.npz'))
    assert arrays['truths'].tolist() == ['dog', 'airplane']
    assert 'SHA-256' in arrays['weights'][0] and 'random' in arrays['weights'][1]
    assert arrays['0/1/saliency'].shape == (64, 96)
    assert arrays['0/0/prediction'] in CIFAR10_CATEGORIES
    again = tool(*command, '--out', out)
    assert again.returncode == 2 and 'is already there' in again.stderr


def test_feature_maps_of_the_command_line(tool, picture, tmp_path):
    out = tmp_path / 'sheet.png'
    command = ['feature_maps.py', picture, '--models', CIFAR, '--names', 'ours']
    done = tool(*command, '--size', '64', '64', '--channels', '4', '--out', out)
    assert done.returncode == 0, done.stderr
    arrays = np.load(out.with_suffix('.npz'))
    assert arrays['models'].tolist() == ['ours']
    assert arrays['0/stages'].tolist() == [
        'tokenizer',
        'conv_stages',
        'stages.0',
        'stages.2',
    ]
    assert arrays['0/3/maps'].shape == (4, 2, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['sheet.npz', 'sheet.png']


@pytest.mark.parametrize(
    'options, fragment',
    [
        (['--models', 'nothing'], "no configuration 'nothing'"),
        (['--models', CIFAR, '--size', '16', '64'], '--size must be at least 32'),
        (['--models', CIFAR, '--weights', 'none', 'none'], '--weights must be one for'),
        (['--models', CIFAR, '--weights', 'no.pth'], "weights 'no.pth'"),
        (['--models', CIFAR, '--labels', 'a', 'b'], '--labels must be one for each'),
        (['--models', 'convmlp_s_imagenet', '--labels', 'hub'], "has no class 'hub'"),
        (['--models', 'retinanet_convmlp_s'], 'is no classifier'),
        (['--models', CIFAR, '--out', 'no/x.png'], "folder 'no' does not exist"),
        (['--models', CIFAR, '--out', 'x.jpg'], '--out must end with .png'),
    ],
)
def test_mistakes_are_said_in_one_line(tool, picture, tmp_path, options, fragment):
    out = [] if '--out' in options else ['--out', tmp_path / 'x.png']
    done = tool('saliency.py', picture, *options, *out)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if 'error:' in line]
    assert len(lines) == 1 and fragment in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_unreadable_pictures_are_named(tool, tmp_path):
    (tmp_path / 'text.png').write_text('no picture')
    for name, fragment in (
        ('text.png', 'cannot be read'),
        ('no.png', 'does not exist'),
    ):
        command = ['feature_maps.py', tmp_path / name, '--models', CIFAR]
        done = tool(*command, '--out', tmp_path / 'x.png')
        assert done.returncode == 2 and fragment in done.stderr and name in done.stderr
