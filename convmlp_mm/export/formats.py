"""Files of graphs: what can be asked for, how they are made, opened and written."""

import contextlib
import copy
import io
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from torch import Tensor

from ..apis import switch_to_deploy
from ..checkpoint import check_output, write_file
from .systems import SYSTEMS, ExportError, Graph, backbone

INPUT = 'images'
# The newest that the exporter of torch 2.2 writes.
OPSET = 17
# torch 2.6 or newer.
HAS_OPEN_SIZES = hasattr(torch.export.Dim, 'DYNAMIC')


def make_onnx(graph: Graph, sample: Tensor, properties: dict) -> tuple[bytes, Callable]:
    """Return the content of an ONNX file, and a function of images that runs it."""
    import onnx
    import onnxruntime

    # The exporter upon TorchScript is the one that both stacks have; the newer one
    # cannot leave the size open in torch 2.2.
    options = dict(dynamo=False) if HAS_OPEN_SIZES else {}
    axes = {INPUT: {0: 'batch', 2: 'height', 3: 'width'}, **graph.outputs}
    options.update(dynamic_axes=axes, input_names=[INPUT], opset_version=OPSET)
    stream = io.BytesIO()
    torch.onnx.export(
        graph, (sample,), stream, output_names=list(graph.outputs), **options
    )
    proto = onnx.load_from_string(stream.getvalue())
    # It does not find all the lengths of axes that are not open.
    for output, values in zip(proto.graph.output, graph(sample)):
        for axis in set(range(values.ndim)) - set(graph.outputs[output.name]):
            output.type.tensor_type.shape.dim[axis].dim_value = values.shape[axis]
    onnx.helper.set_model_props(proto, properties)
    content = proto.SerializeToString()
    on_cpu = ['CPUExecutionProvider']
    session = onnxruntime.InferenceSession(content, providers=on_cpu)
    return content, lambda images: session.run(None, {INPUT: images.numpy()})


def make_pt2(graph: Graph, sample: Tensor, properties: dict) -> tuple[bytes, Callable]:
    """Return the content of a ``torch.export`` file, and a function that runs it."""
    axes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(graph, (sample,), dynamic_shapes=(axes,))
    stream = io.BytesIO()
    extra = {'metadata.json': json.dumps(properties)}
    torch.export.save(program, stream, extra_files=extra)
    stream.seek(0)
    module = torch.export.load(stream).module()
    return stream.getvalue(), lambda images: [x.numpy() for x in module(images)]


# The function, how files end, and the smallest side to compare at: torch.export takes a
# map of one position for one that always has one, and the largest stride is 128.
FORMATS = dict(onnx=(make_onnx, '.onnx', 32), torch=(make_pt2, '.pt2', 129))


@dataclass
class Exported:
    """A file in memory, with what :func:`verify` needs and then adds."""

    content: bytes
    run: Callable
    graph: Graph
    shape: tuple[int, int]
    differences: dict[str, float] | None = None
    detections: int = 0


def check_request(
    cfg: Config,
    path: str | os.PathLike | None = None,
    part: str = 'model',
    form: str = 'onnx',
    overwrite: bool = False,
) -> None:
    """Check what can be checked before a model is built.

    For arguments and errors see :func:`export` and :func:`write`; a path is optional.
    """
    _, suffix, _ = FORMATS[form]
    if path is not None and not str(path).endswith(suffix):
        raise ValueError(
            f'the file of format {form!r} must end with {suffix!r}, but got {path!r}'
        )
    if form == 'torch' and not HAS_OPEN_SIZES:
        raise ImportError(
            "format 'torch' needs torch 2.6 or newer: torch.export of torch "
            f"{torch.__version__} fixes batch and size; format 'onnx' does not"
        )
    # Configurations that import have the class itself.
    kind = getattr(cfg.model.type, '__name__', cfg.model.type).rpartition('.')[2]
    if part != 'backbone' and kind not in SYSTEMS:
        raise ExportError(
            f'{kind} cannot be exported as a whole; {", ".join(SYSTEMS)} can, and of '
            "other models the part 'backbone'"
        )
    if path is not None:
        check_output(path, overwrite)


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn any error of an exporter or engine into one line; each has its own."""
    try:
        yield
    except Exception as error:
        line = str(error).strip().partition('\n')[0]
        raise ExportError(f'{what}: {type(error).__name__}: {line}') from error


def export(
    model: BaseModel,
    shape: tuple[int, int],
    part: str = 'model',
    form: str = 'onnx',
    notes: Mapping[str, str] | None = None,
) -> Exported:
    """Make a file of a model, with BN folded.

    Its input ``images`` is (N, 3, H, W), float32 from 0 to 255, the colours in the
    order of the property ``channel_order``; N, H and W are open. For the outputs see
    the functions in :mod:`convmlp_mm.export.systems`.

    Args:
        model: Of :func:`convmlp_mm.apis.get_model`, on the CPU; it is not changed.
        shape: Height and width in pixels to trace and to compare at.
        part: ``'model'`` or ``'backbone'``.
        form: One of ``FORMATS``.
        notes: Properties to add to those that the file holds, as JSON.

    Raises:
        ValueError: If the model cannot be exported, or the shape is too small.
        ImportError: If torch is too old.
    """
    check_request(model.cfg, None, part, form)
    make, _, smallest = FORMATS[form]
    if min(shape) < smallest:
        raise ValueError(
            f'the shape must be at least {smallest} {smallest} for format {form!r}, '
            f'but got {shape[0]} {shape[1]}'
        )
    kind = type(model).__name__
    deployed = copy.deepcopy(model)
    switch_to_deploy(deployed)
    deployed.requires_grad_(False)
    # torch.export takes a batch of 1 for one that is always 1.
    example = torch.zeros(2, 3, *shape)
    refusal = refusing(f'{kind} cannot be exported to {form}')
    with refusal, warnings.catch_warnings(), torch.no_grad():
        # They are about shapes that Python compares; verify() tells if they matter.
        warnings.simplefilter('ignore')
        build = dict(model=SYSTEMS.get(kind), backbone=backbone)[part]
        graph = build(deployed).eval()
        properties = dict(graph.properties, model=kind, part=part, **(notes or {}))
        for key, value in properties.items():
            properties[key] = value if isinstance(value, str) else json.dumps(value)
        content, run = make(graph, example, properties)
    return Exported(content, run, graph, shape)


def write(exported: Exported, path: str | os.PathLike, overwrite: bool = False) -> None:
    """Write a file that :func:`verify` has passed, whole or not at all.

    Raises:
        ExportError: If it has not been verified.
        OSError: If it cannot be written; a file that is there stays.
    """
    if not exported.differences:
        raise ExportError('a file is written only after verify() has passed it')
    write_file(path, exported.content, overwrite)
