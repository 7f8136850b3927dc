_base_ = './semantic_fpn_convmlp_s.py'

model = dict(
    backbone=dict(
        arch='l',
        init_cfg=dict(
            checkpoint='https://shi-labs.com/projects/convmlp/checkpoints/convmlp_l_imagenet.pth'
        ),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
