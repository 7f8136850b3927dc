"""How processes that train on a CPU are started.

``python -m convmlp_mm.launch`` prints the settings for a shell, which is how
tools/dist_run.sh takes them.
"""

from __future__ import annotations

import shlex
from types import MappingProxyType

__all__ = ['CPU_ALLOCATOR', 'shell_lines']

# Memory that malloc of glibc keeps need not be mapped anew for every activation.
CPU_ALLOCATOR = MappingProxyType(
    dict(
        MALLOC_MMAP_THRESHOLD_='33554432',
        MALLOC_TRIM_THRESHOLD_='4294967296',
        MALLOC_TOP_PAD_='268435456',
    )
)


def shell_lines() -> str:
    """Write the settings as lines of a shell; what is set already stays.

    Returns:
        str: An ``export`` for each.

    Examples:
        >>> shell_lines().splitlines()[0]
        'export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-33554432}'
    """
    return ''.join(
        f'export {name}=${{{name}:-{shlex.quote(value)}}}\n'
        for name, value in CPU_ALLOCATOR.items()
    )


if __name__ == '__main__':
    print(shell_lines(), end='')
