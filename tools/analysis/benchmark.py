#!/usr/bin/env python
"""Measure speed and memory of models against each other, and of loading data.

infer and train take models as NAME[@OPTION,...]. NAME is a name of the zoo, a file,
mmdet::..., mmseg::..., mmpretrain::... or timm::NAME. published::NAME has the backbone
as the authors' release computes it. All models are timed in this process, in turn,
round by round; weights are random and images are noise.

options of a model, after @:
  deploy         BN folded into the convolutions (infer)
  tf32           float32 with products in TF32, which are exact without it
  bf16, fp16     that type: the model itself (infer), mixed precision (train)
  channels-last  weights and images in channels-last memory
  cp             gradient checkpointing in the backbone (train)
  compile        torch.compile of the backbone
  graph          the whole step as a CUDA graph (infer)
"""

import argparse
import contextlib
import copy
import json
import random
import runpy
import sys
import time
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmengine.utils import get_object_from_string
from mmengine.utils.dl_utils import set_multi_processing
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from convmlp_mm import ConvMLP, launch
from convmlp_mm.apis import build_model, switch_to_deploy
from convmlp_mm.checkpoint import check_output, write_file
from convmlp_mm.hooks.model import compile_backbone, operator_of_mmcv, use_channels_last
from convmlp_mm.launch.runner import plain_optim_wrapper
from convmlp_mm.launch.tables import format_table
from convmlp_mm.toolkits import default_shape, toolkit_of
from convmlp_mm.zoo import WORKER_KEYS, find_config

BOTH = ('tf32', 'bf16', 'fp16', 'channels-last', 'compile')
OPTIONS = dict(infer=('deploy', *BOTH, 'graph'), train=(*BOTH, 'cp'))
# Types that products are computed in; exact ones without another option.
DTYPES = dict(float32=torch.float32, tf32=torch.float32)
DTYPES |= dict(bf16=torch.bfloat16, fp16=torch.float16)
PUBLISHED = 'published::'
REFERENCE = Path(__file__).resolve().parents[2] / 'tests' / 'reference.py'
# Settings of the twins that this process has checked, which takes seconds.
CHECKED: list[dict] = []


class Entry(NamedTuple):
    """A model and how it is run."""

    text: str
    cfg: Config
    published: bool
    options: list[str]
    precision: str


def parse_entry(text: str, mode: str) -> Entry:
    """Read NAME[@OPTION,...] and check all that can be checked before it is built."""
    name, *given = text.rsplit('@', 1)
    options = given[0].split(',') if given else []
    known = ', '.join(OPTIONS[mode])
    for option in options:
        if option not in OPTIONS[mode]:
            raise ValueError(f'{text!r}: no option {option!r} of {mode} in {known}')
    precisions = set(DTYPES).intersection(options) or {'float32'}
    if len(precisions) > 1:
        raise ValueError(f'{text!r} names more than one precision')
    published, name = name.startswith(PUBLISHED), name.removeprefix(PUBLISHED)
    if 'deploy' in options and published:
        raise ValueError(f"{text!r}: 'deploy' is not for {PUBLISHED}")
    cfg = find_config(name)
    backbone = cfg.model.get('backbone') or {}
    if published and backbone.get('type') != 'ConvMLP':
        raise ValueError(f'{text!r} is for ConvMLP, not for {backbone.get("type")}')
    return Entry(text, cfg, published, options, *precisions)


def published_backbone(ours: ConvMLP, settings: dict) -> nn.Module:
    """Build the twin of a backbone, with its weights, checked to compute the same."""
    reference = runpy.run_path(str(REFERENCE))
    settings = {k: v for k, v in settings.items() if k not in ('type', 'init_cfg')}
    settings.update(arch=ours.arch, out_indices=ours.out_indices)
    # An argument that the release has not is a TypeError that names it.
    twin = reference['PublishedConvMLP'](**settings)
    twin.load_state_dict(ours.state_dict())
    twin.train(ours.training)
    if settings not in CHECKED:
        reference['check_equal'](ours, twin)
        CHECKED.append(settings)
    return twin


def draw_batch(model: nn.Module, batch_size: int, shape: tuple[int, int]) -> dict:
    """Draw images and labels as the loader of the model's toolkit hands them out."""
    scope = model.cfg.default_scope
    # The largest number, since the head of a region proposal network has one class.
    known = [getattr(module, 'num_classes', None) for module in model.modules()]
    classes = max([2, *(n for n in known if isinstance(n, int))])
    if scope == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        # COCO has as many objects in each image on average.
        objects = dict(num_items=[7] * batch_size, num_classes=classes)
        masks = getattr(model, 'with_mask', False)
        return demo_mm_inputs(batch_size, (3, *shape), **objects, with_mask=masks)
    images = torch.randint(256, (batch_size, 3, *shape), dtype=torch.uint8)
    if torch.cuda.is_available():
        # As the loaders of the recipes do, so that copies to the GPU are fast.
        images = images.pin_memory()
    meta = dict(ori_shape=shape, img_shape=shape, scale_factor=(1.0, 1.0), flip=False)
    sample_class = get_object_from_string(toolkit_of(scope).sample)
    samples = [sample_class(metainfo=meta) for _ in images]
    for sample in samples:
        if scope == 'mmpretrain':
            sample.set_gt_label(torch.randint(classes, (1,)))
        else:
            sample.gt_sem_seg = PixelData(data=torch.randint(classes, (1, *shape)))
    # mmseg stacks the images itself.
    return dict(inputs=[*images] if scope == 'mmseg' else images, data_samples=samples)


def build_step(entry: Entry, shape: tuple[int, int], args: argparse.Namespace):
    """Build a model; return its forward pass or optimizer step, without arguments."""
    torch.manual_seed(0)
    cfg, options = entry.cfg, entry.options
    model = revert_sync_batchnorm(build_model(cfg))
    if cfg.default_scope == 'mmseg':
        # Training would pad to the size of the recipe.
        model.data_preprocessor.size = shape
        model.data_preprocessor.size_divisor = None
    if entry.published:
        model.backbone = published_backbone(model.backbone, cfg.model.backbone)
    if 'deploy' in options:
        switch_to_deploy(model)
    for module in model.modules():
        if 'cp' in options and hasattr(module, 'with_cp'):
            module.with_cp = True
    layout = torch.preserve_format
    if 'channels-last' not in options:
        # ChannelsLastHook of our recipes does so.
        use_channels_last(model)
    elif operator := operator_of_mmcv(model):
        raise ValueError(
            f"{entry.text!r}: 'channels-last' is refused, since {operator} reads "
            'such maps as if they were contiguous and computes other values'
        )
    else:
        layout = torch.channels_last
    model.to(device=args.device, memory_format=layout)
    # The twin has drawn weights; the images are to be the same for all.
    torch.manual_seed(0)
    batch = draw_batch(model, args.batch_size, shape)
    build = _inference if args.mode == 'infer' else _training
    step = build(model, batch, DTYPES[entry.precision], layout)

    def precise_step():
        torch.backends.cuda.matmul.allow_tf32 = 'tf32' in options
        torch.backends.cudnn.allow_tf32 = 'tf32' in options
        return step()

    # Fused operators could not be counted one by one.
    work = count_work(precise_step)
    if 'compile' in options:
        compile_backbone(model.backbone, {})
    return as_graph(precise_step) if 'graph' in options else precise_step, work


class Traffic(TorchDispatchMode):
    """Count the bytes of the inputs and outputs of all operators that make no view."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            leaves = tree_leaves((args, kwargs, out))
            self.bytes += sum(x.nbytes for x in leaves if isinstance(x, Tensor))
        return out


def count_work(step) -> dict[str, int]:
    """Run a step; return its operations, an addition counting as one, and bytes."""
    with FlopCounterMode(display=False) as counter, Traffic() as traffic:
        step()
    return dict(flops=counter.get_total_flops(), bytes=traffic.bytes)


def measure_ceilings(device: str) -> dict[str, float]:
    """Measure what a device can do in a second.

    Returns:
        dict: The operations of a product of two large matrices by precision, and
        ``copy``, the bytes read and written while a large tensor is copied.
    """
    cuda = device == 'cuda'
    size, found = 8192 if cuda else 2048, {}
    for name in DTYPES if cuda else ('float32',):
        torch.backends.cuda.matmul.allow_tf32 = name == 'tf32'
        a = torch.randn(size, size, device=device, dtype=DTYPES[name])
        found[name] = 2 * size**3 / seconds_of(partial(torch.mm, a, a), 0.3)
    a = torch.randn(2**28 if cuda else 2**25, device=device)
    seconds = seconds_of(partial(torch.empty_like(a).copy_, a), 0.3)
    return dict(found, copy=2 * a.nbytes / seconds)


def seconds_of(step, least: float) -> float:
    """Return the median time of a call, in at least so many seconds of calls."""
    threads = torch.get_num_threads()
    timer = Timer('step()', globals=dict(step=step), num_threads=threads)
    return timer.blocked_autorange(min_run_time=least).median


def as_graph(step):
    """Record a step as a CUDA graph; return what runs it again."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _inference(model: nn.Module, batch: dict, dtype: torch.dtype, layout):
    """Return the forward pass on images that are ready, up to the head's outputs."""
    batch = model.data_preprocessor(batch, False)
    arguments = [batch['inputs'].to(dtype).contiguous(memory_format=layout)]
    if model.cfg.default_scope == 'mmdet':
        arguments += [batch['data_samples'], 'tensor']
    model.to(dtype)
    return torch.no_grad()(lambda: model(*arguments))


def _training(model: nn.Module, batch: dict, dtype: torch.dtype, layout):
    """Return the step of the Runner: preprocessing, loss, gradients, optimizer."""
    settings = model.cfg.get('optim_wrapper') or dict(optimizer=dict(type='AdamW'))
    plain_optim_wrapper(settings)
    device = next(model.parameters()).device.type
    mixed = dtype != torch.float32
    if mixed and device != 'cpu':
        # What --amp does.
        settings.update(type='AmpOptimWrapper', dtype=str(dtype).split('.')[1])
    model.train()
    with DefaultScope.overwrite_default_scope(model.cfg.default_scope):
        wrapper = build_optim_wrapper(model, settings)
    # Each step is to do the same work, which depends on what the model has learnt.
    for group in wrapper.optimizer.param_groups:
        group['lr'] = 0.0
    # Some models ask the Runner how far it is.
    progress = dict(iter=0, epoch=0, max_iters=1, max_epochs=1)
    MessageHub.get_current_instance().update_info_dict(progress)

    def step():
        # The preprocessor may change the samples, not the images.
        samples = copy.deepcopy(batch['data_samples'])
        cast = torch.autocast(device, dtype, enabled=mixed and device == 'cpu')
        with cast, wrapper.optim_context(model):
            data = model.data_preprocessor({**batch, 'data_samples': samples}, True)
            inputs = data['inputs'].contiguous(memory_format=layout)
            losses = model(inputs, data['data_samples'], mode='loss')
        wrapper.update_params(model.parse_losses(losses)[0])

    return step


def prepare(entry: Entry, args: argparse.Namespace) -> tuple:
    """Build and warm up; return a step, and what is known of it without time."""
    cuda = args.device == 'cuda'
    shape = tuple(args.shape or default_shape(entry.cfg))
    before = torch.cuda.memory_allocated() if cuda else 0
    print(f'preparing {entry.text}')
    with launch.one_line_errors():
        step, work = build_step(entry, shape, args)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(args.warmup):
        step()
    memory = torch.cuda.max_memory_allocated() - before if cuda else None
    if args.profile:
        with torch.profiler.profile() as profiler:
            step()
            if cuda:
                torch.cuda.synchronize()
        order = 'self_device_time_total' if cuda else 'self_cpu_time_total'
        print(profiler.key_averages().table(order, 20, max_name_column_width=100))
    row = dict(model=entry.text, precision=entry.precision, shape=shape, **work)
    return step, dict(row, memory=memory, seconds=[])


def measure_models(args: argparse.Namespace) -> tuple[dict, str]:
    """Time each model once a round, in a drawn order; return JSON and table."""
    with launch.one_line_errors():
        entries = [parse_entry(text, args.mode) for text in args.models]
    if args.malloc:
        launch.keep_memory()
    steps, rows = zip(*(prepare(entry, args) for entry in entries))
    draw, order = random.Random(0), []
    for i in range(args.rounds):
        print(f'round {i + 1}/{args.rounds}')
        order.append(draw.sample(range(len(rows)), len(rows)))
        for n in order[-1]:
            rows[n]['seconds'].append(seconds_of(steps[n], 0.05))
    ceilings, cells = measure_ceilings(args.device), []
    for row in rows:
        summarize(row, rows[0]['seconds'], args.batch_size, ceilings)
        times = [f'{1e3 * row[key]:.2f}' for key in ('median', 'q1', 'q3')]
        rates = [f'{row["images_per_second"]:.1f}', f'{row["ratio"]:.3f}']
        memory = '-' if row['memory'] is None else f'{row["memory"] / 2**20:.0f}'
        shares = [f'{100 * row[key]:.0f}' for key in ('rate_share', 'copy_share')]
        cells.append([row['model'], *times, *rates, memory, *shares])
    threads = torch.get_num_threads()
    header = ['model', 'ms', 'q1', 'q3', 'images/s', 'ratio', 'MiB', 'rate %', 'copy %']
    limits = ', '.join(f'{name} {x / 1e12:.2f}' for name, x in ceilings.items())
    table = format_table(header, cells) + (
        f'{args.mode}, batch of {args.batch_size}: median and quartiles of a step in '
        f'{args.rounds} rounds; ratio: times as fast as the first row; torch '
        f'{torch.__version__}, {args.device}, {threads} threads\n'
        'rate, copy: operations and bytes of the operators in a second, of those that '
        f'a large product and a large copy reach (10^12: {limits})\n'
    )
    found = dict(models=rows, order=order, threads=threads, ceilings=ceilings)
    return found, table


def summarize(
    row: dict, first: list[float], batch_size: int, ceilings: dict[str, float]
) -> None:
    """Add the figures that follow from the seconds of each round.

    The ratio to the first model is the median of those in each round, which slow
    changes of the machine do not move.
    """
    low, median, high = np.percentile(row['seconds'], (25, 50, 75)).tolist()
    ratio = float(np.median(np.divide(first, row['seconds'])))
    row.update(q1=low, median=median, q3=high, ratio=ratio)
    rate = ceilings.get(row['precision'], ceilings['float32'])
    row['rate_share'] = row['flops'] / median / rate
    row['copy_share'] = row['bytes'] / median / ceilings['copy']
    row['images_per_second'] = batch_size / median


def build_loader(cfg: Config, workers: int, batch_size: int | None):
    """Build the loader of the training as the Runner does."""
    settings = copy.deepcopy(cfg.train_dataloader)
    settings.update(num_workers=workers, persistent_workers=workers > 0)
    settings.batch_size = batch_size or settings.batch_size
    for key in WORKER_KEYS if workers == 0 else ():
        settings.pop(key, None)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        loader = Runner.build_dataloader(settings, seed=0)
    if not len(loader):
        raise ValueError(f'too few images for a batch of {settings.batch_size}')
    return loader


def measure_data(args: argparse.Namespace) -> tuple[dict, str]:
    """Time batches of the training's loader; return JSON and table."""
    with launch.one_line_errors():
        cfg = launch.read_model(args)
        if cfg.get('train_dataloader') is None:
            raise ValueError(f'configuration {args.config!r} has no train_dataloader')
        launch.check_data(cfg, ('train',))
        toolkit_of(cfg.default_scope).register()
        set_multi_processing(**(cfg.get('env_cfg') or {}).get('mp_cfg', {}))
        loaders = {n: build_loader(cfg, n, args.batch_size) for n in args.workers}
    loading, rows = {}, []
    for workers, loader in loaders.items():
        stream = chain.from_iterable(repeat(loader))
        # All processes begin with a batch at once.
        for _ in range(workers):
            next(stream)
        start = time.perf_counter()
        sizes = [len(batch['inputs']) for batch in islice(stream, args.batches)]
        seconds = time.perf_counter() - start
        batch, images = seconds / args.batches, sum(sizes) / seconds
        loading[workers] = dict(batch=batch, images_per_second=images)
        rows.append([str(workers), f'{1e3 * batch:.1f}', f'{images:.1f}'])
    return dict(loading=loading), format_table(['workers', 'ms', 'images/s'], rows)


def number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be an integer from 1 on, not {text!r}')
    return int(text)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    devices = ('cuda', 'cpu') if torch.cuda.is_available() else ('cpu',)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    modes = parser.add_subparsers(dest='mode', required=True, metavar='MODE')
    infer = modes.add_parser('infer', help='forward passes on images that are ready')
    train = modes.add_parser('train', help='optimizer steps with preprocessing')
    data = modes.add_parser('data', help='loading of training data, without a model')
    for mode in (infer, train):
        add = mode.add_argument
        add('models', nargs='+', metavar='NAME[@OPTION,...]')
        add('--batch-size', type=number, default=1)
        add('--shape', type=number, nargs=2, metavar=('H', 'W'), help='of the images')
        add('--device', choices=devices, default=devices[0])
        add('--rounds', type=number, default=10)
        add('--warmup', type=number, default=3, help='steps of each')
        add('--malloc', action='store_true', help='let it keep memory')
        add('--profile', action='store_true', help='also print the time by operator')
    data.add_argument('config', help='configuration, named as the models are')
    launch.add_cfg_options(data)
    data.add_argument('--workers', type=int, nargs='+', default=[0, 1, 2])
    data.add_argument('--batches', type=number, default=20)
    data.add_argument('--batch-size', type=number, help="by default the recipe's")
    for mode in (infer, train, data):
        mode.add_argument('--out', metavar='FILE.json', help='all that was measured')
        mode.add_argument('--overwrite', action='store_true')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    measure = measure_data if args.mode == 'data' else measure_models
    with launch.one_line_errors():
        if args.out is not None:
            check_output(args.out, args.overwrite)
    # What the toolkits print does not belong into the table.
    with contextlib.redirect_stdout(sys.stderr):
        result, table = measure(args)
    if args.out is not None:
        result = dict(vars(args), torch=torch.__version__, **result)
        write_file(args.out, json.dumps(result, indent=1) + '\n', args.overwrite)
    sys.stdout.write(table)


if __name__ == '__main__':
    main()
