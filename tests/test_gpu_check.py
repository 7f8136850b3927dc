"""tools/dev/gpu_check.py, as far as it goes without a GPU."""

import json
import runpy
from argparse import Namespace
from functools import cache
from pathlib import Path

import benchmark
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CHECK = runpy.run_path(str(ROOT / 'tools' / 'dev' / 'gpu_check.py'))


def test_a_stage_writes_what_it_finds_and_the_report_shows_it(tool, tmp_path):
    found = tool('dev/gpu_check.py', tmp_path, 'build', '--device', 'cpu')
    assert not found.returncode, found.stderr
    checks = json.loads((tmp_path / 'build.json').read_text())['checks']
    assert [check['name'] for check in checks] == [
        'nms',
        'roi_align',
        'deform_conv2d',
        'modulated_deform_conv2d',
    ]
    assert all(check['passed'] for check in checks)
    report = tool('dev/gpu_check.py', tmp_path, 'report')
    assert '## build' in report.stdout and 'device cpu, ' in report.stdout
    assert '| roi_align | passed | error 0 |' in report.stdout


def test_a_check_that_fails_is_kept_and_counted(tool, tmp_path, monkeypatch):
    wrong = (
        'import mmcv.ops\nmmcv.ops.nms = lambda *a: (_ for _ in ()).throw(OSError(1))'
    )
    (tmp_path / 'sitecustomize.py').write_text(wrong)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    found = tool('dev/gpu_check.py', tmp_path / 'out', 'build', '--device', 'cpu')
    assert found.returncode == 'not everything passed: build (1)'
    checks = json.loads((tmp_path / 'out' / 'build.json').read_text())['checks']
    assert [check['passed'] for check in checks] == [False, True, True, True]
    assert checks[0]['error'] == 'OSError: 1'


def test_differences_are_those_of_the_largest_value_and_nan_never_passes():
    relative = runpy.run_path(str(ROOT / 'tests' / 'gpu' / 'results.py'))['relative']
    expected = torch.tensor([4.0, -8.0, 0.0])
    assert relative(expected, expected) == 0
    assert relative(expected + torch.tensor([0, 0, 2.0]), expected) == 0.25
    for wrong in (torch.nan, torch.inf):
        found = [relative(x, expected) for x in (expected, expected + wrong)]
        assert max(found) == torch.inf


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['speed'], "unknown stage 'speed'; there are build, right"),
        (['feed', '--device', 'cpu'], 'feed needs --data, with coco, ade and photos'),
    ],
)
def test_mistakes_are_said(tool, tmp_path, options, message):
    found = tool('dev/gpu_check.py', tmp_path, *options)
    assert found.returncode == 2 and message in found.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_every_benchmark_of_the_stages_can_be_read(tmp_path, monkeypatch, device):
    monkeypatch.setattr(benchmark.torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(benchmark, 'find_config', cache(benchmark.find_config))
    args = Namespace(device=device, archs='sml', batch=64, rounds=5, size=None)
    args.out = args.data = tmp_path
    names = 0
    for jobs in CHECK['benchmarks'](args).values():
        for mode, *command in jobs.values():
            options = benchmark.parse_args([str(x) for x in (mode, *command)])
            for text in getattr(options, 'models', ()):
                benchmark.parse_entry(text, mode)
                names += 1
    assert names > (30 if device == 'cpu' else 150)
