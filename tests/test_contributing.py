"""What CONTRIBUTING.md says of the house is so."""

import ast
import re
from pathlib import Path

import toy
from mmengine.config import Config
from mmengine.runner import Runner

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')
RUNTIME = ROOT / 'configs' / '_base_' / 'default_runtime.py'
# Each room may import those after it; rooms of one line know nothing of each other.
LAYERS = (
    {'launch', 'export'},
    {'apis', 'predict'},
    {'hooks', 'swap'},
    {'convmlp', 'zoo'},
    {'checkpoint', 'toolkits'},
)


def test_table_of_the_hooks_is_the_order_of_a_runner(tmp_path):
    rows = re.findall(r'^\| (\w+) \| `(\w+)` \|', PAGE, re.MULTILINE)
    runtime = Config.fromfile(RUNTIME)
    cfg = Config.fromfile(toy.write_config(tmp_path / 'toy.py'))
    cfg.custom_hooks = runtime.runtime_hooks
    cfg.default_hooks = runtime.runtime_default_hooks
    cfg.work_dir, cfg.log_level = str(tmp_path), 'WARNING'
    hooks = Runner.from_cfg(cfg).hooks
    own = [hook for hook in hooks if type(hook).__module__.startswith('convmlp_mm')]
    assert [(hook.priority, type(hook).__name__) for hook in own] == [
        (priority, name) for priority, name in rows
    ]
    # The list of the recipes does not look as if they ran in another order.
    listed = [hook['type'] for hook in runtime.runtime_hooks]
    assert listed == [name for _, name in rows if name in listed]


def imports(path):
    """Name the rooms of the package that a file imports, anywhere in it."""
    parts = path.relative_to(ROOT / 'convmlp_mm').with_suffix('').parts
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = ('', *parts[: len(parts) - node.level])
            module = node.module.split('.') if node.module else []
            yield (*package, *module, node.names[0].name)[1]
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [getattr(node, 'module', None) or a.name for a in node.names]
            assert not any(name.startswith('tools') for name in names), path


def test_arrows_between_rooms_go_one_way():
    level = {room: i for i, rooms in enumerate(LAYERS) for room in rooms}
    seen = set()
    for path in (ROOT / 'convmlp_mm').rglob('*.py'):
        if '.mim' in path.parts or path == ROOT / 'convmlp_mm' / '__init__.py':
            continue
        room = path.relative_to(ROOT / 'convmlp_mm').parts[0].removesuffix('.py')
        seen.add(room)
        for other in set(imports(path)) - {room}:
            assert level[room] < level[other], f'{path} imports {other}'
    assert seen == set(level)


def test_rooms_of_the_map_are_there():
    for name in re.findall(r'^  (\w+(?:\.py|/)) ', PAGE, re.MULTILINE):
        assert (ROOT / 'convmlp_mm' / name).exists(), name
    paths = re.findall(r'`((?:tools|tests|configs|hooks)/[\w/.]+)`', PAGE)
    for path in paths:
        path = f'convmlp_mm/{path}' if path.startswith('hooks/') else path
        assert 'SYSTEM' in path or (ROOT / path).exists(), path
