# Semantic FPN with ConvMLP-S on ADE20K (paper Sec. 4.6, Table 7): 8 GPUs x 2 images,
# 40 000 iterations. (The authors' released file has 4 images on each GPU.)
_base_ = './_base_/semantic_fpn.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='ConvMLP',
        arch='s',
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://shi-labs.com/projects/convmlp/checkpoints/convmlp_s_imagenet.pth',
        ),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

train_dataloader = dict(batch_size=2)

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=2e-4, weight_decay=1e-4)
)
param_scheduler = [
    dict(type='PolyLR', power=0.9, eta_min=0.0, begin=0, end=40000, by_epoch=False)
]
train_cfg = dict(max_iters=40000, val_interval=4000)
default_hooks = dict(checkpoint=dict(interval=4000))
randomness = dict(seed=42)
