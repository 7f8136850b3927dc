"""Predict folders of images with the inferencers of the toolkits.

What the inferencers lack for that: an unreadable file does not end the run, results
keep the names of the images, and files are in formats that others read.
"""

from __future__ import annotations

import hashlib
import os
import os.path as osp
import unicodedata
from collections import Counter
from itertools import count
from pathlib import Path

import mmcv
import numpy as np
import torch
from mmengine.infer import BaseInferencer
from mmengine.structures import BaseDataElement
from PIL import Image, ImageDraw, ImageFont, ImageOps

__all__ = [
    'Predictor',
    'labels_of',
    'list_images',
    'name_outputs',
    'predictor_of',
    'read_image',
    'read_whole_image',
]

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm')
# COCO numbers its 80 classes from 1 to 90 and leaves these out.
UNUSED_COCO_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
# Images of classifiers are drawn with this short side, so that text fits on them.
CLASSIFIED_SIDE = 320
# The length of a file name in bytes, to which write_file and the ending add some.
MAX_NAME = 230


def list_images(path: str | os.PathLike) -> list[str]:
    """List the images that are to be predicted.

    Args:
        path: An image, or a folder, which is searched with the folders in it for files
            that are called like images.

    Returns:
        Paths, sorted. They may be no regular files, of which :func:`read_whole_image`
        tells.

    Raises:
        FileNotFoundError: If there is no such file or folder, or no image in it.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f'image or folder {str(path)!r} does not exist')
    if not path.is_dir():
        return [str(path)]
    called = (p for p in path.rglob('*') if p.suffix.lower() in EXTENSIONS)
    found = sorted(str(p) for p in called if not p.is_dir())
    if not found:
        raise FileNotFoundError(
            f'folder {str(path)!r} has no images ({", ".join(EXTENSIONS)})'
        )
    return found


def read_whole_image(path: str) -> np.ndarray:
    """Read an image as the toolkits do: (H, W, 3), blue first, uint8.

    Raises:
        OSError: If it cannot be read to its end.
    """
    # Opening a pipe would wait for somebody who writes.
    if osp.exists(path) and not osp.isfile(path):
        raise OSError('it is a pipe, socket or device')
    # OpenCV, with which the toolkits read, pads what is missing in grey.
    with Image.open(path) as image:
        image.load()
    pixels = mmcv.imread(path)
    if pixels is None:
        raise OSError(f'OpenCV cannot read {path}')
    return pixels


def read_image(path: str) -> np.ndarray:
    """Read an image as :func:`read_whole_image` does, and name it if that fails.

    Raises:
        ValueError: If it cannot be read to its end.
    """
    try:
        return read_whole_image(path)
    except Exception as error:  # Pillow raises what it likes for broken files.
        raise ValueError(f'image {path!r} cannot be read: {error}') from error


class Predictor:
    """Predict images, draw them, and collect the content of ``results.json``.

    Subclasses, one for each toolkit, draw predictions and describe them.

    Args:
        inferencer: See :func:`convmlp_mm.get_inferencer`.
        score_thr: Lowest score of the detections that are drawn and kept.
    """

    # The list of predictions in the file, and whether a batch may mix sizes.
    key, mixes_sizes = 'predictions', False

    def __init__(self, inferencer: BaseInferencer, score_thr: float) -> None:
        self.inferencer, self.score_thr = inferencer, score_thr
        self.classes = list(inferencer.model.dataset_meta.get('classes') or ())
        self.images, self.predictions, self.skipped = [], [], []
        self.ids = self.category_ids()

    def predict(
        self, images: list[str]
    ) -> list[tuple[BaseDataElement, np.ndarray | None]]:
        """Predict one batch of images, named by their paths.

        Returns:
            For each the prediction as the toolkit gives it, and a drawing of it,
            (H, W, 3), RGB, uint8; None if there are numbers in it that are not finite.
        """
        samples = []
        for data in self.inferencer.preprocess(images, batch_size=len(images)):
            samples += self.forward(data)
        # Visualizers fail at the others.
        finite = [i for i, sample in enumerate(samples) if is_finite(sample)]
        drawn = self.draw([images[i] for i in finite], [samples[i] for i in finite])
        drawn = dict(zip(finite, drawn))
        return [(sample, drawn.get(i)) for i, sample in enumerate(samples)]

    def add(
        self,
        name: str,
        size: tuple[int, int],
        sample: BaseDataElement,
        label_map: str,
        drawn: str,
    ) -> None:
        """Add the prediction of an image to the results.

        ``name`` is that of the image in the folder, ``size`` its height and width in
        pixels, ``label_map`` a segmentor's label map, and ``drawn`` the drawing.
        """
        image = dict(id=len(self.images) + 1, file_name=name, picture=drawn)
        self.images.append(dict(image, height=int(size[0]), width=int(size[1])))
        for record in self.describe(sample, label_map):
            self.predictions.append(dict(image_id=image['id'], **record))

    def content(self, **info: object) -> dict:
        """Return what ``results.json`` will hold."""
        categories = [dict(id=i, name=name) for i, name in zip(self.ids, self.classes)]
        return {
            'info': info,
            'images': self.images,
            'categories': categories,
            'skipped': self.skipped,
            self.key: self.predictions,
        }

    def category_ids(self) -> list[int]:
        """Return the numbers of the classes in the file."""
        return list(range(len(self.classes)))

    def forward(self, data: object) -> list[BaseDataElement]:
        """Predict what the inferencer has preprocessed."""
        return self.inferencer.forward(data)

    def draw(
        self, images: list[str], samples: list[BaseDataElement]
    ) -> list[np.ndarray]:
        """Draw predictions on their images."""
        raise NotImplementedError

    def describe(self, sample: BaseDataElement, label_map: str) -> list[dict]:
        """Return the records of one image for the file."""
        raise NotImplementedError


class ClassificationPredictor(Predictor):
    """The five most probable classes of each image."""

    mixes_sizes = True

    def draw(self, images, samples):
        if self.inferencer.visualizer is None:
            # The inferencer itself builds it only where it draws.
            from mmpretrain.visualization import UniversalVisualizer

            self.inferencer.visualizer = UniversalVisualizer()
        settings = dict(resize=CLASSIFIED_SIDE, draw_gt=False)
        settings['classes'] = self.inferencer.classes
        return [
            self.inferencer.visualizer.visualize_cls(
                mmcv.imread(image, channel_order='rgb'), sample, **settings
            )
            for image, sample in zip(images, samples)
        ]

    def describe(self, sample, label_map):
        best = sample.pred_score.topk(min(5, len(sample.pred_score)))
        top = []
        for score, label in zip(best.values.tolist(), best.indices.tolist()):
            top.append(dict(category_id=label, score=score))
            if label < len(self.classes):
                top[-1]['name'] = self.classes[label]
        return [dict(**top[0], top5=top)]


class DetectionPredictor(Predictor):
    """Boxes as x, y, width, height and run-length encoded masks, as COCO has them."""

    key = 'annotations'

    def category_ids(self):
        from mmdet.datasets import CocoDataset

        if tuple(self.classes) == tuple(CocoDataset.METAINFO['classes']):
            return [i for i in range(1, 91) if i not in UNUSED_COCO_IDS]
        return list(range(1, len(self.classes) + 1))

    def forward(self, data):
        return self.inferencer.forward(data[1])

    def draw(self, images, samples):
        return self.inferencer.visualize(
            images, samples, return_vis=True, pred_score_thr=self.score_thr
        )

    def describe(self, sample, label_map):
        from mmdet.structures.mask import encode_mask_results

        found = sample.pred_instances
        found = found[found.scores >= self.score_thr].cpu().numpy()
        masks = encode_mask_results(found.get('masks', []))
        records = []
        for i, (x1, y1, x2, y2) in enumerate(found.bboxes.tolist()):
            box = [x1, y1, x2 - x1, y2 - y1]
            record = dict(
                id=len(self.predictions) + i + 1,
                category_id=self.ids[int(found.labels[i])],
                bbox=[round(value, 2) for value in box],
                area=round(box[2] * box[3], 2),
                score=round(float(found.scores[i]), 5),
                iscrowd=0,
            )
            if masks:
                size = list(map(int, masks[i]['size']))
                counts = masks[i]['counts'].decode()
                record['segmentation'] = dict(size=size, counts=counts)
                record['area'] = int(found.masks[i].sum())
            records.append(record)
        return records


class SegmentationPredictor(Predictor):
    """The share of each class; the label maps are files of their own."""

    def draw(self, images, samples):
        drawn = self.inferencer.visualize(
            images, samples, return_vis=True, opacity=0.6, with_labels=False
        )
        palette = self.inferencer.visualizer.dataset_meta['palette']
        for i, sample in enumerate(samples):
            labels, counts = np.unique(labels_of(sample), return_counts=True)
            texts, colours = [], []
            for k in np.argsort(-counts, kind='stable'):
                percents = 100 * counts[k] / counts.sum()
                share = f'{percents:.1f} %' if percents >= 0.1 else '< 0.1 %'
                texts.append(f'{self.classes[labels[k]]}  {share}')
                colours.append(palette[labels[k]])
            drawn[i] = add_legend(drawn[i], texts, colours)
        return drawn

    def describe(self, sample, label_map):
        labels, counts = np.unique(labels_of(sample), return_counts=True)
        names = [self.classes[label] for label in labels]
        return [dict(label_map=label_map, pixels=dict(zip(names, counts.tolist())))]


PREDICTORS = dict(
    mmpretrain=ClassificationPredictor,
    mmdet=DetectionPredictor,
    mmseg=SegmentationPredictor,
)


def predictor_of(inferencer: BaseInferencer, score_thr: float) -> Predictor:
    """Return the :class:`Predictor` for the toolkit of an inferencer."""
    return PREDICTORS[inferencer.model.cfg.default_scope](inferencer, score_thr)


def labels_of(sample: BaseDataElement) -> np.ndarray:
    """Return the classes of the pixels, (H, W), that a segmentor has predicted."""
    return sample.pred_sem_seg.data[0].cpu().numpy()


def is_finite(value: object) -> bool:
    """Tell whether all numbers of a prediction, or of a part of it, are finite."""
    if isinstance(value, BaseDataElement):
        return all(map(is_finite, value.all_values()))
    return not isinstance(value, torch.Tensor) or bool(value.isfinite().all())


def add_legend(
    drawn: np.ndarray, texts: list[str], colours: list[tuple[int, int, int]]
) -> np.ndarray:
    """Put names and colours (RGB) to the right of an image, (H, W, 3), uint8.

    Names that do not fit into its height are counted.
    """
    height, left = drawn.shape[:2]
    size = int(np.clip(height / 30, 11, 24))
    line = round(1.5 * size)
    room = max(1, height // line)
    if len(texts) > room:
        texts = [*texts[: room - 1], f'and {len(texts) - room + 1} more']
        colours = [*colours[: room - 1], (255, 255, 255)]
    font = ImageFont.load_default(size)
    width = 2 * line + int(max(map(font.getlength, texts)))
    image = ImageOps.expand(Image.fromarray(drawn), (0, 0, width, 0), 'white')
    draw = ImageDraw.Draw(image)
    for i, (text, colour) in enumerate(zip(texts, colours)):
        x, y = left + size // 2, i * line + (line - size) // 2
        draw.rectangle((x, y, x + size, y + size), tuple(colour))
        draw.text((x + line, y + size // 2), text, 'black', font, anchor='lm')
    return np.array(image)


def name_outputs(images: list[str], root: str) -> dict[str, str]:
    """Choose names without ending for what is written of each image.

    Args:
        images: Their paths.
        root: The folder that they lie in; folders below it stay.

    Returns:
        By path. Images that differ in the ending only keep it, and a number follows
        where that does not suffice. No two differ in the case of letters only, which
        some disks ignore; long ones are cut.
    """
    names = {path: osp.relpath(path, root) for path in images}
    stems = {path: osp.splitext(name)[0] for path, name in names.items()}
    alike = Counter(map(_folded, stems.values()))
    # Names that no file may have: those of folders, and of other files.
    taken = {_folded(p) for name in names.values() for p in Path(name).parents}
    chosen = {}
    for path, name in names.items():
        candidate = _cut(stems[path] if alike[_folded(stems[path])] == 1 else name)
        numbers = count(2)
        while taken & {_folded(candidate + end) for end in ('.jpg', '.png')}:
            candidate = _cut(f'{name}-{next(numbers)}')
        taken |= {_folded(candidate + end) for end in ('.jpg', '.png')}
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
