# Semantic FPN with ResNet-101 by mmseg's own recipe: a row that Table 7 of the paper
# compares with.
_base_ = '../_base_/semantic_fpn.py'

model = dict(
    backbone=dict(depth=101, init_cfg=dict(checkpoint='open-mmlab://resnet101_v1c'))
)
