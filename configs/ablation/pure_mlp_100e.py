# Paper Table 2, row 1 (63.29 %): Pure-MLP, reproduced exactly: 7.88 M parameters.
_base_ = './convmlp_s_100e.py'

model = dict(
    backbone=dict(conv_stage=False, conv_downsample=False, depthwise_conv=False)
)
