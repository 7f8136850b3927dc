"""The options of tools/benchmark.py, and the jobs that they describe."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from ..analysis.complexity import default_shape
from ..analysis.output import FORMATS
from ..files import check_output
from ..launch import add_cfg_options
from ..zoo import published_weights
from .spec import ARCH, DTYPES, OPTIONS, ModelSpec, parse_spec
from .steps import MATMUL, Job, spec_config

__all__ = ['make_jobs', 'make_parser']

# Of the backbone alone.
ARCH_SHAPE = (224, 224)


def make_parser(description: str) -> argparse.ArgumentParser:
    """Make the parser of the command line.

    Args:
        description (str): Of the tool.

    Returns:
        ArgumentParser: With a subparser for each mode.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    modes = parser.add_subparsers(dest='mode', required=True, metavar='MODE')
    options = '\n'.join(f'  {k:14} {v}' for k, v in OPTIONS.items())
    for mode, help_text in (
        ('infer', 'forward passes on pictures that are ready'),
        ('train', 'optimizer steps as of the Runner, preprocessing included'),
    ):
        sub = modes.add_parser(
            mode,
            help=help_text,
            description=f'Measure {help_text}.',
            epilog=f'options of a model, after @:\n{options}',
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_model_arguments(sub, mode)
        _add_output_arguments(sub)
    _add_data_arguments(modes.add_parser('data', help='loading of training data'))
    return parser


def _add_model_arguments(parser: argparse.ArgumentParser, mode: str) -> None:
    parser.add_argument('models', nargs='+', metavar='NAME[@OPTION,...]')
    parser.add_argument('--batch-size', type=_number(1), default=1, metavar='N')
    parser.add_argument(
        '--shape',
        nargs='+',
        type=_number(1),
        metavar='PIXELS',
        help='height and width, or one number for both; by default the size that '
        'each configuration is tested at (detectors: 800x1280)',
    )
    parser.add_argument(
        '--device',
        default='cuda' if torch.cuda.is_available() else 'cpu',
        help='cpu, cuda or cuda:N; by default a GPU if there is one',
    )
    parser.add_argument('--rounds', type=_number(1), default=10, metavar='N')
    parser.add_argument(
        '--warmup',
        type=_number(1),
        default=3,
        metavar='N',
        help='steps of each model before the first round',
    )
    parser.add_argument(
        '--min-time',
        type=_number(0, float),
        default=0.05,
        metavar='SECONDS',
        help='shorter steps are repeated until a measurement takes this long',
    )
    parser.add_argument('--seed', type=int, default=0, help='of the order in a round')
    parser.add_argument(
        '--dtype', choices=DTYPES, default='fp32', help='of models without an option'
    )
    parser.add_argument(
        '--threads',
        type=_number(1),
        metavar='N',
        help="likewise; by default torch's own number",
    )
    parser.add_argument(
        '--compile', action='store_true', help='torch.compile for all models'
    )
    parser.add_argument(
        '--channels-last',
        action='store_true',
        help='channels-last memory for models without an option',
    )
    parser.add_argument(
        '--weights',
        choices=('no', 'yes'),
        default='no',
        help='yes: the published weights, instead of random ones',
    )
    if mode == 'infer':
        parser.add_argument(
            '--predict',
            action='store_true',
            help='up to boxes, label maps or classes; by default up to what the head '
            "computes (the toolkits' mode tensor)",
        )
    parser.add_argument(
        '--matmul',
        action='store_true',
        help='also a large product of matrices in float32, for orientation',
    )
    parser.add_argument(
        '--top1',
        action='store_true',
        help='published ImageNet-1k accuracies beside the speed',
    )
    parser.add_argument('--plot', metavar='FILE.png', help='chart to write')


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = 'Measure the loading of training data, without a model.'
    parser.add_argument('config', help='configuration, named as the models are')
    add_cfg_options(parser)
    parser.add_argument(
        '--workers',
        nargs='+',
        type=_number(0),
        default=[0, 1, 2],
        metavar='N',
        help='numbers of processes to try; 0 is none',
    )
    parser.add_argument('--batches', type=_number(1), default=20, metavar='N')
    parser.add_argument(
        '--batch-size',
        type=_number(1),
        metavar='N',
        help="by default the configuration's",
    )
    parser.add_argument(
        '--samples',
        type=_number(1),
        default=100,
        metavar='N',
        help='pictures to time the steps of the pipeline with',
    )
    parser.add_argument(
        '--step',
        type=_number(1e-6, float),
        metavar='SECONDS',
        help='say how many processes keep up with a training step of this length',
    )
    _add_output_arguments(parser)


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--format', choices=FORMATS, default='text')
    parser.add_argument('--out', help='file to write; by default the terminal')
    parser.add_argument(
        '--overwrite', action='store_true', help='replace files that are there'
    )


def make_jobs(args: argparse.Namespace) -> list[Job]:
    """Read the models and check all that can be checked before one is built.

    Args:
        args (Namespace): Options of ``infer`` or ``train``.

    Returns:
        list[Job]: One for each model, and one for the product of matrices.

    Raises:
        OSError: If a file cannot be written.
        ValueError: If an option or a model is wrong.
    """
    for path in (args.out, args.plot):
        if path is not None:
            check_output(path, args.overwrite)
    if args.plot is not None and not args.plot.endswith('.png'):
        raise ValueError(f'--plot writes .png, but got {args.plot!r}')
    if args.shape is not None and len(args.shape) > 2:
        raise ValueError(
            f'--shape takes height and width, but got {len(args.shape)} numbers'
        )
    _check_device(args.device)
    defaults = dict(
        dtype=DTYPES[args.dtype],
        threads=args.threads,
        compile=args.compile,
        layout='channels-last' if args.channels_last else None,
    )
    specs = [parse_spec(text, args.mode, **defaults) for text in args.models]
    shape = args.shape and (args.shape[0], args.shape[-1])
    jobs = []
    for spec in specs:
        cfg = spec_config(spec.name)
        backbone = (cfg.model.get('backbone') or {}).get('type')
        if spec.published and backbone != 'ConvMLP':
            raise ValueError(
                f"'published' of {spec.text!r} is for ConvMLP, but its backbone is "
                f'{backbone}'
            )
        if args.weights == 'yes':
            published_weights(spec.name)
        job = _job_of(args, spec)
        usual = ARCH_SHAPE if spec.name.startswith(ARCH) else None
        jobs.append(job(shape=shape or usual or default_shape(cfg)))
    if args.matmul:
        spec = ModelSpec(MATMUL, MATMUL, threads=args.threads)
        jobs.append(_job_of(args, spec)(shape=(0, 0)))
    return jobs


def _check_device(name: str) -> None:
    """Refuse a device that is not there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ('cpu', 'cuda'):
        raise ValueError(f'--device must be cpu, cuda or cuda:N, but got {name!r}')
    if device.type == 'cuda' and not (device.index or 0) < torch.cuda.device_count():
        raise ValueError(
            f'--device {name} is not there: torch sees {torch.cuda.device_count()} GPUs'
        )


def _job_of(
    args: argparse.Namespace, spec: ModelSpec
) -> Callable[[tuple[int, int]], Job]:
    """Return what makes the job of a model from its shape."""

    def job(shape: tuple[int, int]) -> Job:
        return Job(
            spec,
            args.mode,
            args.batch_size,
            shape,
            device=args.device,
            warmup=args.warmup,
            min_time=args.min_time,
            predict=getattr(args, 'predict', False),
            weights=args.weights == 'yes',
        )

    return job


def _number(least: float, kind: type = int) -> Callable[[str], float]:
    """Return a type of arguments that refuses what is below ``least``."""

    def convert(text: str) -> float:
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f'must be {least} or more, but is {text}')
        return value

    # Its name stands in the messages of argparse.
    convert.__name__ = kind.__name__
    return convert
