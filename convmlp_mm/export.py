"""Export models to ONNX and to ``torch.export``, checked against the toolkits.

The graph (see :mod:`convmlp_mm.export_graphs`) takes pixels and gives results. It is
run before it is written, and what differs from the toolkit is not written.
"""

from __future__ import annotations

import copy
import inspect
import io
import json
import os.path as osp
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import util
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from .analysis.common import MIN_SIZE, fit_image
from .apis import switch_to_deploy
from .export_graphs import (
    NO_LABEL,
    BackboneGraph,
    ClassifierGraph,
    DetectorGraph,
    Normalize,
    SegmentorGraph,
    map_sizes,
)
from .files import check_output, write_file

if TYPE_CHECKING:
    import os

    from mmengine.config import Config
    from mmengine.model import BaseModel
    from mmengine.structures import InstanceData

__all__ = [
    'EXPORTABLE',
    'FORMATS',
    'OPSETS',
    'PARTS',
    'TOLERANCE',
    'ExportError',
    'ExportReport',
    'check_request',
    'draw_images',
    'export_model',
]

EXPORTABLE = ('ImageClassifier', 'EncoderDecoder', 'RetinaNet')
# With the ending of the file.
FORMATS = {'onnx': '.onnx', 'torch': '.pt2'}
PARTS = ('model', 'backbone')
# The newest is what the exporter of torch 2.2 writes.
OPSETS = range(13, 18)
# Of |exported - PyTorch| / max(1, |PyTorch|), number by number.
TOLERANCE = 1e-4
# Of the overlap of two boxes. mmcv shifts boxes by class before it compares them, which
# leaves them whole 1/128 pixels.
OVERLAP = 1e-2
INPUT = 'images'
ROUNDS = 7


class ExportError(ValueError):
    """A model could not be exported, or what was exported computes something else."""


@dataclass(frozen=True)
class ExportReport:
    """What was exported and measured.

    Attributes:
        differences (tuple[tuple[tuple[int, int, int], dict[str, float]], ...]): Of
            each check the batch, height and width, and for each output the largest
            ``|exported - PyTorch| / max(1, |PyTorch|)``. For the labels of a
            segmentor it is how far the logit of the exported class lies below the
            highest one; for those of a detector how many detections are missing or
            must not be there. Boxes are taken relative to their farthest edge.
        compared (int): Number of pictures in the checks.
        detections (int | None): Number of detections in them.
        rounded (int): Those of them that mmdet has not, since of boxes with the same
            score, but for rounding, it has kept another.
        seconds (tuple[float, float]): Median time of one batch at the given shape:
            of the toolkit (its ``test_step`` with BN folded) and of the exported
            graph.
        threads (int): With which both were timed.
        size (int): Of the file, in bytes.
    """

    differences: tuple[tuple[tuple[int, int, int], dict[str, float]], ...]
    compared: int
    detections: int | None
    rounded: int
    seconds: tuple[float, float]
    threads: int
    size: int


# --- What can be exported ----------------------------------------------------------


def check_request(
    cfg: Config,
    path: str | os.PathLike,
    part: str = 'model',
    form: str = 'onnx',
    opset: int = OPSETS[-1],
    overwrite: bool = False,
) -> None:
    """Check what can be checked before a model is built.

    Args:
        cfg (Config): Of the model.
        path (str | PathLike): The file to write.
        part (str): One of ``PARTS``. Defaults to ``'model'``.
        form (str): One of ``FORMATS``. Defaults to ``'onnx'``.
        opset (int): One of ``OPSETS``. Defaults to the newest.
        overwrite (bool): Whether the file may be there. Defaults to False.

    Raises:
        ValueError: If an argument is none of those allowed, or the model cannot be
            exported.
        ImportError: If a package is missing, or torch is too old.
        OSError: See :func:`convmlp_mm.files.check_output`.
    """
    for name, value, allowed in (
        ('part', part, PARTS),
        ('format', form, tuple(FORMATS)),
        ('opset', opset, tuple(OPSETS)),
    ):
        if value not in allowed:
            raise ValueError(f'{name} must be one of {allowed}, but got {value!r}')
    if not str(path).endswith(FORMATS[form]):
        raise ValueError(
            f'the file of format {form!r} must end with {FORMATS[form]!r}, but got '
            f'{str(path)!r}'
        )
    if form == 'torch' and not hasattr(torch.export.Dim, 'DYNAMIC'):
        raise ImportError(
            "format 'torch' needs torch 2.6 or newer: torch.export of torch "
            f"{torch.__version__} fixes batch and size; format 'onnx' does not"
        )
    needed = ('onnx', 'onnxruntime') if form == 'onnx' else ()
    missing = [name for name in needed if util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"{' and '.join(missing)} missing: pip install 'convmlp_mm[deploy]'"
        )
    # A class, in configurations that import.
    kind = getattr(cfg.model.type, '__name__', cfg.model.type).rpartition('.')[2]
    if part == 'backbone':
        if not cfg.model.get('backbone'):
            raise ValueError(f'{kind} has no part that is called backbone')
    elif kind not in EXPORTABLE:
        raise ValueError(
            f'{kind} cannot be exported as a whole; {", ".join(EXPORTABLE)} can, and '
            "of other models the part 'backbone'"
        )
    check_output(path, overwrite)


def _check_settings(model: BaseModel) -> None:
    """Refuse the settings that the graphs do not have."""
    scope = model.cfg.default_scope
    if scope == 'mmpretrain':
        from mmpretrain.models import ClsHead

        head = type(model.head).__name__
        _require('head', isinstance(model.head, ClsHead), head, 'a ClsHead')
    elif scope == 'mmseg':
        mode = model.test_cfg.get('mode', 'whole')
        _require('test_cfg.mode', mode == 'whole', mode, "'whole'")
        channels = model.out_channels
        _require('decode_head.out_channels', channels > 1, channels, 'above 1')
    else:
        head = model.bbox_head
        kind = type(head).__name__
        _require('bbox_head', kind == 'RetinaHead', kind, 'RetinaHead')
        sigmoid = head.use_sigmoid_cls
        _require('bbox_head.loss_cls.use_sigmoid', sigmoid, sigmoid, 'True')
        coder = type(head.bbox_coder).__name__
        allowed = 'DeltaXYWHBBoxCoder'
        _require('bbox_head.bbox_coder', coder == allowed, coder, allowed)
        cfg = head.test_cfg
        for key in ('nms_pre', 'max_per_img'):
            value = cfg.get(key, -1)
            _require(f'test_cfg.{key}', value > 0, value, 'above 0')
        threshold = cfg.get('score_thr', 0)
        _require('test_cfg.score_thr', threshold >= 0, threshold, 'at least 0')
        keys = {'type', 'iou_threshold', 'class_agnostic', 'split_thr'}
        fits = cfg.nms.get('type') == 'nms' and set(cfg.nms) <= keys
        _require('test_cfg.nms', fits, dict(cfg.nms), f"type='nms' with {sorted(keys)}")


def _require(name: str, fits: bool, value: object, allowed: str) -> None:
    if not fits:
        raise ValueError(f'{name} must be {allowed} to be exported, but is {value}')


def _divisor(model: BaseModel) -> int:
    """Return what the data preprocessor pads to when it tests."""
    if model.cfg.default_scope != 'mmseg':
        return model.data_preprocessor.pad_size_divisor or 1
    settings = model.data_preprocessor.test_cfg or {}
    size = settings.get('size')
    _require('data_preprocessor.test_cfg.size', not size, size, 'None')
    return settings.get('size_divisor') or 1


def _channel_order(model: BaseModel) -> str:
    """Return the order of colours that the layers see."""
    given = model.cfg.model.get('data_preprocessor') or {}
    to_rgb = given.get('bgr_to_rgb') or getattr(model.data_preprocessor, 'to_rgb', 0)
    return 'RGB' if to_rgb else 'BGR'


def _make_graph(model: BaseModel, part: str) -> nn.Module:
    normalize = Normalize(model.data_preprocessor, _divisor(model))
    if part == 'backbone':
        graph = BackboneGraph
    else:
        _check_settings(model)
        graph = dict(
            mmpretrain=ClassifierGraph, mmseg=SegmentorGraph, mmdet=DetectorGraph
        )[model.cfg.default_scope]
    return graph(model, normalize).eval()


# --- Export ------------------------------------------------------------------------


def export_model(
    model: BaseModel,
    path: str | os.PathLike,
    shape: tuple[int, int],
    part: str = 'model',
    form: str = 'onnx',
    batch_size: int = 1,
    images: Sequence[np.ndarray] | None = None,
    opset: int = OPSETS[-1],
    overwrite: bool = False,
    notes: Mapping[str, str] | None = None,
) -> ExportReport:
    """Write a model, if what was exported computes the same as the toolkit.

    The graph takes ``images`` of shape (N, 3, H, W), float32 from 0 to 255, with the
    colours in the order that ``channel_order`` in the file says; N is open, and so
    are H and W. It gives

    - of a classifier ``scores``, (N, classes), which add up to 1;
    - of a segmentor ``labels``, (N, H, W), int64, and ``logits``, (N, classes, H, W);
    - of a detector ``boxes``, (N, K, 4), as left, top, right, bottom in pixels,
      ``scores`` and ``labels``, (N, K), in the order of the scores. K is
      ``test_cfg.max_per_img``; where a picture has fewer, the label is -1 and the
      rest 0;
    - of a backbone ``feature_0`` and so on, (N, channels, height, width).

    It is compared with ``test_step`` of the toolkit, whose BN is not folded: at the
    given shape and batch, at another size, and with one picture more.

    Args:
        model (BaseModel): Of :func:`convmlp_mm.apis.get_model`, on the CPU; it is not
            changed.
        path (str | PathLike): The file, ``.onnx`` or ``.pt2``.
        shape (tuple[int, int]): Height and width in pixels of the check and of the
            timing.
        part (str): ``'model'`` or ``'backbone'``. Defaults to ``'model'``.
        form (str): ``'onnx'`` or ``'torch'``. Defaults to ``'onnx'``.
        batch_size (int): Pictures at once in the check and in the timing. Defaults
            to 1.
        images (Sequence[ndarray], optional): Pictures to compare on, (H, W, 3), uint8,
            blue first, all of which are used, cut and resized to the shape. Defaults
            to drawn ones.
        opset (int): Of the ONNX file. Defaults to 17.
        overwrite (bool): Whether to replace a file. Defaults to False.
        notes (Mapping[str, str], optional): What to add to the properties that the
            file holds (mean, std, classes and others, as JSON).

    Returns:
        ExportReport: What was compared and timed.

    Raises:
        ExportError: If the model cannot be exported, or if the largest difference is
            above ``TOLERANCE``. No file is written then.
        ValueError: See :func:`check_request`; and for the shape and the batch.
        ImportError: See :func:`check_request`.
        OSError: See :func:`check_request`.
    """
    check_request(model.cfg, path, part, form, opset, overwrite)
    deployed = copy.deepcopy(model)
    switch_to_deploy(deployed)
    deployed.requires_grad_(False)
    graph = _make_graph(deployed, part)
    smallest = _smallest_side(graph, deployed, form)
    if min(shape) < smallest:
        raise ValueError(
            f'the shape must be at least {smallest} {smallest} for format {form!r}, '
            f'but got {shape[0]} {shape[1]}'
        )
    if batch_size < 1:
        raise ValueError(f'the batch size must be at least 1, but got {batch_size}')
    order = _channel_order(model)
    images = list(images) if images is not None else draw_images(3, shape)

    properties = _describe(model, graph, part, order, notes or {})
    # torch.export takes a batch of 1 for one that is always 1.
    example = torch.zeros(max(2, batch_size), 3, *shape)
    kind = type(model).__name__
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # Of the shapes that Python compares, where the check will tell.
            warnings.simplefilter('ignore')
            if form == 'onnx':
                content = _to_onnx(graph, example, opset, properties)
            else:
                content = _to_torch(graph, example, properties)
            load = _load_onnx if form == 'onnx' else _load_torch
            run = load(content, graph.outputs)
    # Each exporter fails in its own way.
    except Exception as error:
        line = str(error).strip().partition('\n')[0]
        raise ExportError(
            f'{kind} cannot be exported to {form}: {type(error).__name__}: {line}'
        ) from error
    detector = isinstance(graph, DetectorGraph)
    differences, compared, detections, rounded = [], 0, 0, 0
    other = tuple(max(smallest, int(n * s) | 1) for n, s in zip(shape, (0.8, 0.7)))
    for pictures, size in _plan_checks(images, batch_size, shape, other):
        batch = [fit_image(picture, size) for picture in pictures]
        found = dict(zip(graph.outputs, run(_to_input(batch, order))))
        if detector:
            result, *numbers = _compare_detections(graph, model, batch, found)
            detections, rounded = detections + numbers[0], rounded + numbers[1]
        else:
            result = _compare(graph, _toolkit_results(model, batch, part), found)
        differences.append(((len(batch), *size), result))
        compared += len(batch)
        worst = max(result.values())
        # Not a number is no agreement either.
        if not worst <= TOLERANCE:
            raise ExportError(
                f'the exported {kind} differs from PyTorch by {worst:.1e} (more than '
                f'{TOLERANCE:.0e}) at batch {len(batch)}, {size[0]} x {size[1]} '
                f'pixels: {_spell(result)}'
            )

    batch = [fit_image(images[i % len(images)], shape) for i in range(batch_size)]
    given = _to_input(batch, order)
    seconds = _time_both(
        lambda: _toolkit_results(deployed, batch, part), lambda: run(given)
    )
    write_file(path, content, overwrite)
    return ExportReport(
        differences=_merge_checks(differences),
        compared=compared,
        detections=detections if detector else None,
        rounded=rounded,
        seconds=seconds,
        threads=torch.get_num_threads(),
        size=osp.getsize(path),
    )


def _smallest_side(graph: nn.Module, model: BaseModel, form: str) -> int:
    """Return the fewest pixels of a side.

    torch.export takes a map of one position for one that always has one.
    """
    if form == 'onnx':
        return MIN_SIZE
    if isinstance(graph, DetectorGraph):
        strides = model.bbox_head.prior_generator.strides
        return max(max(stride) for stride in strides) + 1
    return max(MIN_SIZE, 128 // min(map_sizes(model))) + 1


def _describe(
    model: BaseModel,
    graph: nn.Module,
    part: str,
    order: str,
    notes: Mapping[str, str],
) -> dict[str, str]:
    """Return what the file says of itself, each value as JSON or plain words."""
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


def _to_onnx(
    graph: nn.Module, example: Tensor, opset: int, properties: Mapping[str, str]
) -> bytes:
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


def _to_torch(
    graph: nn.Module, example: Tensor, properties: Mapping[str, str]
) -> bytes:
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        graph, (example,), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},)
    )
    stream = io.BytesIO()
    extra = {'metadata.json': json.dumps(dict(properties))}
    torch.export.save(program, stream, extra_files=extra)
    return stream.getvalue()


def _load_onnx(
    content: bytes, outputs: Sequence[str]
) -> Callable[[Tensor], list[np.ndarray]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        content, options, providers=['CPUExecutionProvider']
    )
    return lambda images: session.run(list(outputs), {INPUT: images.numpy()})


def _load_torch(
    content: bytes, outputs: Sequence[str]
) -> Callable[[Tensor], list[np.ndarray]]:
    module = torch.export.load(io.BytesIO(content)).module()

    def run(images: Tensor) -> list[np.ndarray]:
        with torch.no_grad():
            return [output.numpy() for output in module(images)]

    return run


# --- Comparison --------------------------------------------------------------------


def draw_images(number: int, shape: tuple[int, int], seed: int = 0) -> list[np.ndarray]:
    """Draw pictures with coarse and fine structure, the same for the same arguments.

    Args:
        number (int): How many.
        shape (tuple[int, int]): Height and width in pixels.
        seed (int): Defaults to 0.

    Returns:
        list[ndarray]: Of shape (H, W, 3), uint8.
    """
    rng = np.random.default_rng(seed)
    height, width = shape
    pictures = []
    for _ in range(number):
        total = np.full((height, width, 3), 128, np.float32)
        for cells in (3, 8, 24, 64):
            grid = rng.standard_normal((cells, cells, 3), np.float32)
            total += 35 * cv2.resize(
                grid, (width, height), interpolation=cv2.INTER_CUBIC
            )
        pictures.append(total.clip(0, 255).astype(np.uint8))
    return pictures


def _plan_checks(
    images: Sequence[np.ndarray],
    batch_size: int,
    shape: tuple[int, int],
    other: tuple[int, int],
) -> list[tuple[list[np.ndarray], tuple[int, int]]]:
    """Group all pictures into batches, and some once more in two other ways."""

    def take(start: int, number: int) -> list[np.ndarray]:
        return [images[i % len(images)] for i in range(start, start + number)]

    starts = range(0, len(images), batch_size)
    return [
        *((take(start, batch_size), shape) for start in starts),
        (take(0, batch_size), other),
        (take(0, batch_size + 1), shape),
    ]


def _to_input(batch: Sequence[np.ndarray], order: str) -> Tensor:
    """Stack pictures, blue first, as the graph takes them."""
    stacked = np.stack(batch).transpose(0, 3, 1, 2)
    if order == 'RGB':
        stacked = stacked[:, ::-1]
    return torch.from_numpy(np.ascontiguousarray(stacked, dtype=np.float32))


def _to_data(model: BaseModel, batch: Sequence[np.ndarray]) -> dict:
    """Put pictures, blue first, into what a test pipeline of the toolkit hands on."""
    scope = model.cfg.default_scope
    if scope == 'mmpretrain':
        from mmpretrain.structures import DataSample as Sample
    elif scope == 'mmdet':
        from mmdet.structures import DetDataSample as Sample
    else:
        from mmseg.structures import SegDataSample as Sample
    planes = [
        torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))
        for picture in batch
    ]
    size = tuple(batch[0].shape[:2])
    meta = dict(ori_shape=size, img_shape=size, scale_factor=(1.0, 1.0))
    samples = [Sample(metainfo=dict(meta)) for _ in batch]
    return dict(inputs=planes, data_samples=samples)


def _toolkit_results(
    model: BaseModel, batch: Sequence[np.ndarray], part: str
) -> list[dict[str, np.ndarray]]:
    """Return what the toolkit says of each picture, by names of outputs."""
    scope = model.cfg.default_scope
    data = _to_data(model, batch)
    with torch.no_grad():
        if part == 'backbone':
            maps = model.backbone(model.data_preprocessor(data, False)['inputs'])
            return [
                {f'feature_{i}': m[n].numpy() for i, m in enumerate(maps)}
                for n in range(len(batch))
            ]
        samples = model.test_step(data)
    if scope == 'mmpretrain':
        return [dict(scores=sample.pred_score.numpy()) for sample in samples]
    if scope == 'mmseg':
        return [
            dict(
                labels=sample.pred_sem_seg.data[0].numpy(),
                logits=sample.seg_logits.data.numpy(),
            )
            for sample in samples
        ]
    return [_detections(sample.pred_instances) for sample in samples]


def _difference(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return np.abs(found - expected) / np.maximum(1, np.abs(expected))


def _compare(
    graph: nn.Module,
    expected: Sequence[Mapping[str, np.ndarray]],
    found: Mapping[str, np.ndarray],
) -> dict[str, float]:
    """Return the largest difference of each output."""
    worst = dict.fromkeys(graph.outputs, 0.0)
    for n, one in enumerate(expected):
        mine = {name: values[n] for name, values in found.items()}
        result = {}
        for name, values in one.items():
            if values.shape != mine[name].shape:
                raise ExportError(
                    f'output {name!r} has shape {mine[name].shape}, but '
                    f'{values.shape} in PyTorch'
                )
            if name == 'labels':
                # Of two classes that are as good as equal, either is right.
                chosen = np.take_along_axis(one['logits'], mine[name][None], 0)
                values, mine[name] = one['logits'].max(axis=0), chosen[0]
            result[name] = _difference(mine[name], values).max()
        worst = _larger(worst, result)
    return worst


def _larger(
    first: Mapping[str, float], second: Mapping[str, float]
) -> dict[str, float]:
    # np.maximum keeps what is not a number.
    return {name: float(np.maximum(first[name], second[name])) for name in first}


def _compare_detections(
    graph: DetectorGraph,
    model: BaseModel,
    batch: Sequence[np.ndarray],
    found: Mapping[str, np.ndarray],
) -> tuple[dict[str, float], int, int]:
    """Compare detections with the candidates of mmdet, and their choice with its rules.

    Lists cannot be compared one by one: in an even area of a picture, scores of
    neighbours are equal but for rounding, which then decides who suppresses whom.

    Args:
        graph (DetectorGraph): With the settings.
        model (BaseModel): The detector.
        batch (Sequence[ndarray]): Pictures.
        found (Mapping[str, ndarray]): What the exported graph gives for them.

    Returns:
        tuple[dict[str, float], int, int]: The largest difference of each output, see
        :class:`ExportReport`; the number of detections; and how many of them mmdet
        has not, since rounding decided otherwise.
    """
    worst = dict.fromkeys(graph.outputs, 0.0)
    number = rounded = 0
    for n, final in enumerate(_toolkit_results(model, batch, 'model')):
        candidates, more = _candidates(model, batch[n])
        mine = {name: values[n] for name, values in found.items()}
        valid = mine['labels'] != NO_LABEL
        mine = {name: values[valid] for name, values in mine.items()}
        full = valid.all()
        result = _distance(mine, more)
        result['labels'] = _count_wrong(graph, mine, candidates, full)
        worst = _larger(worst, result)
        number += len(mine['scores'])
        rounded += int(
            (_costs(mine, final).min(axis=1, initial=np.inf) > TOLERANCE).sum()
        )
    return worst, number, rounded


def _candidates(
    model: BaseModel, picture: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return mmdet's boxes before the suppression, and more than it takes."""
    head = model.bbox_head
    with torch.no_grad():
        data = model.data_preprocessor(_to_data(model, [picture]), False)
        maps = head(model.extract_feat(data['inputs']))
        metas = [sample.metainfo for sample in data['data_samples']]
        both = []
        for factor, less in ((1, 0), (2, TOLERANCE)):
            cfg = copy.deepcopy(head.test_cfg)
            cfg.nms_pre = factor * cfg.nms_pre
            cfg.score_thr = cfg.get('score_thr', 0) - less
            (one,) = head.predict_by_feat(
                *maps, batch_img_metas=metas, cfg=cfg, with_nms=False
            )
            both.append(_detections(one))
    return tuple(both)


def _detections(instances: InstanceData) -> dict[str, np.ndarray]:
    return dict(
        boxes=instances.bboxes.numpy(),
        scores=instances.scores.numpy(),
        labels=instances.labels.numpy(),
    )


def _box_costs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the differences of (N, 4) and (M, 4) boxes, (N, M).

    Relative to the farthest edge of a box: each edge is the centre and half a side.
    """
    difference = np.abs(first[:, None] - second[None]).max(axis=-1, initial=0)
    return difference / np.maximum(1, np.abs(second).max(axis=-1, initial=0))


def _costs(
    first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Return the differences of detections, (N, M); without end between classes."""
    costs = np.maximum(
        _box_costs(first['boxes'], second['boxes']),
        np.abs(first['scores'][:, None] - second['scores'][None]),
    )
    costs[first['labels'][:, None] != second['labels'][None]] = np.inf
    return costs


def _distance(
    found: Mapping[str, np.ndarray], candidates: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Return how far boxes and scores are from those of the nearest candidates."""
    if not len(found['scores']):
        return dict(boxes=0.0, scores=0.0)
    if not len(candidates['scores']):
        return dict(boxes=np.inf, scores=np.inf)
    nearest = _costs(found, candidates).argmin(axis=1)
    boxes = _box_costs(found['boxes'], candidates['boxes'])
    scores = np.abs(found['scores'] - candidates['scores'][nearest])
    wrong = found['labels'] != candidates['labels'][nearest]
    return dict(
        boxes=np.inf if wrong.any() else boxes[np.arange(len(boxes)), nearest].max(),
        scores=scores.max(),
    )


def _count_wrong(
    graph: DetectorGraph,
    found: Mapping[str, np.ndarray],
    candidates: Mapping[str, np.ndarray],
    full: bool,
) -> int:
    """Count where a list is not what suppression leaves of the candidates.

    That is the one list in which no box overlaps a better one, and to which every box
    that is missing has a better one that it overlaps: "better" and "overlaps" as far as
    rounding lets tell. Candidates after the end of a full list do not count.
    """
    scores, boxes = found['scores'], torch.from_numpy(found['boxes'])
    same = found['labels'][:, None] == found['labels'][None]
    overlap = box_iou(boxes, boxes).numpy()
    twice = (overlap > graph.iou_threshold + OVERLAP) & (same | graph.class_agnostic)
    np.fill_diagonal(twice, False)
    end = scores.min() if full else graph.score_thr
    wanted = candidates['scores'] > end + TOLERANCE
    candidates = {name: values[wanted] for name, values in candidates.items()}
    same = found['labels'][:, None] == candidates['labels'][None]
    overlap = box_iou(boxes, torch.from_numpy(candidates['boxes'])).numpy()
    better = scores[:, None] >= candidates['scores'][None] - TOLERANCE
    suppressed = (
        (overlap >= graph.iou_threshold - OVERLAP)
        & (same | graph.class_agnostic)
        & better
    )
    there = _costs(found, candidates) <= TOLERANCE
    missing = ~(suppressed | there).any(axis=0)
    return int(twice.sum()) // 2 + int(missing.sum())


def _merge_checks(
    checks: Sequence[tuple[tuple[int, int, int], dict[str, float]]],
) -> tuple[tuple[tuple[int, int, int], dict[str, float]], ...]:
    """Put the checks of one shape together, the largest difference of each output."""
    merged = {}
    for shape, result in checks:
        before = merged.get(shape, result)
        merged[shape] = {name: max(before[name], result[name]) for name in result}
    return tuple(merged.items())


def _spell(result: Mapping[str, float]) -> str:
    return ', '.join(f'{name} {value:.1e}' for name, value in result.items())


def _time_both(
    first: Callable[[], object], second: Callable[[], object]
) -> tuple[float, float]:
    """Return the median seconds of two calls that take turns."""
    times = ([], [])
    for _ in range(ROUNDS + 1):
        for call, taken in zip((first, second), times):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    # The first call of each is to warm up.
    return tuple(statistics.median(taken[1:]) for taken in times)
