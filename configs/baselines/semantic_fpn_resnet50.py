# Semantic FPN with ResNet-50 by mmseg's own recipe: a row that Table 7 of the paper
# compares with.
_base_ = ['../_base_/semantic_fpn_ade20k.py', '../_base_/default_runtime.py']

model = dict(
    backbone=dict(
        init_cfg=dict(type='Pretrained', checkpoint='open-mmlab://resnet50_v1c')
    )
)
