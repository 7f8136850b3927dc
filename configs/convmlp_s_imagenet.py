# ConvMLP-S on ImageNet-1k (paper Sec. 4.1, Table 3): 8 GPUs x 128 images, 300 epochs;
# what is not here is mmpretrain's own DeiT recipe, as the paper says. (The authors'
# script goes on for 10 more epochs at the lowest learning rate.)
_base_ = './_base_/imagenet.py'

data_root = 'data/imagenet/'

model = dict(
    backbone=dict(
        _delete_=True, type='ConvMLP', arch='s', out_indices=(3,), final_norm=True
    ),
    neck=dict(_delete_=True, type='GlobalAveragePooling'),
    head=dict(
        _delete_=True,
        type='LinearClsHead',
        in_channels=512,
        num_classes=_base_.num_classes,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
)

test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='ResizeEdge',
        scale=248,
        edge='short',
        backend='pillow',
        interpolation='bicubic',
    ),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]
train_dataloader = dict(batch_size=128, dataset=dict(data_root=data_root))
val_dataloader = dict(
    batch_size=128, dataset=dict(data_root=data_root, pipeline=test_pipeline)
)
test_dataloader = val_dataloader

optim_wrapper = dict(type='AmpOptimWrapper', optimizer=dict(lr=5e-4), clip_grad=None)
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=0.2,
        by_epoch=True,
        begin=0,
        end=5,
        convert_to_iter_based=True,
    ),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=5),
]
custom_hooks = [
    *_base_.runtime_hooks,
    # Decay 0.99996, of the BN statistics too, as in timm.
    dict(type='EMAHook', momentum=4e-5, update_buffers=True, priority='ABOVE_NORMAL'),
]
randomness = dict(seed=42)
