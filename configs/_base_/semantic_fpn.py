# Semantic FPN with ResNet-50 on ADE20K: mmseg's own recipe with our runtime. mmengine
# cannot open `mmseg::` when the maintained stack is installed, where the distribution
# has another name, so the file is looked up beside the package (found, not imported:
# that takes seconds).
_base_ = [
    __import__('importlib.util').util.find_spec('mmseg').submodule_search_locations[0]
    + '/.mim/configs/sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py',
    './default_runtime.py',
]

num_classes = 150
model = dict(
    # Deprecated in mmseg; each backbone has its own init_cfg instead.
    pretrained=None,
    backbone=dict(
        init_cfg=dict(type='Pretrained', checkpoint='open-mmlab://resnet50_v1c')
    ),
    decode_head=dict(num_classes=num_classes),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)
default_hooks = _base_.runtime_default_hooks
