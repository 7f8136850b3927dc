"""What stands on the command line for one model: ``NAME[@OPTION,...]``."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ['ARCH', 'OPTIONS', 'ModelSpec', 'parse_spec']

# In place of the name of a configuration, for the backbone alone.
ARCH = 'arch:'
DTYPES = dict(fp32='float32', bf16='bfloat16', fp16='float16')
LAYOUTS = ('nchw', 'channels-last')
OPTIONS = {
    'published': "the backbone as the authors' release has it, with the same weights",
    'deploy': 'BN folded into the convolutions (inference)',
    'fp32': 'single precision',
    'bf16': 'bfloat16: the model itself (inference), autocast (training)',
    'fp16': 'float16, likewise',
    'compile': 'torch.compile',
    'nchw': 'weights and images contiguous',
    'channels-last': 'weights and images in channels-last memory',
    'cp': 'with_cp=True of the backbone: activations are recomputed (training)',
    'malloc': 'memory kept by malloc, as the tools of this package do on a CPU',
    'threads=N': 'number of threads',
}


@dataclass(frozen=True)
class ModelSpec:
    """A model and how it is run.

    Attributes:
        text (str): As on the command line, for tables and messages.
        name (str): Of a configuration (:func:`convmlp_mm.zoo.find_config`), or
            ``arch:s``, ``arch:m`` or ``arch:l`` for the backbone alone.
        dtype (str): ``'float32'``, ``'bfloat16'`` or ``'float16'``.
        layout (str | None): ``'nchw'``, ``'channels-last'`` or as it is trained.
        threads (int | None): Number of threads, or torch's own.
        published (bool): See ``OPTIONS``; so the rest.
        deploy (bool): Likewise.
        compile (bool): Likewise.
        cp (bool): Likewise.
        malloc (bool): Likewise.
    """

    text: str
    name: str
    dtype: str = 'float32'
    layout: str | None = None
    threads: int | None = None
    published: bool = False
    deploy: bool = False
    compile: bool = False
    cp: bool = False
    malloc: bool = False


def parse_spec(text: str, mode: str, **defaults: object) -> ModelSpec:
    """Read a model and its options.

    Args:
        text (str): ``NAME[@OPTION,...]``.
        mode (str): ``'infer'`` or ``'train'``, which not all options are for.
        **defaults: Fields of :class:`ModelSpec` where no option says otherwise.

    Returns:
        ModelSpec: The model.

    Raises:
        ValueError: If an option is unknown, contradicts another, or is not for this
            mode.

    Examples:
        >>> spec = parse_spec('arch:s@published,bf16', 'infer', threads=1)
        >>> spec.name, spec.published, spec.dtype, spec.threads
        ('arch:s', True, 'bfloat16', 1)
    """
    name, _, options = text.rpartition('@') if '@' in text else (text, '', '')
    if not name:
        raise ValueError(f'{text!r} names no model; write NAME or NAME@OPTION,...')
    given, seen = {}, {}
    for option in options.split(',') if '@' in text else ():
        field, value = _read_option(option, text)
        if field in seen:
            raise ValueError(
                f'{option!r} of {text!r} comes after {seen[field]!r}; only one of '
                'them can hold'
            )
        given[field], seen[field] = value, option
    spec = replace(ModelSpec(text, name), **{**defaults, **given})
    _check(spec, mode)
    return spec


def _read_option(option: str, text: str) -> tuple[str, object]:
    """Return the field of a ModelSpec and its value."""
    if option in DTYPES:
        return 'dtype', DTYPES[option]
    if option in LAYOUTS:
        return 'layout', option
    if option in OPTIONS and option != 'threads=N':
        return option, True
    key, _, value = option.partition('=')
    if key == 'threads' and value.isascii() and value.isdigit() and int(value):
        return 'threads', int(value)
    raise ValueError(
        f'{text!r} has the unknown option {option!r}; there are '
        + ', '.join(OPTIONS)
        + ' (N from 1 on)'
    )


def _check(spec: ModelSpec, mode: str) -> None:
    for field, only in (('deploy', 'infer'), ('cp', 'train')):
        if getattr(spec, field) and mode != only:
            raise ValueError(
                f'{field!r} of {spec.text!r} is for {only!r} only, not {mode!r}'
            )
    for field in ('deploy', 'cp'):
        if spec.published and getattr(spec, field):
            raise ValueError(
                f"{spec.text!r} has 'published' and {field!r}, which only the "
                'backbone of this package has'
            )
    archs = ('s', 'm', 'l')
    if spec.name.startswith(ARCH) and spec.name[len(ARCH) :] not in archs:
        known = ', '.join(ARCH + arch for arch in archs)
        raise ValueError(f'no backbone {spec.name!r}; there are {known}')
