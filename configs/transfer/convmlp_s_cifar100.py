# CIFAR-100, by the recipe for CIFAR-10.
_base_ = './convmlp_s_cifar10.py'

num_classes = 100
data_root = 'data/cifar100/'
data_preprocessor = dict(
    num_classes=num_classes,
    mean=[255 * x for x in (0.5071, 0.4867, 0.4408)],
    std=[255 * x for x in (0.2675, 0.2565, 0.2761)],
)
model = dict(head=dict(num_classes=num_classes))

# RandAugment and RandomErasing fill with the colour of the data set.
bgr_mean = data_preprocessor['mean'][::-1]
bgr_std = data_preprocessor['std'][::-1]
train_pipeline = _base_.train_pipeline
train_pipeline[2].hparams.pad_val = [round(x) for x in bgr_mean]
train_pipeline[3].update(fill_color=bgr_mean, fill_std=bgr_std)

data = dict(type='CIFAR100', data_root=data_root)
train_dataloader = dict(dataset=dict(data, pipeline=train_pipeline))
val_dataloader = dict(dataset=data)
test_dataloader = val_dataloader
