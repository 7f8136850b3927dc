"""Other people's projects: the installed wheel and the toolkits' own scripts."""

import glob
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest

# They share a project and the package's wheel.
pytestmark = pytest.mark.xdist_group('downstream')
ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r'```python\n# (my_\w+\.py)\n(.*?)```', re.DOTALL)

SMALL = {
    'mmdet': [
        'train_dataloader.dataset.pipeline.2.scale=(96,96)',
        'val_dataloader.dataset.pipeline.1.scale=(96,96)',
        'train_dataloader.dataset.indices=8',
        'model.backbone.init_cfg=None',
    ],
    'mmseg': [
        'train_dataloader.dataset.pipeline.2.scale=(96,96)',
        'train_dataloader.dataset.pipeline.3.crop_size=(64,64)',
        'val_dataloader.dataset.pipeline.1.scale=(96,96)',
        'model.data_preprocessor.size=(64,64)',
        'model.backbone.init_cfg=None',
    ],
    'mmpretrain': [
        'train_dataloader.batch_size=4',
        'train_dataloader.dataset.indices=16',
        'train_dataloader.dataset.pipeline.1.scale=64',
        'val_dataloader.dataset.pipeline.1.scale=64',
        'val_dataloader.dataset.pipeline.2.crop_size=64',
        # Its mixed precision needs a GPU.
        'optim_wrapper.type=OptimWrapper',
        'model.backbone.init_cfg=None',
    ],
}
CLASSES = "['circle','square','triangle','star','ring','cross']"
# For the two detectors with a second stage.
FEW_BOXES = [
    'model.train_cfg.rcnn.sampler.num=16',
    'model.test_cfg.rpn.max_per_img=50',
    'model.test_cfg.rcnn.max_per_img=10',
]
SHORT = {
    'mmdet': """
train_cfg = dict(max_epochs=1)
param_scheduler = [dict(type='ConstantLR', factor=0.5, by_epoch=False, end=2)]
""",
    'mmseg': """
train_cfg = dict(max_iters=4, val_interval=4)
param_scheduler = [dict(type='PolyLR', power=0.9, end=4, by_epoch=False)]
""",
    'mmpretrain': """
train_cfg = dict(max_epochs=1)
param_scheduler = [dict(type='ConstantLR', factor=0.5, by_epoch=False, end=2)]
""",
}
LOADERS = [f'{split}_dataloader.num_workers=1' for split in ('train', 'val')]


def run(*command, cwd, env=None):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    """A folder with the examples of the docs, generated data and a wheel's files."""
    folder = tmp_path_factory.mktemp('their project')
    pages = [ROOT / 'docs' / name for name in ('data.md', 'answers.md')]
    for page in [*pages, ROOT / 'README.md']:
        for name, text in BLOCK.findall(page.read_text(encoding='utf-8')):
            assert not (folder / name).exists(), f'{name} stands twice'
            (folder / name).write_text(text)
    data = folder / 'data' / 'shapes'
    options = ['--train', 16, '--val', 6, '--size', 96]
    tool = ROOT / 'tools' / 'data' / 'make_shapes_dataset.py'
    run(sys.executable, tool, data, *options, cwd=folder)
    site = folder / 'site'
    pip = [sys.executable, '-m', 'pip', '--quiet']
    build = ['--no-deps', '--no-build-isolation']
    run(*pip, 'wheel', *build, '-w', folder / 'wheels', ROOT, cwd=folder)
    (wheel,) = (folder / 'wheels').glob('*.whl')
    run(*pip, 'install', '--no-deps', '--target', site, wheel, cwd=folder)
    return folder


@pytest.fixture(scope='module')
def environment(project):
    return {**os.environ, 'PYTHONPATH': str(project / 'site')}


def test_wheel_and_not_the_checkout_is_imported(project, environment):
    code = 'import convmlp_mm; print(convmlp_mm.__file__, convmlp_mm.config_path("s"))'
    code = code.replace('"s"', '"retinanet_convmlp_s"')
    printed = run(sys.executable, '-c', code, cwd=project, env=environment)
    package = project / 'site' / 'convmlp_mm'
    assert f'{package}/__init__.py {package}/.mim/configs/retinanet' in printed


PROJECTS = {
    'my_detector.py': 'mmdet',
    'my_mask_detector.py': 'mmdet',
    'my_faster_rcnn.py': 'mmdet',
    'my_segmentor.py': 'mmseg',
    'my_classifier.py': 'mmpretrain',
}


def train(config, project, environment, out):
    """Run the toolkit's script on one thread and return its log."""
    toolkit = PROJECTS[config]
    package = Path(find_spec(toolkit).submodule_search_locations[0])
    script = package / '.mim' / 'tools' / 'train.py'
    options = [*SMALL[toolkit], *LOADERS, 'default_hooks.logger.interval=1']
    if config in ('my_mask_detector.py', 'my_faster_rcnn.py'):
        options += FEW_BOXES
    if config == 'my_faster_rcnn.py':
        # The README's example has the data of COCO.
        root = 'data/shapes/coco/'
        options.append('model.roi_head.bbox_head.num_classes=6')
        options.append(
            f'val_evaluator.ann_file={root}annotations/instances_val2017.json'
        )
        for split in ('train', 'val'):
            key = f'{split}_dataloader.dataset'
            options.append(f'{key}.data_root={root}')
            options.append(f'{key}.metainfo.classes={CLASSES}')
    short = project / f'short_{config}'
    short.write_text(f"_base_ = './{config}'\n{SHORT[toolkit]}")
    command = [sys.executable, script, short.name, '--work-dir', out]
    env = {**environment, 'OMP_NUM_THREADS': '1'}
    return run(*command, '--cfg-options', *options, cwd=project, env=env)


@pytest.mark.slow
@pytest.mark.parametrize('config', PROJECTS)
def test_scripts_of_the_toolkits_train_projects_that_inherit(
    project, environment, tmp_path, config
):
    log = train(config, project, environment, tmp_path)
    assert re.search(r'\(train\).* loss: \d', log)
    assert re.search(r'\(val\) ', log)
    assert (tmp_path / 'last_checkpoint').is_file()


ANSWERS = (ROOT / 'docs' / 'answers.md').read_text(encoding='utf-8')
TOOLS = re.findall(r'`python \$(.+?)`', ANSWERS)
FOLDERS = dict(MMDET='mmdet', MMSEG='mmseg', MMPRETRAIN='mmpretrain')
TEST = {
    'mmdet': ['test_dataloader.dataset.pipeline.1.scale=(96,96)'],
    'mmseg': [],
    'mmpretrain': [
        'test_dataloader.dataset.pipeline.1.scale=64',
        'test_dataloader.dataset.pipeline.2.crop_size=64',
        'test_dataloader.dataset.indices=6',
    ],
}
NO_WORKERS = [
    f'{split}_dataloader.{option}'
    for split in ('train', 'val', 'test')
    for option in ('num_workers=0', 'persistent_workers=False')
]
MAINTAINED = any('onedl' in name for name in packages_distributions()['mmdet'])


@pytest.fixture
def call(project, tool, monkeypatch):
    """Run a command of the docs in this process, which has the toolkits already."""
    monkeypatch.chdir(project)
    monkeypatch.setenv('MPLBACKEND', 'agg')
    monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)

    def run(command, *options):
        variable, _, rest = command.partition('/')
        toolkit = FOLDERS[variable]
        words = [glob.glob(w)[0] if '*' in w else w for w in shlex.split(rest)]
        script = Path(find_spec(toolkit).submodule_search_locations[0], '.mim', 'tools')
        if 'analyze_logs' not in words[0]:
            words += [] if '--cfg-options' in words else ['--cfg-options']
            words += [*SMALL[toolkit], *TEST[toolkit], *NO_WORKERS, *options]
        done = tool(script / words[0], *words[1:])
        assert done.returncode == 0, (command, done.stderr[-2000:])

    return run


@pytest.mark.slow
@pytest.mark.skipif(not MAINTAINED, reason='the docs speak of the maintained stack')
def test_tools_of_the_toolkits_do_what_the_docs_say(project, call):
    (project / 'short_detector.py').write_text(
        f"_base_ = './my_detector.py'\n{SHORT['mmdet']}"
    )
    # Nothing that it could learn.
    (project / 'short_classifier.py').write_text(
        "_base_ = './my_patient_classifier.py'\ntrain_cfg = dict(max_epochs=6)\n"
        'param_scheduler = []\noptim_wrapper = dict(optimizer=dict(lr=0.0))\n'
    )
    few = 'train_dataloader.dataset.indices=4', 'val_dataloader.dataset.indices=4'
    for variable, name in (('MMDET', 'detector'), ('MMPRETRAIN', 'classifier')):
        command = f'train.py short_{name}.py --work-dir work_dirs/my_{name}'
        call(f'{variable}/{command}', 'default_hooks.logger.interval=1', *few)
    work_dir = project / 'work_dirs' / 'my_classifier'
    assert (work_dir / 'epoch_3.pth').is_file()
    assert not (work_dir / 'epoch_4.pth').exists(), 'the run has not stopped early'

    for command in TOOLS:
        if 'vis_cam' in command and find_spec('pytorch_grad_cam') is None:
            with pytest.raises(ImportError, match='grad-cam'):
                call(command)
        else:
            call(command)
    for folder in ('browsed/boxes', 'browsed/labels', 'browsed/classes', 'confusion'):
        assert list((project / folder).rglob('*.*g')), folder
    assert (project / 'curves.png').is_file()

    # What fails no more can be taken out of the docs.
    curves, browse = (
        next(c for c in TOOLS if w in c) for w in ('plot_curve', 'original')
    )
    curves = curves.replace('MMPRETRAIN', 'MMDET')
    labels = 'data/shapes/ade/ADEChallengeData2016/annotations/validation'
    matrix = f'MMSEG/analysis_tools/confusion_matrix.py my_segmentor.py {labels} matrix'
    for command, error, words in (
        (curves, OSError, "'dark' is not a valid package style"),
        (f'{curves} --style default', ValueError, 'x and y must have same first'),
        (browse.partition(' --cfg-options')[0], TypeError, "argument '_scope_'"),
        (browse.replace('original', 'concat'), TypeError, 'adjust_bbox'),
        (matrix, KeyError, "'classes'"),
    ):
        with pytest.raises(error, match=words):
            call(command)
