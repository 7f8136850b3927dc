# Semantic FPN with ResNet-18 by mmseg's own recipe: a row that Table 7 of the paper
# compares with.
_base_ = '../_base_/semantic_fpn.py'

model = dict(
    backbone=dict(depth=18, init_cfg=dict(checkpoint='open-mmlab://resnet18_v1c')),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
