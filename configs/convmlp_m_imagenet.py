_base_ = './convmlp_s_imagenet.py'

model = dict(backbone=dict(arch='m'))
