# Mask R-CNN with ResNet-50 by mmdet's own recipe: a row that Table 6 of the paper
# compares with.
_base_ = '../_base_/mask_rcnn.py'
