# Classification on ImageNet-1k: mmpretrain's DeiT recipe without its model, which
# the leaves replace, and with our runtime.
_base_ = ['mmpretrain::deit/deit-tiny_4xb256_in1k.py', './default_runtime.py']

num_classes = 1000
data_preprocessor = dict(num_classes=num_classes)
# mmpretrain's train script adds these three; other runners do not.
loader = dict(
    collate_fn=dict(type='default_collate'), persistent_workers=True, pin_memory=True
)
train_dataloader = loader
val_dataloader = loader
test_dataloader = loader
default_hooks = _base_.runtime_default_hooks
