# ConvMLP-S on CIFAR-10 at 224 pixels from the ImageNet weights (paper Sec. 4.4,
# Table 4): 50 epochs and 10 at the lowest learning rate; 8 GPUs x 128 images.
_base_ = '../convmlp_s_imagenet.py'

num_classes = 10
data_root = 'data/cifar10/'
data_preprocessor = dict(
    num_classes=num_classes,
    mean=[255 * x for x in (0.4914, 0.4822, 0.4465)],
    std=[255 * x for x in (0.2470, 0.2435, 0.2616)],
)
model = dict(
    backbone=dict(
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://shi-labs.com/projects/convmlp/checkpoints/convmlp_s_imagenet.pth',
        )
    ),
    head=dict(num_classes=num_classes),
)

bgr_mean = data_preprocessor['mean'][::-1]
bgr_std = data_preprocessor['std'][::-1]
resize = dict(scale=224, backend='pillow', interpolation='bicubic')
# The images come decoded, so that nothing loads them.
train_pipeline = [
    dict(type='RandomResizedCrop', crop_ratio_range=(0.8, 1.0), **resize),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(
        type='RandAugment',
        policies='timm_increasing',
        num_policies=2,
        total_level=10,
        magnitude_level=9,
        magnitude_std=0.5,
        hparams=dict(pad_val=[round(x) for x in bgr_mean], interpolation='bicubic'),
    ),
    dict(
        type='RandomErasing',
        erase_prob=0.25,
        mode='rand',
        min_area_ratio=0.02,
        max_area_ratio=1 / 3,
        fill_color=bgr_mean,
        fill_std=bgr_std,
    ),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='ResizeEdge', edge='short', **resize),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]
data = dict(_delete_=True, type='CIFAR10', data_root=data_root)
train_dataloader = dict(dataset=dict(data, split='train', pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data, split='test', pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=dict(lr=3e-4))
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-6 / 3e-4,
        by_epoch=True,
        begin=0,
        end=10,
        convert_to_iter_based=True,
    ),
    # Epoch 50, the first of the cool-down, must be in it to reach the minimum.
    dict(
        type='CosineAnnealingLR',
        T_max=40,
        eta_min=1e-5,
        by_epoch=True,
        begin=10,
        end=51,
    ),
]
train_cfg = dict(max_epochs=60)
# No average of the weights.
custom_hooks = _base_.runtime_hooks
