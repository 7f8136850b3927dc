"""Predict folders of images with the inferencers of the toolkits.

What the inferencers lack for that: an unreadable file does not end the run,
results keep the names of the images, and files are in formats that others read.
"""

from __future__ import annotations

import hashlib
import os
import os.path as osp
import unicodedata
from collections import Counter
from collections.abc import Iterator
from itertools import chain, compress, count
from pathlib import Path
from typing import TYPE_CHECKING

import mmcv
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .results import labels_of

if TYPE_CHECKING:
    from mmengine.infer import BaseInferencer
    from mmengine.structures import BaseDataElement

__all__ = [
    'list_images',
    'name_outputs',
    'predict',
    'read_whole_image',
]

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm')
# Pictures of classifiers are enlarged to this short side, so that text fits on them.
CLASSIFIED_SIDE = 320
# Bytes of a file name, without what write_file and the ending add to it.
MAX_NAME = 230


def list_images(path: str | os.PathLike) -> list[str]:
    """List the images that are to be predicted.

    Args:
        path (str | PathLike): An image, or a folder, which is searched with
            the folders in it for files that are called like images.

    Returns:
        list[str]: Paths, sorted. They may be no regular files, of which
        :func:`read_whole_image` tells.

    Raises:
        FileNotFoundError: If there is no such file or folder, or no image in
            the folder.
    """
    path = Path(path).expanduser()
    if path.exists() and not path.is_dir():
        return [str(path)]
    if not path.is_dir():
        raise FileNotFoundError(f'image or folder {str(path)!r} does not exist')
    found = [p for p in path.rglob('*') if p.suffix.lower() in EXTENSIONS]
    found = [p for p in found if not p.is_dir()]
    if not found:
        raise FileNotFoundError(
            f'folder {str(path)!r} has no images ({", ".join(EXTENSIONS)})'
        )
    return sorted(str(p) for p in found)


def read_whole_image(path: str) -> np.ndarray:
    """Read an image as the toolkits do, if it can be read to its end.

    Args:
        path (str): The image.

    Returns:
        np.ndarray: (H, W, 3), blue first, uint8.

    Raises:
        OSError: If it cannot.
    """
    # To open a pipe would wait for somebody who writes.
    if osp.exists(path) and not osp.isfile(path):
        raise OSError('it is a pipe, socket or device')
    # OpenCV, with which the toolkits read, pads what is missing in grey.
    with Image.open(path) as image:
        image.load()
    pixels = mmcv.imread(path)
    if pixels is None:
        raise OSError(f'OpenCV cannot read {path}')
    return pixels


def predict(
    inferencer: BaseInferencer, images: list[str], score_thr: float
) -> Iterator[tuple[BaseDataElement, np.ndarray]]:
    """Predict one batch of images.

    Args:
        inferencer (BaseInferencer): See :func:`convmlp_mm.get_inferencer`.
        images (list[str]): Their paths.
        score_thr (float): Lowest score of the detections that are drawn.

    Yields:
        tuple[BaseDataElement, np.ndarray]: The prediction as the toolkit
        gives it, and a picture of it, (H, W, 3), RGB, uint8; or None, if there are
        numbers in it that are not finite.
    """
    scope = inferencer.model.cfg.default_scope
    samples = []
    for data in inferencer.preprocess(images, batch_size=len(images)):
        samples += inferencer.forward(data[1] if scope == 'mmdet' else data)
    every, finite = samples, list(map(is_finite, samples))
    # No visualizer draws the others.
    images, samples = (list(compress(x, finite)) for x in (images, samples))
    if scope == 'mmpretrain':
        if inferencer.visualizer is None:
            # As the inferencer itself does where it draws.
            from mmpretrain.visualization import UniversalVisualizer

            inferencer.visualizer = UniversalVisualizer()
        pictures = [
            inferencer.visualizer.visualize_cls(
                mmcv.imread(image, channel_order='rgb'),
                sample,
                classes=inferencer.classes,
                resize=CLASSIFIED_SIDE,
                draw_gt=False,
            )
            for image, sample in zip(images, samples)
        ]
    elif scope == 'mmdet':
        pictures = inferencer.visualize(
            images, samples, return_vis=True, pred_score_thr=score_thr
        )
    else:
        pictures = inferencer.visualize(
            images, samples, return_vis=True, opacity=0.6, with_labels=False
        )
        pictures = [
            add_legend(picture, *legend_of(inferencer, sample))
            for picture, sample in zip(pictures, samples)
        ]
    pictures = iter(pictures)
    for sample, drawn in zip(every, finite):
        yield sample, next(pictures) if drawn else None


def is_finite(sample: BaseDataElement) -> bool:
    """Tell whether all numbers of a prediction are finite.

    Args:
        sample (BaseDataElement): As a toolkit gives it.
    """
    for value in sample.all_values():
        if isinstance(value, torch.Tensor):
            finite = bool(value.isfinite().all())
        else:
            finite = not hasattr(value, 'all_values') or is_finite(value)
        if not finite:
            return False
    return True


def legend_of(
    inferencer: BaseInferencer, sample: BaseDataElement
) -> tuple[list[str], list[tuple[int, int, int]]]:
    """Name what a label map shows, with its share, the largest first."""
    meta = inferencer.visualizer.dataset_meta
    labels, counts = np.unique(labels_of(sample), return_counts=True)
    order = np.argsort(-counts, kind='stable')
    shares = counts / counts.sum()
    percents = [f'{100 * s:.1f} %' if s >= 0.001 else '< 0.1 %' for s in shares]
    texts = [f'{meta["classes"][labels[i]]}  {percents[i]}' for i in order]
    return texts, [tuple(meta['palette'][labels[i]]) for i in order]


def add_legend(
    picture: np.ndarray, texts: list[str], colours: list[tuple[int, int, int]]
) -> np.ndarray:
    """Put names and colours to the right of a picture.

    Args:
        picture (np.ndarray): (H, W, 3), RGB, uint8.
        texts (list[str]): What to write; what does not fit is counted.
        colours (list[tuple]): RGB.

    Returns:
        np.ndarray: (H, W + legend, 3).
    """
    height = len(picture)
    size = int(np.clip(height / 30, 11, 24))
    line = round(1.5 * size)
    room = max(1, height // line)
    if len(texts) > room:
        texts = [*texts[: room - 1], f'and {len(texts) - room + 1} more']
        colours = [*colours[: room - 1], (255, 255, 255)]
    font = ImageFont.load_default(size)
    width = 2 * line + int(max(font.getlength(text) for text in texts))
    panel = Image.new('RGB', (width, height), 'white')
    draw = ImageDraw.Draw(panel)
    for i, (text, colour) in enumerate(zip(texts, colours)):
        top = i * line + (line - size) // 2
        draw.rectangle((size // 2, top, size // 2 + size, top + size), fill=colour)
        draw.text((2 * size, i * line + line // 2), text, 'black', font, anchor='lm')
    return np.concatenate([picture, np.asarray(panel)], axis=1)


def name_outputs(images: list[str], root: str) -> dict[str, str]:
    """Choose names without ending for what is written of each image.

    Args:
        images (list[str]): Their paths.
        root (str): The folder that they lie in; folders below it stay.

    Returns:
        dict[str, str]: By path. Images that differ in the ending only keep it, and a
        number follows where that does not suffice. No two differ in the case of
        letters only, which some disks ignore; long ones are cut.
    """
    names = {path: osp.relpath(path, root) for path in images}
    counts = Counter(_folded(osp.splitext(name)[0]) for name in names.values())
    folders = {_folded(p) for name in names.values() for p in Path(name).parents}
    chosen, taken = {}, set()
    for path, name in names.items():
        stem = osp.splitext(name)[0]
        firsts = [stem] if counts[_folded(stem)] == 1 else []
        numbered = (f'{name}-{number}' for number in count(2))
        for candidate in chain(firsts, [name], numbered):
            candidate = _cut(candidate)
            key = _folded(candidate)
            files = {f'{key}.jpg', f'{key}.png'}
            if key not in taken and not files & folders:
                break
        taken.add(key)
        chosen[path] = candidate
    return chosen


def _folded(name: object) -> str:
    return unicodedata.normalize('NFC', str(name)).casefold()


def _cut(path: str) -> str:
    """Shorten the last part of a path, with a hash of it."""
    folder, part = osp.split(path)
    content = os.fsencode(part)
    if len(content) <= MAX_NAME:
        return path
    digest = hashlib.sha256(content).hexdigest()[:8]
    part = content[: MAX_NAME - 20].decode(errors='ignore')
    return osp.join(folder, f'{part}-{digest}')
