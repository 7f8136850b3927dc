# Semantic FPN with ResNet-50 by mmseg's own recipe: a row that Table 7 of the paper
# compares with.
_base_ = '../_base_/semantic_fpn.py'
