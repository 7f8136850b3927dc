"""Write what differs between two configurations as one that inherits."""

from mmengine.config import Config

# mmengine cannot open ``mmseg::`` when the maintained stack is installed.
MMSEG = (
    "__import__('importlib.util').util.find_spec('mmseg').submodule_search_locations[0]"
)


def child_config(old: Config, new: Config, base: str) -> str:
    """Return the text of a configuration that makes ``new`` out of ``old``.

    ``base`` names the old one: a path, or a file of a toolkit as ``'mmdet::...'``.
    """
    scope, _, path = base.rpartition('::')
    path = f'{path.removesuffix(".py")}.py'
    parent = repr(f'{scope}::{path}' if scope else path)
    if scope == 'mmseg':
        parent = f'{MMSEG}\n    + {"/.mim/configs/" + path!r}'
    changed = Config(difference(old.to_dict(), new.to_dict()))
    return f'_base_ = [\n    {parent},\n]\n{changed.pretty_text}'


def difference(old: dict, new: dict) -> dict:
    """Return what mmengine merges into ``old`` to make ``new`` of it."""
    changed = {}
    for key, value in new.items():
        before = old.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            part = difference(before, value)
            if set(before) - set(value):
                part = dict(value, _delete_=True)
            if part:
                changed[key] = part
        elif key not in old or before != value:
            changed[key] = value
    return changed
