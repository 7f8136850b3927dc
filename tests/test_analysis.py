"""What models cost, and the tables and the figure made of it."""

import shutil
import subprocess
import sys
from pathlib import Path

import complexity
import efficiency
import pytest
import torch
from complexity import measure_complexity
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from convmlp_mm.launch.tables import format_table
from convmlp_mm.toolkits import default_shape
from convmlp_mm.zoo import find_config

TOOL = Path(complexity.__file__)
PAPER = efficiency.load(efficiency.PAPER)


def measure(name, shape=None):
    return measure_complexity(find_config(name), shape, name)


class TinyNet(nn.Module):
    """One of each: convolution, depth-wise convolution, linear layer, attention."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 5)
        self.conv.requires_grad_(False)

    def forward(self, x):
        x = self.norm(self.depthwise(self.conv(x)))
        tokens = self.linear(x.flatten(2).transpose(1, 2))
        nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        return (x,)


def test_counts_are_those_by_hand():
    MODELS.register_module(name='TinyNet', module=TinyNet, force=True)
    model = dict(type='ImageClassifier', backbone=dict(type='TinyNet'))
    cfg = Config(dict(default_scope='mmpretrain', model=model))
    cost = measure_complexity(cfg, (8, 16), 'tiny')
    positions = 4 * 8
    assert cost.params == (4 * 27 + 4) + 4 * 9 + 2 * 4 + (4 * 5 + 5)
    assert cost.params - cost.trainable == 4 * 27 + 4
    attention = 2 * positions * positions * 5
    assert cost.macs == positions * (4 * 27 + 4 * 9 + 4 * 5) + attention
    # Attention has two outputs: its weights and their product with the values.
    assert cost.activations == positions * (4 + 4 + 5 + positions + 5)
    assert (cost.name, cost.shape) == ('tiny', (8, 16))


def test_resnet_50_has_its_well_known_figures():
    cost = measure('mmpretrain::resnet/resnet50_8xb32_in1k')
    assert cost.params == 25557032
    assert round(cost.macs / 1e9, 2) == 4.09
    # "Designing Network Design Spaces", Table 3: 11.1 M.
    assert round(cost.activations / 1e6, 1) == 11.1
    assert measure('timm::resnet50').macs == cost.macs


@pytest.mark.parametrize(
    'name, shape',
    [
        ('retinanet_convmlp_l', (800, 1280)),
        ('semantic_fpn_convmlp_s', (512, 512)),
        ('transfer/convmlp_s_cifar10', (224, 224)),
        ('quickstart/retinanet_convmlp_s_shapes', (160, 160)),
        ('mmdet::ssd/ssd300_coco', (300, 300)),
        ('mmpretrain::efficientnet/efficientnet-b4_8xb32_in1k', (380, 380)),
        ('timm::vit_small_patch14_dinov2', (518, 518)),
    ],
)
def test_shape_is_that_of_the_test(name, shape):
    assert measure(name).shape == default_shape(find_config(name)) == shape


def test_two_stage_detectors_see_as_many_proposals_as_they_keep():
    one = measure('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco', (256, 256))
    cfg = find_config('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco')
    cfg.model.test_cfg.rpn.max_per_img = 999
    other = measure_complexity(cfg, (256, 256))
    # Two shared layers and the two that predict, for each proposal.
    assert one.macs - other.macs == 256 * 7 * 7 * 1024 + 1024 * 1024 + 1024 * (81 + 320)


def test_costs_grow_with_the_image_and_parameters_do_not():
    small, odd = (measure('convmlp_s_imagenet', n) for n in ((64, 96), (33, 225)))
    assert small.macs < odd.macs and small.params == odd.params


@pytest.mark.parametrize(
    'name, shape, reason',
    [
        ('timm::mixer_s16_224', (256, 192), r'pixels \(it is tested at 224 x 224\)'),
        ('convmlp_s_imagenet', (0, 0), 'at 0 x 0 pixels'),
        # An operator of mmcv, whose work would not be counted.
        ('mmdet::dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco', (64, 64), 'deform'),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(name, shape, reason):
    with pytest.raises(ValueError, match=f'^{name} cannot be counted .*') as caught:
        measure(name, shape)
    caught.match(reason)
    assert '\n' not in str(caught.value)


def test_what_cannot_be_built_is_refused_by_its_name():
    cfg = Config(dict(model=dict(type='Nothing'), default_scope='mmdet'))
    with pytest.raises(ValueError, match='^a new one cannot be counted .*Nothing'):
        measure_complexity(cfg, (64, 64), 'a new one')
    with pytest.raises(ValueError, match="'mmpretrain::_base_/default_.*' has no mod"):
        find_config('mmpretrain::_base_/default_runtime.py')


def test_measuring_leaves_configuration_and_device_alone():
    cfg = find_config('mask_rcnn_convmlp_s')
    before = cfg.to_dict()
    measure_complexity(cfg, (64, 64))
    assert cfg.to_dict() == before
    assert torch.empty(1).device.type == 'cpu'


def test_table_has_three_formats():
    header, rows = ['model', 'n'], [['a', '10'], ['bcdefg', '2']]
    assert format_table(header, rows) == 'model    n\na       10\nbcdefg   2\n'
    assert format_table(header, rows, 'csv') == 'model,n\na,10\nbcdefg,2\n'
    markdown = format_table(header, rows, 'markdown').splitlines()
    assert markdown[:3] == ['| model | n |', '| --- | ---: |', '| a | 10 |']


def test_tool_writes_nothing_but_the_table(tmp_path):
    command = [sys.executable, TOOL, '--format', 'csv']
    command += ['convmlp_s_imagenet', 'semantic_fpn_convmlp_s']
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        'model,shape,params,MACs,activations',
        'convmlp_s_imagenet,224x224,9022920,2385327104,6950376',
        'semantic_fpn_convmlp_s,512x512,12759158,33888141312,53870592',
    ]


def test_tool_takes_a_shape_and_counts_in_millions(capsys):
    complexity.main(['convmlp_s_imagenet', '--shape', '64', '96'])
    header, row = capsys.readouterr().out.splitlines()
    assert 'params (M)' in header and '  64x96  ' in row and '  9.02  ' in row


@pytest.mark.parametrize(
    'options, fragment',
    [
        (['convmlp_s_imagenet', 'convmlp_x'], "no configuration 'convmlp_x'"),
        (['timm::nothing_1'], "timm has no model 'nothing_1'"),
        (['convmlp_s_imagenet', '--shape', '1'], 'expected 2 arguments'),
    ],
)
def test_tool_refuses_before_it_counts(options, fragment, capsys, monkeypatch):
    monkeypatch.setattr(complexity, 'measure_complexity', None)
    with pytest.raises(SystemExit) as stopped:
        complexity.main(options)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ''
    (line,) = [n for n in printed.err.splitlines() if 'error:' in n]
    assert fragment in line


OURS = [
    (table, row)
    for table, rows in PAPER.items()
    for row in rows
    if row['config'] and '::' not in row['config'] and 'resnet' not in row['config']
]


@pytest.fixture(scope='module')
def costs():
    return {name: measure(name) for name in {row['config'] for _, row in OURS}}


def test_our_counts_are_the_papers_but_for_its_unknown_conv_stage(costs):
    assert len(OURS) == 3 + 7 + 3 * 3
    for table, row in OURS:
        cost = costs[row['config']]
        # The paper's rows 2 to 6 of Table 2 have another conv stage.
        other = table == 'table_2' and 'conv' in row['name'] and row['params'] < 9
        digits = 2 if table == 'table_2' else 1
        # Some of the paper's figures have been rounded twice: 37.0475, 37.05, 37.1.
        tolerance = 0.55 * 10**-digits
        assert (abs(cost.params / 1e6 - row['params']) < tolerance) != other, row
        if 'gmacs' in row and not other:
            assert abs(cost.macs / 1e9 - row['gmacs']) < max(tolerance, 0.016), row


def test_document_has_the_counts_of_our_configurations(costs):
    ours = {name: [row for t, row in OURS if t == name] for name in PAPER}
    counted = {name: [costs[r['config']] for r in rows] for name, rows in ours.items()}
    page = efficiency.PAGE.read_text(encoding='utf-8').splitlines()
    written = efficiency.fill_page(ours, counted).splitlines()
    rows = [line for line in written if line.startswith('|') and '`' in line]
    assert len(rows) == len(OURS)
    assert [row for row in rows if row not in page] == []
    assert '| ConvMLP-S | ConvMLP | 76.8 | 9.0 / 9.02 |' in '\n'.join(rows)


def test_document_has_every_row_of_the_paper_and_its_numbers():
    page = efficiency.PAGE.read_text(encoding='utf-8')
    assert [len(rows) for rows in PAPER.values()] == [34, 7, 6, 6, 6]
    lines = [line.split('|')[1:-1] for line in page.splitlines()]
    lines = [line for line in lines if len(line) == 8]
    for row in PAPER['table_3']:
        assert row['config'] is not None or f'- {row["name"]}: ' in page
        (cells,) = [line for line in lines if line[0].startswith(f' {row["name"]} ')]
        cells = [cell.strip() for cell in cells]
        keys = ('top1', 'params', 'gmacs', 'acc_per_gmac', 'acc_per_mparam')
        numbers = [row[key] for key in keys]
        assert [float(cell.split(' / ')[0]) for cell in cells[2:7]] == numbers
        assert cells[-1] == (f'`{row["config"]}`' if row['config'] else '-')
        if row['config'] is not None:
            find_config(row['config'])


def test_figure_names_every_model_and_no_name_covers_another():
    figure = efficiency.draw_tradeoff(PAPER['table_3'])
    figure.draw_without_rendering()
    for ax in figure.axes:
        labels = [child for child in ax.texts if isinstance(child, Annotation)]
        names = [row['name'] for row in PAPER['table_3']]
        assert [label.get_text() for label in labels] == names
        boxes = [Text.get_window_extent(label) for label in labels]
        for i, box in enumerate(boxes):
            assert ax.bbox.containsx(box.x0) and ax.bbox.containsx(box.x1)
            for other in boxes[:i]:
                common = Bbox.intersection(box, other)
                assert common is None or common.width * common.height < 30


def test_tables_and_figure_are_written_the_same_twice(costs, tmp_path, monkeypatch):
    counted = {row['config']: costs.get(row['config']) for _, row in OURS}
    any_cost = costs['retinanet_convmlp_s']
    monkeypatch.setattr(
        efficiency, 'count', lambda row: counted.get(row['config'], any_cost)
    )
    monkeypatch.setattr(sys, 'argv', ['efficiency.py'])
    found, page = [], efficiency.PAGE
    for folder in (tmp_path / 'a', tmp_path / 'b'):
        folder.mkdir()
        shutil.copy(page, folder)
        monkeypatch.setattr(efficiency, 'PAGE', folder / page.name)
        efficiency.main()
        found.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert sorted(found[0]) == ['efficiency.md', 'efficiency.png']
    assert found[0] == found[1]
    assert len(found[0]['efficiency.png']) < 200_000
