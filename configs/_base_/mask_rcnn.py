# Mask R-CNN with ResNet-50 on COCO: mmdet's own recipe with our runtime.
_base_ = ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', './default_runtime.py']

num_classes = 80
model = dict(
    roi_head=dict(
        bbox_head=dict(num_classes=num_classes),
        mask_head=dict(num_classes=num_classes),
    )
)
default_hooks = _base_.runtime_default_hooks
