# RetinaNet with ResNet-101 by mmdet's own recipe: a row that Table 5 of the paper
# compares with.
_base_ = [
    'mmdet::retinanet/retinanet_r101_fpn_1x_coco.py',
    '../_base_/default_runtime.py',
]

num_classes = 80
model = dict(bbox_head=dict(num_classes=num_classes))
# Kills and full disks leave whole checkpoints.
default_hooks = dict(checkpoint=dict(type='SafeCheckpointHook'))
