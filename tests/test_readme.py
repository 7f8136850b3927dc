"""The README says nothing that does not run."""

import re
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import init_default_scope

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'```python\n(.*?)```', README, re.DOTALL)


def test_python_blocks_run(tmp_path, capsys):
    configs = [block for block in BLOCKS if '_base_ =' in block]
    assert len(configs) == 2 and len(BLOCKS) == 3
    for block in BLOCKS:
        if block not in configs:
            exec(compile(block, 'README.md', 'exec'), {})
            printed = capsys.readouterr().out
            assert '(64, 128, 256, 512) (4, 8, 16, 32)' in printed
            assert "'retinanet_convmlp_s', 'retinanet_convmlp_m'" in printed
    for i, block in enumerate(configs):
        path = tmp_path / f'config_{i}.py'
        path.write_text(block)
        cfg = Config.fromfile(str(path))
        cfg.model.backbone.init_cfg = None
        init_default_scope(cfg.default_scope)
        from mmdet.registry import MODELS

        assert type(MODELS.build(cfg.model).backbone).__name__ == 'ConvMLP'


def test_files_and_links_exist():
    for link in re.findall(r'\]\(([^)#]+)\)', README):
        assert '://' in link or (ROOT / link).exists(), link
    for word in re.findall(r'(?:bash )?((?:tools|configs)/[\w/.]+\.(?:sh|py))', README):
        assert (ROOT / word).is_file(), word
