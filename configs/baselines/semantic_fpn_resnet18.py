_base_ = './semantic_fpn_resnet50.py'

model = dict(
    backbone=dict(depth=18, init_cfg=dict(checkpoint='open-mmlab://resnet18_v1c')),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
