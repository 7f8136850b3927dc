# Flowers-102, by the recipe for CIFAR-10 with 8 GPUs x 96 images and a lower end of
# the learning rate. (The authors' released file starts S from 5e-4.)
_base_ = './convmlp_s_cifar10.py'

num_classes = 102
data_root = 'data/flowers102/'
data_preprocessor = dict(
    num_classes=num_classes,
    mean=[255 * x for x in (0.4353, 0.3773, 0.2872)],
    std=[255 * x for x in (0.2966, 0.2455, 0.2698)],
)
model = dict(head=dict(num_classes=num_classes))

# RandAugment and RandomErasing fill with the colour of the data set.
bgr_mean = data_preprocessor['mean'][::-1]
bgr_std = data_preprocessor['std'][::-1]
train_pipeline = _base_.train_pipeline
train_pipeline[2].hparams.pad_val = [round(x) for x in bgr_mean]
train_pipeline[3].update(fill_color=bgr_mean, fill_std=bgr_std)
load = dict(type='LoadImageFromFile')
train_pipeline = [load, *train_pipeline]
test_pipeline = [load, *_base_.test_pipeline]

data = dict(type='Flowers102', data_root=data_root)
train_dataloader = dict(
    batch_size=96, dataset=dict(data, split='trainval', pipeline=train_pipeline)
)
val_dataloader = dict(batch_size=96, dataset=dict(data, pipeline=test_pipeline))
test_dataloader = val_dataloader

param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], eta_min=1e-8),
]
auto_scale_lr = dict(base_batch_size=768)
