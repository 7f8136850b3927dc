# Mask R-CNN with ConvMLP-S on COCO (paper Sec. 4.5, Table 6): 8 GPUs x 2 images,
# 12 epochs; what is not here is mmdet's own Mask R-CNN recipe.
_base_ = './_base_/mask_rcnn.py'

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

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=1e-4)
)
randomness = dict(seed=42)
