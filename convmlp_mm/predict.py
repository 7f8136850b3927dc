"""Predict images with the inferencers of the toolkits.

What they lack for that: results keep the names of the images, files are in formats that
others read, and an image that is cut off is refused.
"""

import os
import os.path as osp
import sys
from itertools import chain, count
from pathlib import Path

import mmcv
import numpy as np
import torch
from mmengine.infer import BaseInferencer
from mmengine.structures import BaseDataElement
from PIL import Image, ImageDraw, ImageFont, ImageOps

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm')
# COCO numbers its 80 classes from 1 to 90 and leaves these out.
UNUSED_COCO_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)


def list_images(path: str | os.PathLike, out: str | None = None) -> list[str]:
    """List an image, or the files in a folder that are called like images, sorted.

    Folders in the folder are searched too, linked ones once. Hidden images, which
    editors and systems leave, and those in ``out`` are left out, counted and said.
    :func:`read_image` may refuse some files.

    Raises:
        FileNotFoundError: If there is no such file or folder, or no image in it.
    """
    path = osp.expanduser(path)
    if not osp.exists(path):
        raise FileNotFoundError(f'image or folder {path!r} does not exist')
    if not osp.isdir(path):
        return [path]
    found, left_out, seen, own = [], 0, set(), out and osp.realpath(out)
    for folder, folders, names in os.walk(path, followlinks=True):
        real, parts = osp.realpath(folder), osp.relpath(folder, path).split(os.sep)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        images = [n for n in names if osp.splitext(n)[1].lower() in EXTENSIONS]
        hidden = any(p[:1] == '.' != p for p in parts)
        hidden = hidden or own and Path(real).is_relative_to(own)
        kept = [n for n in images if not hidden and n[0] != '.']
        found += [osp.join(folder, n) for n in kept]
        left_out += len(images) - len(kept)
    if left_out:
        text = 'are hidden or of an earlier run, and left out'
        print(f'{left_out} images in {path} {text}', file=sys.stderr)
    if not found:
        types = ', '.join(EXTENSIONS)
        raise FileNotFoundError(f'folder {path!r} has no images ({types})')
    return sorted(found)


def read_image(path: str) -> np.ndarray:
    """Read an image as the toolkits do: (H, W, 3), blue first, uint8.

    Raises:
        ValueError: If it cannot be read to its end.
    """
    try:
        # Opening a pipe would wait for somebody who writes.
        if osp.exists(path) and not osp.isfile(path):
            raise OSError('it is a pipe, socket or device')
        # OpenCV, with which the toolkits read, pads what is missing in grey.
        with Image.open(path) as image:
            image.load()
        pixels = mmcv.imread(path)
        if pixels is None:
            raise OSError('OpenCV does not know its format')
    except Exception as error:  # Pillow raises what it likes for broken files.
        raise ValueError(f'image {path!r} cannot be read: {error}') from error
    return pixels


class Predictor:
    """Predict images, draw them, and collect the content of ``results.json``.

    Subclasses, one for each toolkit, draw predictions and describe them. Detections
    with scores below ``score_thr`` are neither drawn nor kept.
    """

    # The list of predictions in the file.
    key = 'predictions'

    def __init__(self, inferencer: BaseInferencer, score_thr: float) -> None:
        self.inferencer, self.score_thr = inferencer, score_thr
        self.classes = list(inferencer.model.dataset_meta.get('classes') or ())
        self.images, self.predictions, self.skipped = [], [], []
        # The numbers of the classes in the file.
        self.ids = list(range(len(self.classes)))

    def predict(self, path: str) -> BaseDataElement:
        """Predict an image, which is read as the test pipeline says.

        Raises:
            ValueError: If there are numbers in the prediction that are not finite.
        """
        (data,) = self.inferencer.preprocess([path])
        # That of mmdet has the inputs before it.
        data = data if isinstance(data, dict) else data[1]
        (sample,) = self.inferencer.forward(data)
        # Visualizers fail at such numbers.
        if not is_finite(sample):
            raise ValueError('the prediction has numbers that are not finite')
        return sample

    def add(
        self, name: str, size: tuple[int, int], sample: BaseDataElement, stem: str
    ) -> None:
        """Add the prediction of an image to the results.

        ``name`` is that of the image in the folder, ``size`` its height and width in
        pixels, and ``stem`` the name without ending of what is written of it.
        """
        number, picture = len(self.images) + 1, f'vis/{stem}.jpg'
        image = dict(id=number, file_name=name, picture=picture)
        self.images.append(dict(image, height=size[0], width=size[1]))
        for record in self.describe(sample, stem):
            self.predictions.append(dict(image_id=number, **record))

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

    def draw(self, pixels: np.ndarray, sample: BaseDataElement) -> np.ndarray:
        """Draw a prediction on its image, both (H, W, 3), RGB, uint8."""
        raise NotImplementedError

    def describe(self, sample: BaseDataElement, stem: str) -> list[dict]:
        """Return the records of one image for the file."""
        raise NotImplementedError


class ClassificationPredictor(Predictor):
    """The five most probable classes of each image."""

    def draw(self, pixels, sample):
        if self.inferencer.visualizer is None:
            # The inferencer itself builds it only where it draws.
            from mmpretrain.visualization import UniversalVisualizer

            self.inferencer.visualizer = UniversalVisualizer()
        # The short side becomes this long, so that text fits on the image.
        settings = dict(classes=self.classes, resize=320, draw_gt=False)
        return self.inferencer.visualizer.visualize_cls(pixels, sample, **settings)

    def describe(self, sample, stem):
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

    def __init__(self, inferencer, score_thr):
        from mmdet.datasets import CocoDataset

        super().__init__(inferencer, score_thr)
        self.ids = list(range(1, len(self.classes) + 1))
        if tuple(self.classes) == tuple(CocoDataset.METAINFO['classes']):
            self.ids = [i for i in range(1, 91) if i not in UNUSED_COCO_IDS]

    def draw(self, pixels, sample):
        settings = dict(return_vis=True, pred_score_thr=self.score_thr)
        return self.inferencer.visualize([pixels], [sample], **settings)[0]

    def describe(self, sample, stem):
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
                counts = masks[i]['counts'].decode()
                record['segmentation'] = dict(masks[i], counts=counts)
                record['area'] = int(found.masks[i].sum())
            records.append(record)
        return records


class SegmentationPredictor(Predictor):
    """The pixels of each class; the label maps are files of their own."""

    def draw(self, pixels, sample):
        # To find places for its labels, mmseg would need seconds and gigabytes.
        settings = dict(return_vis=True, opacity=0.6, with_labels=False)
        (drawn,) = self.inferencer.visualize([pixels], [sample], **settings)
        labels, counts = np.unique(labels_of(sample), return_counts=True)
        labels = labels[np.argsort(-counts, kind='stable')]
        palette = self.inferencer.visualizer.dataset_meta['palette']
        names = [self.classes[label] for label in labels]
        return add_legend(drawn, names, [palette[label] for label in labels])

    def describe(self, sample, stem):
        labels, counts = np.unique(labels_of(sample), return_counts=True)
        pixels = {self.classes[i]: n for i, n in zip(labels, counts.tolist())}
        return [dict(label_map=f'label_maps/{stem}.png', pixels=pixels)]


def labels_of(sample: BaseDataElement) -> np.ndarray:
    """Return the classes of the pixels, (H, W), that a segmentor has predicted."""
    return sample.pred_sem_seg.data[0].cpu().numpy()


def is_finite(value: object) -> bool:
    """Tell whether all numbers of a prediction, or of a part of it, are finite."""
    if isinstance(value, BaseDataElement):
        return all(map(is_finite, value.all_values()))
    return not isinstance(value, torch.Tensor) or bool(value.isfinite().all())


def add_legend(
    drawn: np.ndarray, names: list[str], colours: list[tuple[int, int, int]]
) -> np.ndarray:
    """Put names and colours (RGB) to the right of an image, (H, W, 3), uint8.

    Those that do not fit into its height are left out.
    """
    height, left = drawn.shape[:2]
    size = int(np.clip(height / 30, 11, 24))
    font = ImageFont.load_default(size)
    width = 3 * size + int(max(map(font.getlength, names)))
    image = ImageOps.expand(Image.fromarray(drawn), (0, 0, width, 0), 'white')
    draw = ImageDraw.Draw(image)
    for i, (name, colour) in enumerate(zip(names, colours)):
        x, y = left + size // 2, i * 3 * size // 2
        draw.rectangle((x, y, x + size, y + size), tuple(colour))
        draw.text((x + 3 * size // 2, y + size // 2), name, 'black', font, anchor='lm')
    return np.array(image)


def name_outputs(images: list[str], root: str) -> dict[str, str]:
    """Choose names without ending for what is written of each image, by its path.

    That is its path below ``root`` without ending, or with the ending if another image
    has this name, and with a number where that does not suffice. No two differ in the
    case of letters only, which some disks ignore.
    """
    chosen, taken = {}, set()
    for path in images:
        name = osp.relpath(path, root)
        numbered = (f'{name}-{number}' for number in count(2))
        stems = chain((osp.splitext(name)[0], name), numbered)
        chosen[path] = next(s for s in stems if s.casefold() not in taken)
        taken.add(chosen[path].casefold())
    return chosen
