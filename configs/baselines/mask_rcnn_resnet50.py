# Mask R-CNN with ResNet-50 by mmdet's own recipe: a row that Table 6 of the paper
# compares with.
_base_ = [
    'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    '../_base_/default_runtime.py',
]

num_classes = 80
model = dict(
    roi_head=dict(
        bbox_head=dict(num_classes=num_classes),
        mask_head=dict(num_classes=num_classes),
    ),
)
# Kills and full disks leave whole checkpoints.
default_hooks = dict(checkpoint=dict(type='SafeCheckpointHook'))
