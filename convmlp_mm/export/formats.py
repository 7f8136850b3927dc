"""Graphs as ONNX and as ``torch.export``, with notes on what they are."""

from __future__ import annotations

import inspect
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from .graphs import BackboneGraph, DetectorGraph

if TYPE_CHECKING:
    from mmengine.model import BaseModel

__all__ = ['describe', 'load_onnx', 'load_torch', 'to_onnx', 'to_torch']

INPUT = 'images'


def describe(
    model: BaseModel,
    graph: nn.Module,
    part: str,
    order: str,
    notes: Mapping[str, str],
) -> dict[str, str]:
    """Return what a file says of itself.

    Args:
        model (BaseModel): What is exported.
        graph (nn.Module): Its graph.
        part (str): ``'model'`` or ``'backbone'``.
        order (str): Of the colours.
        notes (Mapping[str, str]): To add.

    Returns:
        dict[str, str]: Values as JSON or plain words.
    """
    normalize = graph.normalize
    properties = dict(
        model=type(model).__name__,
        part=part,
        channel_order=order,
        value_range=[0, 255],
        # The graph has them in it.
        normalized_inside=True,
        mean=normalize.mean.flatten().tolist() if normalize.enabled else [0, 0, 0],
        std=normalize.std.flatten().tolist() if normalize.enabled else [1, 1, 1],
        padded_inside_to=normalize.divisor,
        classes=list(model.dataset_meta.get('classes') or ()),
        outputs=list(graph.outputs),
    )
    if isinstance(graph, BackboneGraph):
        for name in ('strides', 'out_channels'):
            if hasattr(model.backbone, name):
                properties[name] = list(getattr(model.backbone, name))
    if isinstance(graph, DetectorGraph):
        properties['test_cfg'] = model.bbox_head.test_cfg.to_dict()
    properties.update(notes)
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in properties.items()
    }


def to_onnx(
    graph: nn.Module, example: Tensor, opset: int, properties: Mapping[str, str]
) -> bytes:
    """Export to ONNX.

    Args:
        graph (nn.Module): Of :mod:`convmlp_mm.export.graphs`.
        example (Tensor): Pictures; other sizes may follow.
        opset (int): Of ONNX.
        properties (Mapping[str, str]): Kept in the file.

    Returns:
        bytes: The file, checked by onnx.
    """
    import onnx

    stream = io.BytesIO()
    # The exporter that both stacks have. The one upon torch.export, the default of
    # newer releases, cannot leave the size open in torch 2.2.
    newer = 'dynamo' in inspect.signature(torch.onnx.export).parameters
    torch.onnx.export(
        graph,
        (example,),
        stream,
        input_names=[INPUT],
        output_names=list(graph.outputs),
        opset_version=opset,
        dynamic_axes={
            INPUT: {0: 'batch', 2: 'height', 3: 'width'},
            **dict(zip(graph.outputs, graph.axes)),
        },
        **(dict(dynamo=False) if newer else {}),
    )
    proto = onnx.load_from_string(stream.getvalue())
    if isinstance(graph, DetectorGraph):
        # Which the exporter does not find out.
        for output in proto.graph.output:
            dim = output.type.tensor_type.shape.dim[1]
            dim.Clear()
            dim.dim_value = graph.max_per_img
    onnx.helper.set_model_props(proto, dict(properties))
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def to_torch(graph: nn.Module, example: Tensor, properties: Mapping[str, str]) -> bytes:
    """Export by ``torch.export``.

    Args:
        graph (nn.Module): Of :mod:`convmlp_mm.export.graphs`.
        example (Tensor): At least two pictures; other sizes may follow.
        properties (Mapping[str, str]): Kept in the file, as ``metadata.json``.

    Returns:
        bytes: The file.
    """
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        graph, (example,), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},)
    )
    stream = io.BytesIO()
    extra = {'metadata.json': json.dumps(dict(properties))}
    torch.export.save(program, stream, extra_files=extra)
    return stream.getvalue()


def load_onnx(
    content: bytes, outputs: Sequence[str]
) -> Callable[[Tensor], list[np.ndarray]]:
    """Open an ONNX file in onnxruntime, on the CPU and as many threads as torch.

    Args:
        content (bytes): The file.
        outputs (Sequence[str]): Those to compute, in order.

    Returns:
        Callable: From pictures to arrays.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        content, options, providers=['CPUExecutionProvider']
    )
    return lambda images: session.run(list(outputs), {INPUT: images.numpy()})


def load_torch(
    content: bytes, outputs: Sequence[str]
) -> Callable[[Tensor], list[np.ndarray]]:
    """Open a file of ``torch.export``; see :func:`load_onnx`."""
    module = torch.export.load(io.BytesIO(content)).module()

    def run(images: Tensor) -> list[np.ndarray]:
        with torch.no_grad():
            return [output.numpy() for output in module(images)]

    return run
