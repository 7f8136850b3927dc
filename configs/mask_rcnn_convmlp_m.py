_base_ = './mask_rcnn_convmlp_s.py'

model = dict(
    backbone=dict(
        arch='m',
        init_cfg=dict(
            checkpoint='https://shi-labs.com/projects/convmlp/checkpoints/convmlp_m_imagenet.pth'
        ),
    )
)
