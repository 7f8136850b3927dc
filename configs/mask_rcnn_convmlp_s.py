# Mask R-CNN with ConvMLP-S on COCO (paper Sec. 4.5, Table 6): 8 GPUs x 2 images,
# 12 epochs; what is not here is mmdet's own Mask R-CNN recipe.
_base_ = [
    'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    './_base_/default_runtime.py',
]

num_classes = 80

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
    roi_head=dict(
        bbox_head=dict(num_classes=num_classes),
        mask_head=dict(num_classes=num_classes),
    ),
)

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=1e-4)
)
randomness = dict(seed=42)
# Kills and full disks leave whole checkpoints.
default_hooks = dict(checkpoint=dict(type='SafeCheckpointHook'))
