"""What models cost, and the tables and the picture made of it."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.text import Annotation
from mmengine.config import Config

from convmlp_mm.analysis.complexity import default_shape, measure_complexity
from convmlp_mm.analysis.output import format_table, write_file
from convmlp_mm.analysis.tradeoff import draw_tradeoff
from convmlp_mm.apis import find_config

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = (ROOT / 'docs' / 'efficiency.md').read_text(encoding='utf-8')


def load_tool(name):
    path = ROOT / 'tools' / f'{name}.py'
    spec = importlib.util.spec_from_file_location(f'tool_{name}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


complexity = load_tool('complexity')
paper_tables = load_tool('paper_tables')
PAPER = paper_tables.read_paper()


def measure(name, shape=None):
    return measure_complexity(find_config(name), shape, name)


def test_counts_are_those_by_hand():
    head = dict(type='LinearClsHead', num_classes=10, in_channels=16)
    backbone = dict(type='LeNet5', num_classes=-1)
    model = dict(type='ImageClassifier', backbone=backbone)
    cfg = Config(dict(default_scope='mmpretrain', model=model))
    cost = measure_complexity(cfg, (32, 32), 'lenet')
    # LeNet-5 for one channel; its first layer is given three.
    assert cost.name == 'lenet' and head['in_channels'] == 16
