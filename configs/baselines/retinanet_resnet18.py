# RetinaNet with ResNet-18 by mmdet's own recipe: a row that Table 5 of the paper
# compares with.
_base_ = '../_base_/retinanet.py'

model = dict(
    backbone=dict(depth=18, init_cfg=dict(checkpoint='torchvision://resnet18')),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
