_base_ = './convmlp_s_cifar100.py'

model = dict(
    backbone=dict(
        arch='m',
        init_cfg=dict(
            checkpoint='https://shi-labs.com/projects/convmlp/checkpoints/convmlp_m_imagenet.pth'
        ),
    ),
)
