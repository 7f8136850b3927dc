"""Files of graphs: what can be asked for, how they are made, opened and written."""

from __future__ import annotations

import contextlib
import copy
import inspect
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

__all__ = ['FORMATS', 'Exported', 'check_request', 'export', 'write']

INPUT = 'images'
# The newest that the exporter of torch 2.2 writes.
OPSET = 17


class OnnxFormat:
    """ONNX, with any batch and size from 32 pixels on."""

    suffix, smallest = '.onnx', 32

    @staticmethod
    def make(graph: Graph, example: Tensor, properties: dict) -> bytes:
        """Return the content of a file."""
        import onnx

        axes = {0: 'batch', 2: 'height', 3: 'width'}
        # The exporter upon TorchScript is the one that both stacks have; the newer one
        # cannot leave the size open in torch 2.2.
        newer = 'dynamo' in inspect.signature(torch.onnx.export).parameters
        stream = io.BytesIO()
        torch.onnx.export(
            graph,
            (example,),
            stream,
            input_names=[INPUT],
            output_names=list(graph.outputs),
            opset_version=OPSET,
            dynamic_axes={INPUT: axes, **graph.outputs},
            **(dict(dynamo=False) if newer else {}),
        )
        proto = onnx.load_from_string(stream.getvalue())
        if graph.length is not None:
            for output in proto.graph.output:
                output.type.tensor_type.shape.dim[1].dim_value = graph.length
        onnx.helper.set_model_props(proto, properties)
        return proto.SerializeToString()

    @staticmethod
    def open(content: bytes) -> Callable:
        """Return a function of images that runs a file."""
        import onnxruntime

        on_cpu = ['CPUExecutionProvider']
        session = onnxruntime.InferenceSession(content, providers=on_cpu)
        return lambda images: session.run(None, {INPUT: images.numpy()})


class TorchFormat:
    """``torch.export``, with any batch, and sides above the largest stride, 128.

    It takes a map of one position for one that always has one.
    """

    suffix, smallest = '.pt2', 129

    @staticmethod
    def make(graph: Graph, example: Tensor, properties: dict) -> bytes:
        """Return the content of a file."""
        axes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
        program = torch.export.export(graph, (example,), dynamic_shapes=(axes,))
        stream = io.BytesIO()
        extra = {'metadata.json': json.dumps(properties)}
        torch.export.save(program, stream, extra_files=extra)
        return stream.getvalue()

    @staticmethod
    def open(content: bytes) -> Callable:
        """Return a function of images that runs a file."""
        module = torch.export.load(io.BytesIO(content)).module()
        return lambda images: [output.numpy() for output in module(images)]


FORMATS = dict(onnx=OnnxFormat, torch=TorchFormat)


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
    suffix = FORMATS[form].suffix
    if path is not None and not str(path).endswith(suffix):
        raise ValueError(
            f'the file of format {form!r} must end with {suffix!r}, but got {path!r}'
        )
    if form == 'torch' and not hasattr(torch.export.Dim, 'DYNAMIC'):
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
    chosen, kind = FORMATS[form], type(model).__name__
    if min(shape) < chosen.smallest:
        raise ValueError(
            f'the shape must be at least {chosen.smallest} {chosen.smallest} for '
            f'format {form!r}, but got {shape[0]} {shape[1]}'
        )
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
        content = chosen.make(graph, example, properties)
        run = chosen.open(content)
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
