"""Names of classes and of options reach what they name, or nothing runs."""

import json

import pytest
import tiny
import torch

from convmlp_mm.apis import build_model, get_inferencer, load_weights
from convmlp_mm.launch import merge_options
from convmlp_mm.zoo import find_config


@pytest.fixture
def recipe(tmp_path):
    """A detector of apples and pears, and a checkpoint of its training."""
    tiny.write_data(tmp_path / 'data')
    path = tmp_path / 'recipe.py'
    tiny.write_config(path, 'detector', tmp_path / 'data')
    return path


def save(recipe, path, **meta):
    state = build_model(find_config(str(recipe))).state_dict()
    torch.save(dict(state_dict=state, meta=dict(dataset_meta=meta)), path)
    return str(path)


@pytest.mark.parametrize(
    ('before', 'after'),
    [
        # The configuration has the names in another order, or those of COCO.
        ("('apple', 'pear')", "('pear', 'apple')"),
        ("metainfo=dict(classes=('apple', 'pear')),", ''),
    ],
)
def test_names_are_those_that_the_head_was_trained_with(
    recipe, tmp_path, tool, monkeypatch, before, after
):
    weights, said = save(recipe, tmp_path / 'w.pth', classes=tiny.CLASSES), []
    log = lambda text, logger: said.append(text) if 'classes' in text else None  # noqa: E731
    monkeypatch.setattr('convmlp_mm.apis.print_log', log)
    text = recipe.read_text()
    assert before in text
    recipe.write_text(text.replace(before, after))
    out = tmp_path / 'out'
    images = tmp_path / 'data' / 'images'
    done = tool('predict.py', recipe, weights, images, '--out', out, '--score-thr', 0)
    assert done.returncode == 0, done.stderr
    categories = json.loads((out / 'results.json').read_text())['categories']
    assert [c['name'] for c in categories] == ['apple', 'pear']
    (line,) = said
    assert line.startswith(f'The classes are those of {weights}: apple, pear; the conf')


def test_names_of_a_file_stay_out_where_its_head_does(recipe, tmp_path):
    weights = save(recipe, tmp_path / 'w.pth', classes=tiny.CLASSES)
    cfg = find_config(str(recipe))
    cfg.model.bbox_head.num_classes = 3
    cfg.test_dataloader.dataset.metainfo = dict(classes=('a', 'b', 'c'))
    model = build_model(cfg)
    load_weights(model, weights)
    assert tuple(model.dataset_meta['classes']) == ('a', 'b', 'c')


def test_colours_of_other_names_are_not_kept(recipe, tmp_path):
    meta = dict(classes=('x', 'y'), palette=[(1, 2, 3), (4, 5, 6)])
    weights = save(recipe, tmp_path / 'w.pth', **meta)
    found = get_inferencer(find_config(str(recipe)), weights, 'cpu').model.dataset_meta
    assert list(found['classes']) == ['x', 'y']
    assert found['palette'] == meta['palette']


def test_file_of_names_is_read_as_in_training(recipe, tmp_path, tool, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # With the mark and the empty line that editors leave.
    (tmp_path / 'names.txt').write_text('apple\npear\n\n', encoding='utf-8-sig')
    text = recipe.read_text().replace("('apple', 'pear')", "'names.txt'")
    recipe.write_text(text)
    cfg = find_config(str(recipe))
    assert cfg.train_dataloader.dataset.metainfo.classes == ('apple', 'pear')
    assert build_model(cfg).dataset_meta['classes'] == ('apple', 'pear')
    assert tool('train.py', recipe, '--check').returncode == 0
    options = {'test_dataloader.dataset.metainfo.classes': 'names.txt'}
    merge_options(cfg, options)
    assert cfg.test_dataloader.dataset.metainfo.classes == ('apple', 'pear')


@pytest.mark.parametrize(
    ('option', 'hint'),
    [
        ('optim_wraper.optimizer.lr=0.5', "'optim_wraper'; is it optim_wrapper?"),
        ('num_classes=6', "'num_classes'"),
        ('data_rot=elsewhere', "'data_rot'"),
    ],
)
def test_option_that_reaches_nothing_is_refused(recipe, tool, option, hint):
    done = tool('train.py', recipe, '--check', '--cfg-options', option)
    assert done.returncode == 2
    key = option.partition('=')[0]
    assert f'--cfg-options {key} reaches nothing' in done.stderr
    assert hint in done.stderr


@pytest.mark.parametrize('option', ['resume=False', 'compile=True', 'load_from=None'])
def test_options_that_the_runner_reads_need_not_be_there(recipe, tool, option):
    assert tool('train.py', recipe, '--check', '--cfg-options', option).returncode == 0
