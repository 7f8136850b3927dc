"""The smallest data sets and recipes that the real Runners of the toolkits train."""

import contextlib
import json
import resource
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ('apple', 'pear')
ARCH = dict(
    tokenizer_channels=8,
    conv_blocks=1,
    channels=(8, 16, 16),
    depths=(1, 1, 1),
    mlp_ratios=(1, 1, 1),
)
HEIGHT, WIDTH = 48, 64

COMMON = f"""
_base_ = {str(ROOT / 'configs' / '_base_' / 'default_runtime.py')!r}
backbone = dict(type='ConvMLP', arch={ARCH})
preprocessor = dict(mean=[123.0] * 3, std=[58.0] * 3, bgr_to_rgb=True)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1e-3))
train_cfg = dict(by_epoch=True, max_epochs=1)
val_cfg = test_cfg = dict()
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1),
    checkpoint=dict(type='SafeCheckpointHook', interval=1),
)
log_level = 'WARNING'
def loader(dataset):
    return dict(
        batch_size=2,
        num_workers=0,
        dataset=dataset,
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=dict(type='COLLATE'),
    )
load = dict(type='LoadImageFromFile')
root = ROOT
"""
LOADERS = """
train_dataloader = loader(dict(pipeline=train_pipeline, **data))
val_dataloader = loader(dict(pipeline=test_pipeline, test_mode=True, **data))
test_dataloader = val_dataloader
test_evaluator = val_evaluator
del loader
"""
CONFIGS = {
    'detector': f"""
default_scope = 'mmdet'
model = dict(
    type='RetinaNet',
    data_preprocessor=dict(
        type='DetDataPreprocessor', pad_size_divisor=32, **preprocessor
    ),
    backbone=backbone,
    neck=dict(type='FPN', in_channels=[8, 8, 16, 16], out_channels=8, num_outs=5),
    bbox_head=dict(
        type='RetinaHead', num_classes=2, in_channels=8, stacked_convs=1,
        feat_channels=8,
        anchor_generator=dict(
            type='AnchorGenerator', octave_base_scale=4, scales_per_octave=1,
            ratios=[1.0], strides=[8, 16, 32, 64, 128],
        ),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True, loss_weight=1.0),
        loss_bbox=dict(type='L1Loss', loss_weight=1.0),
    ),
    train_cfg=dict(
        assigner=dict(
            type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0,
            ignore_iof_thr=-1,
        ),
        sampler=dict(type='PseudoSampler'),
        allowed_border=-1, pos_weight=-1, debug=False,
    ),
    test_cfg=dict(
        nms_pre=10, min_bbox_size=0, score_thr=0.0, max_per_img=5,
        nms=dict(type='nms', iou_threshold=0.5),
    ),
)
data = dict(
    type='CocoDataset', data_root=root, ann_file='boxes.json',
    data_prefix=dict(img='images/'), metainfo=dict(classes={CLASSES}),
    filter_cfg=dict(filter_empty_gt=False),
)
resize = dict(type='Resize', scale=(64, 64), keep_ratio=True)
boxes = dict(type='LoadAnnotations', with_bbox=True)
keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
train_pipeline = [load, boxes, resize, dict(type='PackDetInputs')]
test_pipeline = [load, resize, boxes, dict(type='PackDetInputs', meta_keys=keys)]
val_evaluator = dict(type='CocoMetric', ann_file=root + '/boxes.json', metric='bbox')
""",
    'segmentor': f"""
default_scope = 'mmseg'
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor', pad_val=0, seg_pad_val=255, size=(64, 64),
        test_cfg=dict(size_divisor=32), **preprocessor,
    ),
    backbone=backbone,
    neck=dict(type='FPN', in_channels=[8, 8, 16, 16], out_channels=8, num_outs=4),
    decode_head=dict(
        type='FPNHead', in_channels=[8] * 4, in_index=[0, 1, 2, 3],
        feature_strides=[4, 8, 16, 32], channels=8, num_classes=2, dropout_ratio=0.1,
        norm_cfg=dict(type='BN'), align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
data = dict(
    type='BaseSegDataset', data_root=root, img_suffix='.jpg', seg_map_suffix='.png',
    data_prefix=dict(img_path='images', seg_map_path='labels'),
    metainfo=dict(classes={CLASSES}, palette=[[9, 9, 9], [99, 99, 99]]),
)
resize = dict(type='Resize', scale=(64, 64), keep_ratio=True)
crop = dict(type='RandomCrop', crop_size=(64, 64), cat_max_ratio=0.75)
labels = dict(type='LoadAnnotations')
pack = dict(type='PackSegInputs')
train_pipeline = [load, labels, resize, crop, pack]
test_pipeline = [load, resize, labels, pack]
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
""",
    'classifier': f"""
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    backbone=dict(out_indices=(3,), final_norm=True, **backbone),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead', num_classes=2, in_channels=16,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0), topk=(1,),
    ),
)
data_preprocessor = dict(
    num_classes=2, mean=[123.0] * 3, std=[58.0] * 3, to_rgb=True
)
data = dict(
    type='CustomDataset', data_root=root, ann_file='labels.txt', data_prefix='images',
    metainfo=dict(classes={CLASSES}),
)
resize = dict(type='Resize', scale=(64, 64))
train_pipeline = test_pipeline = [load, resize, dict(type='PackInputs')]
val_evaluator = dict(type='Accuracy', topk=(1,))
""",
}
COLLATE = dict(
    detector='pseudo_collate', segmentor='pseudo_collate', classifier='default_collate'
)


def write_config(path, kind, root):
    """Write the recipe of a kind for the data that :func:`write_data` made."""
    text = COMMON + CONFIGS[kind] + LOADERS
    text = text.replace('ROOT', repr(str(root))).replace('COLLATE', COLLATE[kind])
    Path(path).write_text(text)


def picture(height=HEIGHT, width=WIDTH):
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)


def box(number, image, bbox=(8, 8, 30, 30), category=1, **more):
    area = bbox[2] * bbox[3]
    fields = dict(bbox=list(bbox), category_id=category, area=area, iscrowd=0)
    return dict(id=number, image_id=image, **{**fields, **more})


def write_data(root):
    """Write four images with boxes, label maps and labels."""
    for folder in ('images', 'labels'):
        (root / folder).mkdir(parents=True)
    images, lines = [], []
    for i in range(1, 5):
        cv2.imwrite(str(root / f'images/{i}.jpg'), picture())
        cv2.imwrite(str(root / f'labels/{i}.png'), picture()[..., 0] % 2)
        images.append(dict(id=i, file_name=f'{i}.jpg', height=HEIGHT, width=WIDTH))
        lines.append(f'{i}.jpg {i % 2}\n')
    content = dict(
        images=images,
        annotations=[box(i, i, category=1 + i % 2) for i in range(1, 5)],
        categories=[dict(id=1 + i, name=name) for i, name in enumerate(CLASSES)],
    )
    (root / 'boxes.json').write_text(json.dumps(content))
    (root / 'labels.txt').write_text(''.join(lines))


@contextlib.contextmanager
def full_disk(limit=2**16):
    """No file can have more bytes than this, for real, and without being root."""
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
