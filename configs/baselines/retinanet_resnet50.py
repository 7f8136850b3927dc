# RetinaNet with ResNet-50 by mmdet's own recipe: a row that Table 5 of the paper
# compares with.
_base_ = '../_base_/retinanet.py'
