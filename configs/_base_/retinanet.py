# RetinaNet with ResNet-50 on COCO: mmdet's own recipe with our runtime.
_base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', './default_runtime.py']

num_classes = 80
model = dict(bbox_head=dict(num_classes=num_classes))
default_hooks = _base_.runtime_default_hooks
