_base_ = './semantic_fpn_resnet50.py'

model = dict(
    backbone=dict(depth=101, init_cfg=dict(checkpoint='open-mmlab://resnet101_v1c'))
)
