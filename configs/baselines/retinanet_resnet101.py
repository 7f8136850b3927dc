# RetinaNet with ResNet-101 by mmdet's own recipe: a row that Table 5 of the paper
# compares with.
_base_ = '../_base_/retinanet.py'

model = dict(
    backbone=dict(depth=101, init_cfg=dict(checkpoint='torchvision://resnet101'))
)
