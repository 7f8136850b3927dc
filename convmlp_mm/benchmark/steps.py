"""Build a model as asked for, and one step of it as a function without arguments."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope

from ..apis import build_model, load_weights, switch_to_deploy
from ..config_files import find_config
from ..hooks.model import operator_of_mmcv, use_channels_last
from ..launch import plain_optim_wrapper
from ..zoo import published_weights
from .equality import replace_backbone
from .inputs import draw_batch
from .spec import ARCH, ModelSpec

if TYPE_CHECKING:
    from mmengine.model import BaseModel
    from torch import Tensor

__all__ = ['Job', 'MATMUL', 'build_step', 'spec_config']

# The name of the job that multiplies two matrices, and how large they are.
MATMUL = 'matmul'
MATMUL_SIZE = 2048
FORMATS = {
    'nchw': torch.contiguous_format,
    'channels-last': torch.channels_last,
    None: torch.preserve_format,
}


@dataclass(frozen=True)
class Job:
    """What one worker measures.

    Attributes:
        spec (ModelSpec): The model; ``MATMUL`` as its name is the product of two
            square matrices of 2048 rows in float32.
        mode (str): ``'infer'`` or ``'train'``.
        batch_size (int): Number of pictures.
        shape (tuple[int, int]): Their height and width in pixels.
        device (str): ``'cpu'`` or a CUDA device.
        warmup (int): Steps before the first that counts, from 1 on.
        min_time (float): A repetition takes as many steps as fill these seconds.
        predict (bool): Infer up to boxes, label maps or classes.
        weights (bool): Load the published weights, instead of random ones.
    """

    spec: ModelSpec
    mode: str
    batch_size: int
    shape: tuple[int, int]
    device: str = 'cpu'
    warmup: int = 3
    min_time: float = 0.05
    predict: bool = False
    weights: bool = False

    def to_dict(self) -> dict:
        """Return what JSON can carry."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> Job:
        """Read what :meth:`to_dict` has returned."""
        spec = ModelSpec(**values['spec'])
        return cls(**{**values, 'spec': spec, 'shape': tuple(values['shape'])})


def spec_config(name: str) -> Config:
    """Read the configuration of a model's name.

    Args:
        name (str): See :class:`ModelSpec`.

    Returns:
        Config: For a bare backbone, a classifier without neck and head.

    Raises:
        ValueError: If there is none of this name.
    """
    if not name.startswith(ARCH):
        return find_config(name)
    backbone = dict(type='ConvMLP', arch=name[len(ARCH) :])
    model = dict(type='ImageClassifier', backbone=backbone)
    # Its own preprocessor would leave the values of pixels as they are.
    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    return Config(
        dict(
            default_scope='mmpretrain',
            model=model,
            data_preprocessor=dict(mean=mean, std=std, num_classes=1000),
        )
    )


def build_step(job: Job) -> Callable[[], object]:
    """Build a model and return what runs it once.

    Args:
        job (Job): What to build.

    Returns:
        Callable: A forward pass, or an optimizer step with its preprocessing.

    Raises:
        ValueError: If the model cannot be built as asked for.
    """
    torch.manual_seed(0)
    if job.spec.name == MATMUL:
        matrix = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=job.device)
        return lambda: matrix @ matrix
    model = _build(job)
    batch = draw_batch(model, job.batch_size, job.shape)
    return (_infer if job.mode == 'infer' else _train)(job, model, batch)


def _build(job: Job) -> BaseModel:
    spec = job.spec
    cfg = copy.deepcopy(spec_config(spec.name))
    if spec.cp:
        if 'backbone' not in cfg.model:
            raise ValueError(f'{spec.name} has no backbone to recompute')
        cfg.model.backbone.with_cp = True
    model = revert_sync_batchnorm(build_model(cfg))
    if job.weights:
        load_weights(model, published_weights(spec.name))
    if cfg.default_scope == 'mmseg':
        # Training pads to the size of the recipe; here, the size is asked for.
        model.data_preprocessor.size = job.shape
        model.data_preprocessor.size_divisor = None
    if spec.published:
        replace_backbone(model, cfg.model.backbone)
    if spec.deploy:
        switch_to_deploy(model)
    if spec.layout is None:
        # As ChannelsLastHook does.
        use_channels_last(model)
    elif spec.layout == 'channels-last' and operator_of_mmcv(model):
        raise ValueError(
            f'{spec.name} has {operator_of_mmcv(model)}, which computes other values '
            'from channels-last maps'
        )
    return model.to(device=job.device, memory_format=FORMATS[spec.layout])


def _arrange(inputs: Tensor, spec: ModelSpec) -> Tensor:
    return inputs.contiguous(memory_format=FORMATS[spec.layout])


def _infer(job: Job, model: BaseModel, batch: dict) -> Callable[[], object]:
    """Return the forward pass on a batch that is ready."""
    spec = job.spec
    dtype = getattr(torch, spec.dtype)
    batch = model.data_preprocessor(batch, False)
    inputs = _arrange(batch['inputs'].to(dtype), spec)
    samples = batch['data_samples']
    model.to(dtype)
    if spec.name.startswith(ARCH):
        call, rest = model.backbone, ()
    elif job.predict:
        call, rest = model, (samples, 'predict')
    elif model.cfg.default_scope == 'mmdet':
        call, rest = model, (samples, 'tensor')
    else:
        call, rest = model, ()
    if spec.compile:
        call = torch.compile(call)

    def step():
        with torch.no_grad():
            return call(inputs, *rest)

    return step


def _train(job: Job, model: BaseModel, batch: dict) -> Callable[[], object]:
    """Return the step of the Runner: uint8 pictures in, weights updated."""
    spec = job.spec
    model.train()
    with DefaultScope.overwrite_default_scope(model.cfg.default_scope):
        wrapper = build_optim_wrapper(model, _optimizer(model.cfg))
    # So that each step does the same work: the count of boxes, for one, depends on
    # what the model has learnt.
    for group in wrapper.optimizer.param_groups:
        group['lr'] = 0.0
    # Some ask the Runner how far it is, and vary the size of the pictures by it.
    hub = MessageHub.get_current_instance()
    hub.update_info_dict(dict(iter=0, epoch=0, max_iters=1, max_epochs=1))
    bare = spec.name.startswith(ARCH)
    forward = model.backbone if bare else model
    if spec.compile:
        forward = torch.compile(forward)

    def cast():
        if spec.dtype == 'float32':
            return contextlib.nullcontext()
        return torch.autocast(
            torch.device(job.device).type, dtype=getattr(torch, spec.dtype)
        )

    def step():
        # The preprocessor may change the samples, not the pictures.
        samples = copy.deepcopy(batch['data_samples'])
        with cast(), wrapper.optim_context(model):
            data = model.data_preprocessor({**batch, 'data_samples': samples}, True)
            inputs = _arrange(data['inputs'], spec)
            if bare:
                losses = dict(loss=[(x.float() ** 2).mean() for x in forward(inputs)])
            else:
                losses = forward(inputs, data['data_samples'], mode='loss')
        loss, _ = model.parse_losses(losses)
        wrapper.update_params(loss)

    return step


def _optimizer(cfg: Config) -> dict:
    """Return the optimizer of the recipe, in single precision; else AdamW."""
    wrapper = copy.deepcopy(cfg.get('optim_wrapper'))
    if not wrapper:
        return dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-4))
    plain_optim_wrapper(wrapper)
    return wrapper
