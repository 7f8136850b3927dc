"""Operators, backbones and systems on a GPU against the CPU and the published model."""

import argparse
import copy
import runpy

import torch
from mmcv import ops
from results import ROOT, Results, relative, set_tf32

from convmlp_mm import ConvMLP

HEADLINES = (
    'retinanet_convmlp_s.py',
    'mask_rcnn_convmlp_s.py',
    'semantic_fpn_convmlp_s.py',
    'convmlp_s_imagenet.py',
)
# With products in TF32 or not, and the type.
PRECISIONS = (
    (False, torch.float32),
    (True, torch.float32),
    (False, torch.bfloat16),
    (False, torch.float16),
)


def name_of(tf32: bool, dtype: torch.dtype) -> str:
    return 'TF32' if tf32 else str(dtype).removeprefix('torch.')


def build(args: argparse.Namespace, results: Results) -> None:
    """Compare mmcv's operators with their results on the CPU, forward and backward."""
    set_tf32(False)
    torch.manual_seed(0)
    boxes = torch.rand(2000, 4) * 100
    boxes[:, 2:] += boxes[:, :2]
    scores = torch.rand(2000)
    with results.checking('nms'):
        kept = [
            ops.nms(boxes.to(d), scores.to(d), 0.5)[1].tolist()
            for d in ('cpu', args.device)
        ]
        results.add('nms', kept[0] == kept[1], boxes=2000, kept=len(kept[0]))
    maps = torch.randn(2, 16, 40, 56)
    regions = torch.cat([torch.randint(2, (200, 1)).float(), boxes[:200] / 2], 1)
    offset, mask = torch.randn(2, 18, 40, 56), torch.rand(2, 9, 40, 56)
    operators = {
        'roi_align': (ops.RoIAlign(7, 0.5, 2), [maps], [regions]),
        'deform_conv2d': (ops.DeformConv2d(16, 32, 3, padding=1), [maps, offset], []),
        'modulated_deform_conv2d': (
            ops.ModulatedDeformConv2d(16, 32, 3, padding=1),
            [maps, offset, mask],
            [],
        ),
    }
    for name, (operator, inputs, constants) in operators.items():
        with results.checking(name):
            found = []
            for device in ('cpu', args.device):
                operator.to(device).zero_grad()
                # Leaves of their own: on the CPU, to() copies nothing.
                leaves = [x.clone().to(device).requires_grad_() for x in inputs]
                out = operator(*leaves, *(x.to(device) for x in constants))
                out.square().mean().backward()
                grads = [x.grad for x in (*leaves, *operator.parameters())]
                found.append([x.cpu() for x in (out, *grads)])
            error = max(relative(y, x) for x, y in zip(*found))
            results.add(name, error <= 1e-5, error=error)


def right(args: argparse.Namespace, results: Results) -> None:
    """Compare backbones with the published structure, and systems with the CPU."""
    reference = runpy.run_path(str(ROOT / 'tests' / 'reference.py'))
    for case in reference['published_outputs']():
        size = case['height'], case['width']
        name = f'{case["arch"]} at {case["batch"]} x {size[0]} x {size[1]}, float64'
        with results.checking(name):
            weights = reference['draw_checkpoint'](case['arch'], case['seed'])
            model = ConvMLP(arch=case['arch']).double().to(args.device).eval()
            model.load_state_dict({k: weights[k] for k in model.state_dict()})
            image = reference['draw_image'](*size, case['seed'], case['batch'])
            with torch.no_grad():
                maps = model(image.to(args.device))
            for x, expected in zip(maps, case['features']):
                reference['assert_summary_equal'](x.cpu(), expected)
            results.add(name, True, tolerance=1e-9)
    for arch in ('s', 'm', 'l'):
        with results.checking(f'precisions of {arch}'):
            compare_precisions(arch, reference, args, results)
    layout = runpy.run_path(str(ROOT / 'tests' / 'test_layout.py'))
    for name in HEADLINES:
        with results.checking(name):
            compare_system(name, layout, args, results)


def compare_precisions(arch: str, reference: dict, args, results: Results) -> None:
    """Compare the maps of a backbone in each precision with those in float64."""
    weights = reference['draw_checkpoint'](arch)
    exact = ConvMLP(arch=arch).double().eval()
    exact.load_state_dict({k: weights[k] for k in exact.state_dict()})
    twin = reference['PublishedConvMLP'](reference['published_arch'](weights)).eval()
    twin.load_state_dict(exact.state_dict())
    image = reference['draw_image'](224, 224, batch=2)
    with torch.no_grad():
        expected = exact.to(args.device)(image.to(args.device))
    model, twin = exact.float(), twin.float().to(args.device)
    image = image.float().to(args.device)
    last = image.contiguous(memory_format=torch.channels_last)

    def error(network, x, dtype=torch.float32, tf32=False):
        set_tf32(tf32)
        mixed = torch.autocast(args.device, dtype, enabled=dtype != torch.float32)
        with torch.no_grad(), mixed:
            maps = network(x)
        return max(relative(y, x) for x, y in zip(expected, maps))

    compiled = torch.compile(model, fullgraph=True)
    for name, network, x in (
        ('contiguous', model, image),
        ('channels-last', model, last),
        ('compiled, no graph break', compiled, image),
    ):
        found = error(network, x)
        results.add(f'{arch} in float32, {name}', found <= 1e-5, error=found)
    for tf32, dtype in PRECISIONS[1:]:
        name = name_of(tf32, dtype)
        found = error(model, image, dtype, tf32)
        published = error(twin, image, dtype, tf32)
        # Rounding differs with the kernels that are chosen, not by how much.
        passed = found <= 2 * published
        results.add(f'{arch} in {name}', passed, error=found, published=published)
    model.switch_to_deploy()
    for tf32, dtype in PRECISIONS:
        name = name_of(tf32, dtype)
        with results.checking(f'{arch} folded, {name}'):
            set_tf32(tf32)
            folded = copy.deepcopy(model).to(dtype)
            with torch.no_grad():
                maps = folded(last.to(dtype))
            found = max(relative(y, x) for x, y in zip(expected, maps))
            limit = 1e-5 if name == 'float32' else 0.05
            results.add(f'{arch} folded, {name}', found <= limit, error=found)


def compare_system(name: str, layout: dict, args, results: Results) -> None:
    """Compare losses and gradients with the CPU's, in float64, and state autocast's."""
    cfg = layout['read'](name, ROOT)
    # Other devices and types draw other numbers.
    cfg.model.backbone.drop_path_rate = 0.0
    if 'decode_head' in cfg.model:
        cfg.model.decode_head.dropout_ratio = 0.0
    with layout['in_double']():
        model = layout['build'](cfg)
        expected = layout['train_step'](model)
        model = layout['run_hooks'](model.to(args.device), cfg)
        found = layout['train_step'](model)
    errors = {key: relative(found[key], value) for key, value in expected.items()}
    losses = max(v for k, v in errors.items() if not k.startswith('gradient'))
    # A gradient that is zero but for rounding has no scale of its own.
    scales = {k: float(v.abs().max()) for k, v in expected.items()}
    gradients = {
        k: v * scales[k] / max(scales[k], 1e-9)
        for k, v in errors.items()
        if k.startswith('gradient')
    }
    worst = max(gradients, key=gradients.get)
    passed = losses <= 1e-7 and gradients[worst] <= 1e-5
    values = dict(losses=losses, gradients=gradients[worst], worst=worst)
    results.add(f'{name}, float64 against the CPU', passed, **values)
    model.float()
    for tf32, dtype in PRECISIONS:
        set_tf32(tf32)
        mixed = torch.autocast(args.device, dtype, enabled=dtype != torch.float32)
        label = name_of(tf32, dtype)
        with results.checking(f'{name} in {label}'), mixed:
            found = layout['train_step'](model, torch.float32)
            error = abs(float(found['loss'] / expected['loss']) - 1)
            results.add(f'{name} in {label}', error < 0.05, loss=error)
