"""A ConvMLP in place of the backbone of other people's configurations."""

import json
import math
from argparse import Namespace
from pathlib import Path

import algorithms
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.structures import InstanceData

from convmlp_mm import ConvMLP
from convmlp_mm.apis import build_model, swap_backbone
from convmlp_mm.launch import load_config, read_model
from convmlp_mm.swap.child import child_config, difference
from convmlp_mm.toolkits import TOOLKITS
from convmlp_mm.zoo import find_config, published_weights

RETINANET = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco'
DINO = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco'
DEEPLAB = 'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb2-80k_cityscapes-512x1024'
RESNET = 'mmpretrain::resnet/resnet50_8xb32_in1k'
C4 = 'mmdet::faster_rcnn/faster-rcnn_r50-caffe_c4-1x_coco'
CONVNEXT = 'mmdet::convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco'


def test_detector_gets_maps_of_the_same_strides():
    cfg = find_config(DINO)
    new = swap_backbone(cfg, 'l')
    assert new.model.backbone == dict(
        type='ConvMLP',
        arch='l',
        out_indices=[1, 2, 3],
        frozen_stages=0,
        norm_cfg=dict(type='BN', requires_grad=False),
        norm_eval=True,
        init_cfg=dict(
            type='Pretrained', checkpoint=published_weights('convmlp_l_imagenet')
        ),
    )
    assert new.model.neck.in_channels == [192, 384, 768]
    # Nothing else is changed, and the configuration is not.
    changed = difference(cfg.to_dict(), new.to_dict())
    assert changed.keys() == {'model', 'custom_imports'}
    assert changed['model'].keys() == {'backbone', 'neck'}
    assert cfg.model.backbone.type == 'ResNet'


def test_map_that_nothing_takes_is_not_computed():
    cfg = find_config(RETINANET)
    # As in CLRNet, whose ResNet hands out a fourth.
    cfg.model.neck.in_channels = [256, 512, 1024]
    new = swap_backbone(cfg, 's', False)
    assert new.model.neck.in_channels == [64, 128, 256]
    assert new.model.backbone.out_indices == [0, 1, 2]


def test_segmentor_gets_four_maps_by_position():
    new = swap_backbone(find_config(DEEPLAB), 's', False)
    assert new.model.backbone == dict(
        type='ConvMLP',
        arch='s',
        out_indices=[0, 1, 2, 3],
        norm_cfg=dict(type='SyncBN', requires_grad=True),
    )
    head, auxiliary = new.model.decode_head, new.model.auxiliary_head
    assert (head.in_index, head.in_channels, head.c1_in_channels) == (3, 512, 64)
    assert (auxiliary.in_index, auxiliary.in_channels) == (2, 256)
    assert new.model.pretrained is None


def test_classifier_gets_the_last_map_normalised():
    new = swap_backbone(find_config(RESNET))
    # The old one has begun with random weights.
    assert new.model.backbone == dict(
        type='ConvMLP', arch='s', out_indices=[3], final_norm=True
    )
    assert new.model.head.in_channels == 512


def test_images_come_as_the_weights_have_seen_them(tmp_path):
    cfg = find_config(C4)
    assert cfg.model.data_preprocessor.std == [1.0, 1.0, 1.0]
    new = swap_backbone(cfg, pretrained=str(tmp_path / 'mine.pth'))
    preprocessor = new.model.data_preprocessor
    assert preprocessor.mean == [123.675, 116.28, 103.53] and preprocessor.bgr_to_rgb
    assert preprocessor.pad_size_divisor == 32
    assert new.model.backbone.init_cfg.checkpoint == str(tmp_path / 'mine.pth')
    assert swap_backbone(cfg, pretrained=False).model.data_preprocessor.std == [1] * 3


def test_published_weights_are_for_three_channels():
    cfg = find_config(RETINANET)
    cfg.model.backbone.in_channels = 4
    new = swap_backbone(cfg)
    assert new.model.backbone.in_channels == 4 and 'init_cfg' not in new.model.backbone
    assert new.model.data_preprocessor == cfg.model.data_preprocessor


# By the command line and the environment: the check of a launch says it, and what comes
# after it does not; without our launcher, the first process does.
@pytest.mark.parametrize(
    ('options', 'environment', 'said'),
    [
        (dict(launcher='none'), {}, True),
        (dict(launcher='none', check=True), {}, True),
        (dict(launcher='pytorch'), dict(CONVMLP_MM_ATTEMPT='0', RANK='0'), False),
        (dict(launcher='none', check=True), dict(CONVMLP_MM_ATTEMPT='0'), True),
        (dict(launcher='pytorch'), dict(RANK='0'), True),
        (dict(launcher='pytorch'), dict(RANK='1'), False),
    ],
)
def test_what_is_changed_is_said_once(monkeypatch, capsys, options, environment, said):
    monkeypatch.delenv('CONVMLP_MM_ATTEMPT', raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    read_model(Namespace(config=RETINANET, backbone='convmlp_s', **options))
    lines = capsys.readouterr().err.splitlines()
    assert sum('neck.in_channels' in line for line in lines) == said


def test_run_does_not_go_where_the_recipe_runs_with_its_own_backbone():
    options = dict(cfg_options=None, launcher='none', work_dir=None, local_rank=0)
    args = Namespace(config=RETINANET, backbone='convmlp_m', dump=None, **options)
    name = 'retinanet_r50_fpn_1x_coco_convmlp_m'
    assert load_config(args).work_dir == f'work_dirs/{name}'


@pytest.mark.parametrize(
    ('theirs', 'ours'), [(-1, None), (0, None), (1, 0), (2, 1), (3, 2), (4, 4)]
)
def test_stages_are_frozen_up_to_the_same_stride(theirs, ours):
    cfg = find_config(RETINANET)
    cfg.model.backbone.frozen_stages = theirs
    new = swap_backbone(cfg, pretrained=False)
    assert new.model.backbone.get('frozen_stages') == ours
    if ours in (0, 1, 2):
        frozen = ConvMLP(frozen_stages=ours)
        last = [p.name for p in frozen.feature_points][ours]
        for name, parameter in frozen.named_parameters():
            if name.startswith(f'{last}.'):
                assert not parameter.requires_grad


REFUSED = {
    'cornernet/cornernet_hourglass104_8xb6-210e-mstest_coco': 'several maps of one',
    'detectors/cascade-rcnn_r50-rfp_1x_coco': 'its neck feeds maps back into it',
    'tridentnet/tridentnet_r50-caffe_1x_coco': 'three branches',
    'rtmdet/rtmdet_x_p6_4xb8-300e_coco': 'a map of stride 64',
    'mmseg::ddrnet/ddrnet_23_in1k-pre_2xb6-120k_cityscapes-1024x1024': 'two branches',
    'mmseg::unet/unet-s5-d16_fcn_4xb4-40k_drive-64x64': 'encoder and decoder in one',
    'mmseg::dpt/dpt_vit-b16_8xb2-160k_ade20k-512x512': 'DPTHead .*: it takes tokens',
    'mmpretrain::deit/deit-small_4xb256_in1k': 'ClsHead .*: it takes tokens',
    'mmpretrain::vgg/vgg11_8xb32_in1k': 'it classifies by itself',
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_cannot_be_replaced_is_refused_with_the_reason(name):
    cfg = find_config(name if '::' in name else f'mmdet::{name}')
    with pytest.raises(ValueError, match=REFUSED[name]):
        swap_backbone(cfg)


def test_configuration_without_a_backbone_is_refused():
    cfg = find_config(RETINANET)
    with pytest.raises(ValueError, match="arch must be one of 's', 'm', 'l'"):
        swap_backbone(cfg, 'xl')
    cfg.model = dict(type='Nothing')
    with pytest.raises(ValueError, match='Nothing has no backbone to replace'):
        swap_backbone(cfg)


def test_layer_wise_learning_rates_are_those_of_our_layers():
    cfg = find_config(CONVNEXT)
    rate = cfg.optim_wrapper.paramwise_cfg.decay_rate
    new = swap_backbone(cfg, pretrained=False)
    model = build_model(new)
    wrapper = dict(new.optim_wrapper, type='OptimWrapper')
    wrapper.pop('loss_scale', None)
    groups = build_optim_wrapper(model, wrapper).optimizer.param_groups
    lr = cfg.optim_wrapper.optimizer.lr
    found = {}
    for group in groups:
        for parameter in group['params']:
            assert id(parameter) not in found
            found[id(parameter)] = group
    for name, parameter in model.named_parameters():
        layer, number = model.backbone.get_layer_depth(name, 'backbone.')
        group = found.pop(id(parameter))
        assert math.isclose(group['lr'], lr * rate ** (number - 1 - layer))
        assert (group['weight_decay'] == 0) == (parameter.ndim == 1)
    assert not found


def test_rules_of_the_old_backbone_are_left_out():
    name = 'mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco'
    keys = swap_backbone(find_config(name)).optim_wrapper.paramwise_cfg.custom_keys
    assert 'backbone' in keys and 'query_embed' in keys
    assert 'absolute_pos_embed' not in keys
    assert 'backbone.patch_embed.norm' not in keys
    # A ConvMLP has this one, too.
    assert 'backbone.stages.0.blocks.0.norm' in ''.join(keys)


def test_child_configuration_is_the_swapped_one(tmp_path):
    cfg = find_config(DEEPLAB)
    new = swap_backbone(cfg)
    text = child_config(cfg, new, f'{DEEPLAB}.py')
    assert len(text.splitlines()) < 40
    (tmp_path / 'child.py').write_text(text)
    assert Config.fromfile(tmp_path / 'child.py').to_dict() == new.to_dict()


# What goes beyond the channels of a neck: an extra layer, a passed map, a head.
OTHERS = {
    C4: (2, 3, 128, 128),
    'mmdet::faster_rcnn/faster-rcnn_r50-caffe-dc5_1x_coco': (2, 3, 64, 96),
    'mmdet::ssd/ssd300_coco': (2, 3, 320, 320),
    'mmdet::yolo/yolov3_d53_8xb8-ms-608-273e_coco': (2, 3, 96, 96),
    'mmdet::yolof/yolof_r50-c5_8xb8-1x_coco': (2, 3, 96, 96),
    'mmseg::fastfcn/fastfcn_r50-d32_jpu_enc_4xb2-80k_cityscapes-512x1024': None,
    'mmseg::stdc/stdc1_4xb12-80k_cityscapes-512x1024': None,
    'mmseg::bisenetv1/bisenetv1_r50-d32_4xb4-160k_cityscapes-1024x1024': None,
    'mmseg::ocrnet/ocrnet_r101-d8_4xb2-40k_cityscapes-512x1024': None,
    'mmseg::cgnet/cgnet_fcn_4xb4-60k_cityscapes-680x680': None,
    'mmseg::beit/beit-base_upernet_8xb2-160k_ade20k-640x640': None,
    'mmseg::knet/knet-s3_r50-d8_fcn_8xb2-adamw-80k_ade20k-512x512': None,
    'mmpretrain::convnext/convnext-tiny_32xb128_in1k': None,
    'mmpretrain::arcface/resnet50-arcface_8xb32_inshop': None,
}


@pytest.mark.parametrize('arch', ['s', 'l'])
@pytest.mark.parametrize('name', OTHERS)
def test_other_structures_run(name, arch):
    model = build_model(swap_backbone(find_config(name), arch, False))
    shape = OTHERS[name] or (2, 3, 64, 96)
    with torch.no_grad():
        maps = model.extract_feat(torch.rand(shape))
        if hasattr(model, 'decode_head'):
            heads = [model.decode_head]
            if model.with_auxiliary_head:
                auxiliary = model.auxiliary_head
                several = isinstance(auxiliary, torch.nn.ModuleList)
                heads += auxiliary if several else [auxiliary]
            if isinstance(heads[0], torch.nn.ModuleList):
                first, last = heads[0]
                heads = [lambda maps: last(maps, first(maps))]
            for head in heads:
                head(maps)
        elif model.with_roi_head if hasattr(model, 'with_roi_head') else False:
            regions = torch.tensor([[0, 3.0, 3, 50, 40], [1, 10, 5, 60, 45]])
            model.rpn_head(maps)
            model.roi_head.forward(maps, [InstanceData(bboxes=regions[:, 1:])] * 2)
        elif hasattr(model, 'bbox_head'):
            model.bbox_head(maps)
        elif hasattr(model, 'head'):
            model.head(maps)


def test_command_line_trains_another_algorithm(tmp_path, tool):
    out = tmp_path / 'shapes'
    sizes = '--train', 4, '--val', 2, '--size', 96
    assert tool('data/make_shapes_dataset.py', out, *sizes).returncode == 0
    classes = ['circle', 'square', 'triangle', 'star', 'ring', 'cross']
    options = [f'data_root={out}/coco/', 'model.bbox_head.num_classes=6']
    options += ['train_cfg.max_epochs=1', 'default_hooks.logger.interval=1']
    options += ['model.backbone.init_cfg=None']
    annotations = f'{out}/coco/annotations/instances_val2017.json'
    options += [f'{s}_evaluator.ann_file={annotations}' for s in ('val', 'test')]
    for split, step in (('train', 2), ('val', 1), ('test', 1)):
        key = f'{split}_dataloader'
        options += [f'{key}.num_workers=0', f'{key}.persistent_workers=False']
        options += [f'{key}.dataset.data_root={out}/coco/']
        options += [f'{key}.dataset.metainfo.classes={classes}'.replace(' ', '')]
        options += [f'{key}.dataset.pipeline.{step}.scale=(96,96)']
    child = tmp_path / 'my_fcos.py'
    command = ['train.py', 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco']
    command += ['--backbone', 'convmlp_s', '--dump', child]
    done = tool(*command, '--work-dir', tmp_path / 'work', '--cfg-options', *options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'ResNet' in done.stderr and 'ConvMLP-S (128 at 8, ' not in done.stderr
    assert 'neck.in_channels: [256, 512, 1024, 2048] -> [64, 128,' in done.stderr
    log = json.loads(next(tmp_path.rglob('scalars.json')).read_text().splitlines()[0])
    assert math.isfinite(log['loss'])
    assert (tmp_path / 'work' / 'epoch_1.pth').is_file()
    dumped = Config.fromfile(child)
    assert dumped.model.backbone.type == 'ConvMLP'
    assert dumped.model.bbox_head.num_classes == 80
    assert Path(child).read_text().startswith('_base_')


@pytest.mark.parametrize(
    ('theirs', 'ours'),
    [
        (RETINANET, 'retinanet_convmlp_s'),
        ('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco', 'mask_rcnn_convmlp_s'),
        ('mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512', 'semantic_fpn_convmlp_s'),
    ],
)
def test_systems_of_the_paper_are_those_of_our_recipes(theirs, ours):
    swapped = build_model(swap_backbone(find_config(theirs), 's', False))
    model = build_model(find_config(ours))
    # Names, shapes and what is computed.
    swapped.load_state_dict(model.state_dict())
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected, found = model.extract_feat(images), swapped.extract_feat(images)
    for x, y in zip(expected, found, strict=True):
        torch.testing.assert_close(y, x)
    parameters = swapped.backbone.named_parameters()
    frozen = {name.partition('.')[0] for name, p in parameters if not p.requires_grad}
    assert frozen == ({'tokenizer'} if 'mmdet' in theirs else set())


def test_complexity_is_counted_with_another_backbone(tmp_path, tool):
    child = tmp_path / 'mine.py'
    command = 'complexity.py', RETINANET, '--backbone', 'convmlp_s', '--dump', child
    done = tool(*command)
    assert done.returncode == 0, done.stderr
    ours = tool('complexity.py', 'retinanet_convmlp_s', '--shape', 800, 1280)
    numbers = [d.stdout.splitlines()[1].split()[1:] for d in (done, ours)]
    assert numbers[0] == numbers[1]
    # The file is a configuration, and the same command leaves it as it is.
    assert tool('complexity.py', child).stdout.split()[-1] == numbers[0][-1]
    assert tool(*command).returncode == 0


@pytest.mark.parametrize(
    ('options', 'fragment'),
    [
        (['--dump', 'x.py'], '--dump FILE.py writes a configuration with --backbone'),
        (['--backbone', 'convmlp_s', '--dump', 'x.txt'], '--dump FILE.py'),
        (
            ['--backbone', 'convmlp_s', '--dump', 'full.py'],
            "'full.py' is already there",
        ),
        (['--backbone', 'convmlp_s', '--dump', 'no/x.py'], "'no' does not exist"),
        (['--backbone', 'resnet'], "invalid choice: 'resnet'"),
    ],
)
def test_backbone_that_cannot_be_written_is_named(
    tmp_path, tool, monkeypatch, options, fragment
):
    monkeypatch.chdir(tmp_path)
    Path('full.py').write_text('a = 1\n')
    done = tool('train.py', RETINANET, *options, '--check')
    assert done.returncode == 2 and fragment in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ['full.py']
    assert Path('full.py').read_text() == 'a = 1\n'


@pytest.mark.slow
def test_what_fails_with_the_old_backbone_alike_is_told_apart(tmp_path, monkeypatch):
    # The tool goes to the folder of the configurations.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(algorithms, 'SIDES', (96,))
    names = dict(
        good=RETINANET,
        cpu='mmdet::carafe/faster-rcnn_r50_fpn-carafe_1x_coco',
        not_one='mmdet::tridentnet/tridentnet_r50-caffe_1x_coco',
    )
    found = {f'mmdet:{k}': algorithms.try_case(name) for k, name in names.items()}
    page = tmp_path / 'page.md'
    page.write_text(''.join(f'<!-- {s} -->\nold\n<!-- end -->\n' for s in TOOLKITS))
    algorithms.write_page(found, page)
    text = page.read_text()
    assert (
        '1 of 3 are ok, 1 are refused, 1 fail as with the old backbone, and 0' in text
    )
    assert 'old\n' not in text.replace('the old', '')
    contiguous, channels_last = found['mmdet:good']['losses']
    assert channels_last == pytest.approx(contiguous, rel=1e-5)
    lines = [line for line in text.splitlines() if line.startswith('| ')][1:]
    assert [line.split(' | ')[2][:20] for line in lines if '`' in line] == [
        'as the old backbone,',
        'ok at 96 pixels, los',
        'not: TridentResNet c',
    ]
