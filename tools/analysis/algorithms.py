#!/usr/bin/env python
"""Try ConvMLP in every algorithm of the toolkits and write docs/algorithms.md.

One configuration stands for each folder of a toolkit: small images and random weights
must give a finite loss, a finite gradient of every trainable parameter of the backbone,
and predictions. What fails with the old backbone alike is told apart.
"""

import argparse
import contextlib
import copy
import io
import json
import multiprocessing
import os
import signal
from collections import Counter
from contextlib import redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path

import benchmark
import numpy as np
import torch
from mmdet.structures import ReIDDataSample
from mmdet.testing import demo_mm_inputs, demo_track_inputs
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.logging import MessageHub
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.runner import set_random_seed
from mmengine.structures import InstanceData, PixelData

from convmlp_mm import ConvMLP
from convmlp_mm.apis import build_model, swap_backbone
from convmlp_mm.checkpoint import write_file
from convmlp_mm.hooks.model import use_channels_last
from convmlp_mm.launch.tables import format_table
from convmlp_mm.toolkits import TOOLKITS
from convmlp_mm.zoo import find_config, map_config, mim_folder

# Seconds that a case may take.
LIMIT = 400
EXTRAS = load(Path(__file__).with_suffix('.yml'))
# Sides of the images in pixels, the next if an algorithm needs more.
SIDES = (128, 256, 640)
TRACKERS = ('QDTrack', 'MaskTrackRCNN', 'Mask2FormerVideo')
WRAPPERS = ('ByteTrack', 'OCSORT', 'StrongSORT', 'DeepSORT', 'SoftTeacher')


def list_cases(scope: str) -> dict[str, str]:
    """Choose a configuration for each folder of a toolkit, and those of ``EXTRAS``."""
    folder, cases = mim_folder(scope) / 'configs', {}
    families = [f for f in folder.iterdir() if not f.name.startswith(('_', '.'))]
    for family in sorted(families):
        # Files in folders of the folder come last.
        paths = sorted(family.rglob('*.py'), key=lambda p: (len(p.parts), len(p.name)))
        for path in paths:
            # Some are parts of others, or of another style.
            with contextlib.suppress(Exception):
                settings = str(Config.fromfile(path).model)
                if 'backbone' in settings or 'image_encoder' in settings:
                    name = path.relative_to(folder).with_suffix('')
                    cases[f'{scope}:{family.name}'] = f'{scope}::{name}'
                    break
    extras = {k: f'{scope}::{v}' for k, v in EXTRAS.items() if k.startswith(scope)}
    return {**cases, **extras}


def draw_batch(model: BaseModel, scope: str, shape: tuple[int, int]) -> dict:
    """Draw two images and what a model learns from them."""
    kind, settings = type(model).__name__, str(model.cfg.model)
    if scope != 'mmdet':
        batch = benchmark.draw_batch(model, 2, shape)
        for sample in batch['data_samples']:
            if scope == 'mmseg':
                sample.gt_edge_map = PixelData(data=sample.gt_sem_seg.data % 2)
            elif hasattr(getattr(model, 'head', None), 'num_classes'):
                # Heads of several labels learn from this.
                score = torch.zeros(model.head.num_classes)
                sample.set_gt_score(score.index_fill(0, sample.gt_label, 1))
        if 'SelfSupDataPreprocessor' in settings:
            # Views of the images.
            batch['inputs'] = [batch['inputs']] * (8 if kind == 'SwAV' else 2)
        return batch
    size = (3, *shape)
    if kind in TRACKERS:
        frames = dict(num_frames=2, key_frames_inds=[0], num_items=[2], num_classes=1)
        return demo_track_inputs(image_shapes=[size], with_mask=True, **frames)
    known = [getattr(module, 'num_classes', None) for module in model.modules()]
    classes = min([n for n in known if isinstance(n, int) and n > 1] or [2])
    semantic = 'semantic' in settings or 'panoptic' in settings or 'Former' in kind
    semantic = semantic or kind == 'CLRNet'
    # Its label maps have 8 bits.
    extra = dict(with_mask=True, with_semantic=semantic and classes < 256)
    batch = demo_mm_inputs(2, size, num_items=[3, 3], num_classes=classes, **extra)
    for i, sample in enumerate(batch['data_samples']):
        sample.set_metainfo(dict(scale_factor=(1.0, 1.0), batch_input_shape=shape))
        truth = sample.gt_instances
        if getattr(getattr(model, 'bbox_head', None), 'num_classes', None) == 1:
            truth.labels[:] = 0
        if kind == 'RTMDet' and 'RTMDetIns' not in settings:
            # It would take their centres.
            del truth.masks
        if kind == 'FastRCNN':
            boxes = truth.bboxes.repeat(8, 1)
            sample.proposals = InstanceData(bboxes=boxes, scores=torch.ones(len(boxes)))
        if kind == 'CLRNet':
            lines = np.random.rand(4, 78).astype(np.float32)
            lines[:, :2], lines[:, 6:] = (0, 1), lines[:, 6:] * shape[1]
            sample.set_metainfo(dict(lines_array=lines, org_width=shape[1]))
            sample.set_metainfo(dict(org_height=shape[0]))
        if kind == 'BaseReID':
            label = ReIDDataSample(metainfo=sample.metainfo)
            batch['data_samples'][i] = label.set_gt_label(torch.randint(classes, (1,)))
    return batch


def build(cfg: Config, side: int) -> BaseModel:
    """Build a model; of trackers and semi-supervised detectors, the detector."""
    cfg, settings = copy.deepcopy(cfg), cfg.model
    # There is no group of processes.
    map_config(cfg, ['model'], lambda key, v: 'BN' if v == 'MMSyncBN' else v)
    if settings.get('teacher_ckpt'):
        # It would have to be fetched.
        cfg.model.teacher_ckpt = None
    if settings.type in WRAPPERS:
        cfg.model = cfg.model.detector
        cfg.model.setdefault('data_preprocessor', settings.get('data_preprocessor'))
        inner = cfg.model.data_preprocessor.get('data_preprocessor')
        cfg.model.data_preprocessor = inner or cfg.model.data_preprocessor
    given = cfg.model.get('data_preprocessor') or {}
    if given.get('type') == 'TrackDataPreprocessor' and settings.type not in TRACKERS:
        given.type = 'DetDataPreprocessor'
        given.pop('use_det_processor', None)
    set_random_seed(0)
    model = revert_sync_batchnorm(build_model(cfg))
    if settings.type in ('SparseRCNN', 'QueryInst'):
        # Random proposals would have sides below 0.
        boxes = model.rpn_head.init_proposal_bboxes.weight.data
        boxes.copy_(boxes.new_tensor([0.5, 0.5, 1, 1]).expand_as(boxes))
    if cfg.default_scope == 'mmseg':
        # Training would pad to the size of the recipe.
        model.data_preprocessor.size_divisor = None
        model.data_preprocessor.size = model.data_preprocessor.size and (side, side)
    return model


def train_step(model: BaseModel, batch: dict) -> float:
    """Return the loss of a step; raise a ValueError if it is not to be trained with."""
    model.train()
    set_random_seed(0)
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    loss.backward()
    if not loss.isfinite():
        raise ValueError(f'the loss is {loss}')
    for path, module in model.named_modules():
        if isinstance(module, ConvMLP) and 'teacher' not in path:
            for name, p in module.named_parameters():
                finite = p.grad is not None and p.grad.isfinite().all()
                if p.requires_grad and not finite:
                    raise ValueError(f'{path}.{name} has no finite gradient')
    return float(loss)


def try_model(cfg: Config, side: int) -> dict:
    """Build, train a step and predict; return how far it came, and the losses."""
    scope, found = cfg.default_scope, dict(stage='build', size=side, losses=[])
    try:
        model = build(cfg, side)
        progress = dict(iter=0, epoch=0, max_iters=9, max_epochs=9)
        MessageHub.get_current_instance().update_info_dict(progress)
        found['stage'] = 'loss'
        # These have one size.
        sizes = dict(CLRNet=(320, 800), BaseReID=(256, 128))
        shape = sizes.get(cfg.model.type, (side, side))
        batch = draw_batch(model, scope, shape)
        found['losses'].append(train_step(model, batch))
        found['stage'] = 'predict'
        model.eval()
        with torch.no_grad():
            if isinstance(batch['inputs'], list) and scope == 'mmpretrain':
                data = model.data_preprocessor(copy.deepcopy(batch), False)
                model(data['inputs'][0], mode='tensor')
            else:
                model.test_step(copy.deepcopy(batch))
        other = build(cfg, side)
        if use_channels_last(other):
            found['losses'].append(train_step(other, batch))
        found['stage'] = 'ok'
    except Exception as error:  # Each algorithm fails in its own way.
        line = str(error).strip().partition('\n')[0]
        found['error'] = f'{type(error).__name__}: {line[:160]}'
    return found


def try_case(name: str) -> dict:
    """Try a configuration with ConvMLP-S, and if that fails as it is."""
    # Some name others by paths from here.
    os.chdir(mim_folder(name.partition('::')[0]))
    cfg, found = find_config(name), dict(config=name)
    with contextlib.redirect_stderr(io.StringIO()) as text, redirect_stdout(text):
        try:
            swapped = swap_backbone(cfg, 's', False)
        except ValueError as error:
            return dict(found, stage='refused', error=str(error))
        for side in SIDES:
            found.update(try_model(swapped, side))
            if found['stage'] in ('ok', 'build'):
                break
        if found['stage'] != 'ok':
            found['control'] = try_model(cfg, side)
    return found


def verdict(case: dict) -> str:
    """Say in a cell of the table how a case ended."""
    if case['stage'] == 'ok':
        losses = ', '.join(f'{loss:.6g}' for loss in case['losses'])
        return f'ok at {case["size"]} pixels, loss {losses}'
    if case['stage'] == 'refused':
        return f'not: {case["error"]}'
    reason = f'{case["stage"]}: {case.get("error", "no result")}'.replace('|', '/')
    same = case.get('control', {}).get('stage', 'ok') != 'ok'
    return f'as the old backbone, {reason}' if same else f'fails, {reason}'


def write_page(found: dict, path: Path) -> None:
    """Put the tables between the marks of the page."""
    page, header = path.read_text('utf-8'), ['family', 'configuration', 'ConvMLP-S']
    for scope in TOOLKITS:
        rows = [
            [key.partition(':')[2], f'`{case["config"]}`', verdict(case)]
            for key, case in sorted(found.items())
            if key.startswith(f'{scope}:')
        ]
        count = Counter(row[2].partition(' ')[0].strip(':,') for row in rows)
        text = (
            f'{count["ok"]} of {len(rows)} are ok, {count["not"]} are refused, '
            f'{count["as"]} fail as with the old backbone, and '
            f'{count["fails"]} that do not.'
        )
        table = format_table(header, rows, 'markdown', (0, 1, 2))
        head, mark, rest = page.partition(f'<!-- {scope} -->\n')
        end = rest.index('<!-- end -->')
        page = f'{head}{mark}\n{text}\n\n{table}\n{rest[end:]}'
    write_file(path, page, True)


def _work(pipe: Connection, name: str) -> None:
    signal.alarm(LIMIT)
    pipe.send(try_case(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('out', type=Path, help='JSON file of what was found, which goes on from there')
    add('families', nargs='*', help='TOOLKIT:FAMILY; by default all')
    add('--page', type=Path, help='also write the tables into this page')
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    for toolkit in TOOLKITS.values():
        toolkit.register()
    scopes = {key.partition(':')[0] for key in args.families} or TOOLKITS
    cases = {k: name for scope in scopes for k, name in list_cases(scope).items()}
    fork = multiprocessing.get_context('fork')
    for key in args.families or [key for key in cases if key not in found]:
        # One that is killed ends no others.
        ours, theirs = fork.Pipe(False)
        process = fork.Process(target=_work, args=(theirs, cases[key]))
        process.start()
        theirs.close()
        found[key] = dict(config=cases[key], stage='killed')
        with contextlib.suppress(EOFError):
            found[key] = ours.recv()
        process.join()
        print(f'{key}: {verdict(found[key])}', flush=True)
        write_file(args.out, json.dumps(found, indent=1), True)
    if args.page:
        write_page(found, args.page)


if __name__ == '__main__':
    main()
