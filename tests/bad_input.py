"""What users get wrong: the table of test_bad_input.py."""

import contextlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import tiny
import torch

TRAIN, TEST = 'train.py', 'test.py'
JSON = 'boxes.json'


def case(name, kind, words, *options, spoil=None, tool=TRAIN, **more):
    """A row of the table: id, recipe and data of tiny.py, words of the message.

    The options are for ``--cfg-options``; spoil is called with a namespace of paths, to
    spoil one of them; more can be ``arguments`` beside those that all cases have, and
    ``during``, the context of the run.
    """
    values = SimpleNamespace(
        kind=kind, words=words, options=options, spoil=spoil, tool=tool, **more
    )
    return pytest.param(values, id=name.replace(' ', '-'))


def edit(function, name=JSON):
    """Change the annotation file by a function of its content."""

    def spoil(paths):
        path = paths.data / name
        content = json.loads(path.read_text())
        content = function(content) or content
        path.write_text(json.dumps(content))

    return spoil


def in_first(table, **values):
    return edit(lambda content: content[table][0].update(values))


def put(name, content):
    """Write a file of the data: text, bytes, pixels, or what a function makes of it."""

    def spoil(paths):
        path = paths.data / name
        if callable(content):
            path.write_bytes(content(path.read_bytes()))
        elif isinstance(content, np.ndarray):
            path.write_bytes(cv2.imencode(path.suffix, content)[1].tobytes())
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def remove(name):
    return lambda paths: (paths.data / name).unlink()


def config(text):
    return lambda paths: paths.config.write_text(text)


def append(text):
    return lambda paths: paths.config.write_text(paths.config.read_text() + text)


def cut(content):
    return content[:-200]


# A row for each mistake is easier to read than a column.
# fmt: off
DET, SEG, CLS = 'detector', 'segmentor', 'classifier'
CONFIGURATIONS = [
    case('unknown config', DET, ["configuration '", "recipe.py' does not exist"],
         spoil=lambda paths: paths.config.unlink()),
    case('syntax error', DET, ['recipe.py', 'SyntaxError', 'line 1'],
         spoil=config('model = dict(\n')),
    case('missing base', DET, ['nowhere.py'], spoil=config("_base_ = 'nowhere.py'\n")),
    case('misspelt backbone argument', DET, ['ConvMLP', "argument 'archh'"],
         'model.backbone.archh=s'),
    case('unknown architecture', DET, ["arch must be one of 's', 'm', 'l'", "'xl'"],
         'model.backbone.arch=xl'),
    case('unknown backbone', DET, ['ConvMPL is not in the', 'registry'],
         'model.backbone.type=ConvMPL'),
    case('unknown hook', DET, ['CheckHook is not in the', 'registry'],
         'custom_hooks.0.type=CheckHook'),
    case('unknown data set', DET, ['CocoDatset is not in the', 'registry'],
         'train_dataloader.dataset.type=CocoDatset'),
    case('unknown optimizer', DET, ["optimizer.type 'AdamV' is not in the registry"],
         'optim_wrapper.optimizer.type=AdamV'),
    case('unknown transform', SEG, ['RandomFlipp is not in the', 'registry'],
         'train_dataloader.dataset.pipeline.2.type=RandomFlipp'),
    case('channels of the neck', DET, ['model.neck.in_channels', '[8, 8, 16, 32]'],
         'model.neck.in_channels=[8,8,16,32]'),
    case('learning rate is text', DET, ['optim_wrapper.optimizer.lr', "'fast'"],
         'optim_wrapper.optimizer.lr=fast'),
    case('negative learning rate', DET, ['optim_wrapper.optimizer.lr', '-0.1'],
         'optim_wrapper.optimizer.lr=-0.1'),
    case('negative batch size', DET, ['train_dataloader.batch_size', '-2'],
         'train_dataloader.batch_size=-2'),
    case('batch size is text', DET, ['train_dataloader.batch_size', "'many'"],
         'train_dataloader.batch_size=many'),
    case('negative workers', DET, ['train_dataloader.num_workers', '-1'],
         'train_dataloader.num_workers=-1'),
    case('epochs are text', DET, ['train_cfg.max_epochs', "'all'"],
         'train_cfg.max_epochs=all'),
    case('classes of the head', DET,
         ['model.bbox_head.num_classes is 80', 'has 2 classes: apple, pear'],
         'model.bbox_head.num_classes=80'),
    case('classes of the segmentor', SEG, ['model.decode_head.num_classes is 19'],
         'model.decode_head.num_classes=19'),
    case('classes of the classifier', CLS, ['model.head.num_classes is 10'],
         'model.head.num_classes=10'),
    case('classes are text', DET, ['5 of the 5 names in metainfo.classes: a, p, p,'],
         'train_dataloader.dataset.metainfo.classes=apple'),
    case('class not in the file', DET, ['metainfo.classes: plum; it has apple, pear'],
         'train_dataloader.dataset.metainfo.classes=[apple,plum]'),
    case('classes twice', DET, ["class 2 is 'pear', but there it is None"],
         'train_dataloader.dataset.metainfo.classes=[apple,pear,pear]'),
    case('classes in another order', DET, ["class 0 is 'pear', but there"],
         'train_dataloader.dataset.metainfo.classes=[pear,apple]'),
    case('option of no dict', DET, ["depths={'x': 1}", 'tuple'],
         'model.backbone.arch.depths.x=1'),
    case('missing base of the new style', DET, ['error: config', 'nowhere.py not'],
         spoil=config('from mmengine.config import read_base\n'
                      'with read_base():\n    from .nowhere import *\n')),
]
FILES = [
    case('work dir is a file', DET, ['File exists', "boxes.json'"],
         arguments=lambda paths: ['--work-dir', paths.data / JSON]),
    case('work dir below a file', DET, ['Not a directory', "boxes.json/work'"],
         arguments=lambda paths: ['--work-dir', paths.data / JSON / 'work']),
    case('missing data folder', DET, ["data folder 'no/data' does not exist"],
         'train_dataloader.dataset.data_root=no/data'),
    case('missing annotation file', DET, ["boxes.json' does not exist"],
         spoil=remove(JSON)),
    case('annotation file is a folder', DET, ["images' is a folder"],
         'train_dataloader.dataset.ann_file=images'),
]
ANNOTATIONS = [
    case('no JSON', DET, ["boxes.json'", 'JSONDecodeError'],
         spoil=put(JSON, lambda text: text[:-9])),
    case('empty JSON', DET, ["boxes.json'", 'JSONDecodeError'], spoil=put(JSON, '')),
    case('JSON in binary', DET, ["boxes.json'", 'UnicodeDecodeError'],
         spoil=put(JSON, b'\xff\xfe\x00')),
    case('JSON of a list', DET, ["boxes.json'", 'list'], spoil=put(JSON, '[]')),
    case('no list of images', DET, ["boxes.json' is wrong", "'images'"],
         spoil=edit(lambda content: content.pop('images') and content)),
    case('no categories', DET, ["boxes.json' is wrong", "'categories'"],
         spoil=edit(lambda content: content.pop('categories') and content)),
    case('images is empty', DET, ['images is empty'], spoil=edit(
        lambda content: dict(content, images=[], annotations=[]))),
    case('empty annotation list', DET,
         ['CocoDataset has no images', "boxes.json'"],
         'train_dataloader.dataset.filter_cfg.filter_empty_gt=True',
         spoil=edit(lambda content: dict(content, annotations=[]))),
    case('duplicate annotation ids', DET, ['stand twice in annotations: 2'],
         spoil=in_first('annotations', id=2)),
    case('duplicate image ids', DET, ['stand twice in images: 2'],
         spoil=in_first('images', id=2)),
    case('duplicate category ids', DET, ['stand twice in categories: 2'],
         spoil=in_first('categories', id=2)),
    case('annotations of other images', DET,
         ["boxes.json'", 'all annotations are of images or categories that it has not'],
         spoil=edit(lambda content: [a.update(image_id=77 + a['id'])
                                     for a in content['annotations']] and None)),
    case('annotations of other categories', DET,
         ["boxes.json'", 'all annotations are of images or categories that it has not'],
         spoil=edit(lambda content: [a.update(category_id=9)
                                     for a in content['annotations']] and None)),
    case('category names twice', DET, ["class 2 is None, but there it is 'pear'"],
         spoil=edit(lambda content: content['categories'].append(
             dict(id=7, name='pear')))),
    case('NaN box', DET, ['bbox of annotation 1 must be four finite', 'nan'],
         spoil=in_first('annotations', bbox=[1, 2, float('nan'), 4])),
    case('box of three numbers', DET, ['bbox of annotation 1 must be four'],
         spoil=in_first('annotations', bbox=[1, 2, 3])),
    case('box of text', DET, ["boxes.json'", 'bbox of annotation 1 must be', "'wide'"],
         spoil=in_first('annotations', bbox=[1, 2, 'wide', 4])),
    case('no area', DET, ["boxes.json' is wrong", "KeyError('area')"],
         spoil=edit(lambda content: content['annotations'][0].pop('area') and None)),
    case('no file name', DET, ["boxes.json' is wrong", "'file_name'"],
         spoil=edit(lambda content: content['images'][0].pop('file_name') and None)),
    case('no height', DET, ["boxes.json' is wrong", "'height'"],
         spoil=edit(lambda content: content['images'][0].pop('height') and None)),
    case('width of zero', DET, ['height or width of 1 is not above 0'],
         spoil=in_first('images', width=0)),
    case('mask of another size', DET, ['of annotation 1 has the size [9, 9]'],
         spoil=in_first('annotations', segmentation=dict(size=[9, 9], counts='9'))),
    case('sizes of the file and of JSON', DET, ["1.jpg'", '64x48', '640x48'],
         spoil=in_first('images', width=640)),
    case('label beyond the classes', CLS, ["1.jpg'", 'label [2]', '2 classes'],
         spoil=put('labels.txt', '1.jpg 2\n')),
    case('negative label', CLS, ["1.jpg'", 'label [-1]', '2 classes'],
         spoil=put('labels.txt', '1.jpg -1\n')),
    case('label is text', CLS, ["labels.txt'", "'pear'"],
         spoil=put('labels.txt', '1.jpg pear\n')),
    case('no labels', CLS, ['CustomDataset has no images', "labels.txt'"],
         spoil=put('labels.txt', '')),
    case('line without a label', CLS, ["labels.txt'", 'not enough values'],
         spoil=put('labels.txt', '1.jpg\n')),
    case('more folders than classes', CLS, ['subfolders (1)', 'classes (2)'],
         'train_dataloader.dataset.ann_file=', 'train_dataloader.dataset.data_prefix=.',
         spoil=lambda paths: shutil.rmtree(paths.data / 'labels')),
]
IMAGES = [
    case(f'{what} {part}', kind, [name, *words], spoil=spoil)
    for kind, part, name, word in (
        (DET, 'image', 'images/1.jpg', 'damaged'),
        (CLS, 'image of the classifier', 'images/1.jpg', 'damaged'),
        (SEG, 'label map', 'labels/1.png', 'loaded'),
    )
    for what, spoil, words in (
        ('missing', remove(name), []),
        ('cut', put(name, cut), [word]),
        ('zero-byte', put(name, b''), ['the file is empty']),
        ('text as', put(name, 'hello'), ['it is damaged or no image']),
    )
]
IMAGES += [
    case('cut PNG image', DET, ['1.jpg', 'damaged'], spoil=put(
        'images/1.jpg', cut(cv2.imencode('.png', tiny.picture())[1].tobytes()))),
    case('too elongated for the recipe', DET,
         ["1.jpg' (20000x8 pixels) cannot be used (Resize)"],
         spoil=lambda paths: [put('images/1.jpg', tiny.picture(8, 20000))(paths),
                              in_first('images', height=8, width=20000)(paths)]),
    case('label map of another size', SEG, ['labels/1.png', '(9, 9)', '(48, 64)'],
         spoil=put('labels/1.png', np.zeros((9, 9), np.uint8))),
    case('label map in colour', SEG, ['labels/1.png', '(48, 64, 3)'],
         spoil=put('labels/1.png', tiny.picture())),
    case('label map beyond the classes', SEG, ['labels/1.png', '[7]', '2 classes'],
         spoil=put('labels/1.png', np.full((48, 64), 7, np.uint8))),
    case('no images for the segmentor', SEG, ['BaseSegDataset has no images'],
         'train_dataloader.dataset.data_prefix.img_path=labels'),
]


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def checkpoint(content):
    """Write what ``test.py`` loads."""

    def spoil(paths):
        value = content(paths) if callable(content) else content
        if isinstance(value, bytes):
            paths.checkpoint.write_bytes(value)
        else:
            torch.save(value, paths.checkpoint)

    return spoil


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def published_detector(paths):
    """Weights of mmdetection 2.x under other names than those of the model."""
    return dict(
        state_dict={
            'backbone.tokenizer.block.0.weight': torch.zeros(32, 3, 3, 3),
            'neck.lateral_convs.0.conv.weight': torch.zeros(256, 64, 1, 1),
        },
        meta=dict(CLASSES=('person',)),
    )


RESNET = {'backbone.conv1.weight': torch.zeros(64, 3, 7, 7)}


CHECKPOINTS = [
    case('missing checkpoint', DET, ["weights.pth' does not exist"], tool=TEST),
    case('folder as a checkpoint', DET, ["weights.pth' is a folder"],
         tool=TEST, spoil=lambda paths: paths.checkpoint.mkdir()),
    case('checkpoint of another architecture', DET, ['does not fit', 'missing'],
         tool=TEST, spoil=checkpoint(RESNET)),
    case('published detector of another size', DET, ['does not fit', 'another shape'],
         tool=TEST, spoil=checkpoint(published_detector)),
    case('cut checkpoint', DET, ['weights.pth', 'cut short'], tool=TEST,
         spoil=checkpoint(cut(saved(dict(state_dict=dict(a=torch.zeros(9))))))),
    case('empty checkpoint', DET, ['weights.pth', 'cut short'], tool=TEST,
         spoil=checkpoint(b'')),
    case('checkpoint of a list', DET, ['must hold a dict, but holds a list'], tool=TEST,
         spoil=checkpoint([1, 2])),
    case('malicious checkpoint', DET, ['objects that are not allowed'], tool=TEST,
         spoil=checkpoint(lambda p: dict(state_dict={}, x=Harmful(p.data / 'door')))),
    case('malicious pickle', DET, ['weights.pth', 'not allowed'], tool=TEST,
         spoil=checkpoint(lambda p: pickle.dumps(Harmful(str(p.data / 'door'))))),
    case('no network', DET, ['cannot fetch http://127.0.0.1:9/weights.pth'],
         'load_from=http://127.0.0.1:9/weights.pth'),
    case('no checkpoint to resume', DET, ["'no.pth' does not exist"],
         arguments=lambda paths: ['--resume', 'no.pth']),
    case('folder to resume from', DET, ["images' is a folder"],
         arguments=lambda paths: ['--resume', paths.data / 'images']),
    case('strategy', DET, ['DDP only'], 'strategy.type=DDPStrategy'),
    case('predictions in another format', DET, ['--out must end with .pkl', 'a.json'],
         tool=TEST, spoil=checkpoint({}),
         arguments=lambda paths: ['--out', 'a.json']),
    *(case(f'{what} in a checkpoint', DET, ["weights.pth'", *words], tool=TEST,
           spoil=checkpoint(content)) for what, words, content in (
        ('list of weights', ['a dict as state_dict, but holds a list'],
         dict(state_dict=[torch.ones(1)])),
        ('list of records', ['a dict as meta, but holds a list'],
         dict(state_dict={}, meta=[1])),
    )),
]


def spoil_run(function):
    """Leave the checkpoint of a run, changed by a function."""

    def spoil(paths):
        paths.train()
        path = paths.work / 'epoch_1.pth'
        content = torch.load(path, weights_only=False)
        function(content)
        torch.save(content, path)

    return spoil


def train_before(**change):
    """Leave the checkpoint of a run, with another recipe noted in it."""
    return spoil_run(lambda content: content['meta']['recipe'].update(change))


def resume(paths):
    return ['--resume']


def check(paths):
    return ['--check']


def other_images(paths, change):
    content = json.loads((paths.data / JSON).read_text())
    for image in content['images']:
        change(image)
    (paths.data / 'other.json').write_text(json.dumps(content))


def other_ids(paths):
    other_images(paths, lambda image: image.update(id=image['id'] + 1))


def other_names(paths):
    paths.checkpoint.touch()
    other_images(paths, lambda image: image.update(file_name='x' + image['file_name']))


@contextlib.contextmanager
def another_run():
    """Another process trains in the work dir."""
    code = (
        'import fcntl; file = open("work/.lock", "a"); fcntl.lockf(file, fcntl.LOCK_EX)'
        '\nprint(flush=True); input()'
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('convmlp_mm.hooks.work_dir.PATIENCE', 0)
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with subprocess.Popen([sys.executable, '-c', code], **pipes) as process:
            process.stdout.readline()
            yield
            process.communicate(b'\n')


def damage(paths):
    """Leave a run all of whose checkpoints are cut short."""
    paths.work.mkdir()
    for name in ('epoch_1.pth', 'epoch_2.pth'):
        (paths.work / name).write_bytes(b'PK')
    (paths.work / 'last_checkpoint').write_text(str(paths.work / 'epoch_2.pth'))


def rename_backbone(content):
    state = content['state_dict']
    for key in [key for key in state if key.startswith('backbone.')]:
        state[f'former_{key}'] = state.pop(key)


def resume_by_name(paths):
    return ['--resume', paths.work / 'epoch_1.pth']


def to_integers(content):
    state, key = content['state_dict'], 'backbone.tokenizer.block.0.weight'
    state[key] = state[key].to(torch.int8)


RUNS = [
    case('full disk', DET,
         ['cannot save', "epoch_1.pth: File too large; there is none yet"],
         during=tiny.full_disk),
    case('world size changed', DET,
         ['with another recipe (processes 8 before and 1 now)', 'load_from='],
         arguments=resume, spoil=train_before(processes=8)),
    case('batch size changed', DET,
         ['with another recipe (batch size 2 before and 1 now)', 'load_from='],
         'train_dataloader.batch_size=1', arguments=resume, spoil=train_before()),
    case('learning rate changed', DET,
         ['with another recipe (lr 0.001 before and 1e-05 now)', 'epoch_1.pth'],
         'optim_wrapper.optimizer.lr=1e-5', arguments=resume, spoil=train_before()),
    case('weight decay changed', DET, ['recipe (weight decay 0 before and 0.7 now)'],
         'optim_wrapper.optimizer.weight_decay=0.7', arguments=resume,
         spoil=train_before()),
    case('optimizer changed', DET, ['recipe (optimizer SGD before and AdamW now'],
         'optim_wrapper.optimizer.type=AdamW', arguments=resume, spoil=train_before()),
    case('parameter groups changed', DET, ['recipe (parameters [', ' before and [1, 1'],
         'optim_wrapper.paramwise_cfg.bias_lr_mult=2', arguments=resume,
         spoil=train_before()),
    case('schedule added', DET,
         ["(param scheduler [] before and ['ExponentialLR'] now)"],
         arguments=resume, spoil=lambda paths: [train_before()(paths), append(
             'param_scheduler = dict(type="ExponentialLR", gamma=0.9)\n')(paths)]),
    case('data set halved', DET,
         ['with another recipe (training samples 4 before and 2 now)'],
         'train_dataloader.dataset.indices=2', arguments=resume, spoil=train_before()),
    case('more top classes than classes', CLS,
         ['val_evaluator.topk is (1, 5), but model.head has 2 classes'],
         'val_evaluator.topk=(1,5)', arguments=check),
    case('metric of other images', DET, ["other.json'", "have image 1, '1.jpg', of"],
         'val_evaluator.ann_file=data/other.json', arguments=check, spoil=other_ids),
    case('metric of images with the same ids', DET, ["have image 1, '1.jpg', of"],
         'test_evaluator.ann_file=data/other.json', tool=TEST, spoil=other_names),
    case('only damaged checkpoints', DET,
         ["/work' can be resumed from", "epoch_2.pth' and 1 more", 'move them'],
         arguments=resume, spoil=damage),
    case('work dir of a run that goes on', DET,
         ["/work' is in use by process 7 of there", 'choose another --work-dir'],
         during=another_run,
         spoil=lambda paths: (paths.work.mkdir(), (paths.work / '.lock').write_text(
             'process 7 of there since noon: train.py'))),
    case('resume from other names', DET, ["epoch_1.pth'", 'missing: backbone.tok'],
         arguments=resume_by_name, spoil=spoil_run(rename_backbone)),
    case('resume from integers', DET, ["epoch_1.pth'", 'kind of numbers', 'torch.int8'],
         arguments=resume_by_name, spoil=spoil_run(to_integers)),
    case('resume from a damaged position', DET, ["epoch_1.pth'", 'exact_resume'],
         arguments=resume_by_name,
         spoil=spoil_run(lambda c: c['exact_resume'].update(batches=-3))),
]
CASES = [*CONFIGURATIONS, *FILES, *ANNOTATIONS, *IMAGES, *CHECKPOINTS, *RUNS]
# fmt: on
