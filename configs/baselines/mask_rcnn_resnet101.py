# Mask R-CNN with ResNet-101 by mmdet's own recipe: a row that Table 6 of the paper
# compares with.
_base_ = '../_base_/mask_rcnn.py'

model = dict(
    backbone=dict(depth=101, init_cfg=dict(checkpoint='torchvision://resnet101'))
)
