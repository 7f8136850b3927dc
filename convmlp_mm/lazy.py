"""Register classes without importing them: torch takes seconds, mmengine none."""

from __future__ import annotations

from importlib import import_module

from mmengine.registry import Registry

__all__ = ['register_lazily']


def register_lazily(registry: Registry, name: str, module: str) -> None:
    """Register a stand-in for a class, which imports it when it is used.

    The module takes the place with ``register_module(force=True)`` when it is
    imported. mmengine's own way, import locations, serves the registry that a
    name is asked of, but not its parents.

    Args:
        registry (Registry): Where the class belongs.
        name (str): The class.
        module (str): Its module, ``'.name'`` in this package.

    Raises:
        KeyError: If the registry has another class of this name.
    """

    def load() -> type:
        return getattr(import_module(module, __package__), name)

    class StandIn(type):
        """What is asked of the stand-in is asked of the class."""

        def __call__(cls, *args, **kwargs):
            return load()(*args, **kwargs)

        def __getattr__(cls, attribute: str) -> object:
            # Python's own questions are no reason to import.
            if attribute.startswith('__'):
                raise AttributeError(attribute)
            return getattr(load(), attribute)

    registry.register_module(name=name, module=StandIn(name, (), {}))
