#!/usr/bin/env python
"""Make a small data set of drawn shapes for mmdet, mmseg and mmpretrain.

The same arguments give the same bytes with the same versions of NumPy and OpenCV, and
a larger data set begins with the images of a smaller one:

    OUT/dataset.json                  arguments and class names
    OUT/coco/{train2017,val2017}/, OUT/coco/annotations/
    OUT/ade/ADEChallengeData2016/{images,annotations}/{training,validation}/
    OUT/imagenet/{train,val}/<class>/

COCO's and ADE20K's layouts hold the same images, class folders a tenth as many each. In
label maps 0 is unlabelled (the lines), and the classes start at 1.
"""

import argparse
import json
import math
import os
import tempfile
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as mask_utils

# This number is raised when the same arguments give other images than before.
FORMAT = 2
# Default and smallest value.
OPTIONS = dict(train=(400, 1), val=(100, 1), size=(160, 64), seed=(0, 0))
# The names that COCO and ADE20K have for them.
SPLITS = {'train': 'training', 'val': 'validation'}


def spokes(count: int) -> np.ndarray:
    """Corners on a circle of diameter 1, (N, 2)."""
    angles = np.arange(count) * 2 * math.pi / count
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) / 2


CROSS = np.array([(3, -1), (3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1)]) / 6
# Contours, (N, 2) x and y; a second one is a hole.
OBJECTS = {
    'circle': [spokes(72)],
    'square': [np.array([(1, 1), (1, -1), (-1, -1), (-1, 1)]) * 0.35],
    'triangle': [spokes(3)],
    'star': [spokes(10) * np.tile([[1], [0.43]], (5, 1))],
    'ring': [spokes(72), spokes(72) * 0.56],
    'cross': [np.concatenate([CROSS, -CROSS])],
}
CLASSES = [*OBJECTS, 'plain', 'patterned']


def noise(rng, h: int, w: int) -> np.ndarray:
    """Smooth noise from 0 to 1, (H, W, 1)."""
    grid = rng.random((8, 8))
    return cv2.resize(grid, (w, h), interpolation=cv2.INTER_CUBIC)[..., None]


def draw_background(rng, h: int, w: int) -> tuple[np.ndarray, np.ndarray]:
    """A texture with lines: (H, W, 3) float32 from 0 to 1, and (H, W) uint8 labels."""
    field, patterned = noise(rng, h, w), rng.integers(2)
    if patterned:
        y, x = np.mgrid[:h, :w, :1][:2] * rng.uniform(40, 80) / max(h, w)
        angle = rng.uniform(0, 2 * math.pi)
        field = np.sin(x * math.cos(angle) + y * math.sin(angle) + 2 * field) / 2
    # The colours are dull, those of the objects vivid.
    image = field / 4 + rng.uniform(0.2, 0.6) * rng.uniform(0.65, 1, 3)
    image, labels = np.float32(image), np.full((h, w), 7 + patterned, np.uint8)
    # Lines are there to be told from objects.
    for ends in rng.integers(0, min(h, w), (rng.integers(4), 2, 2)).tolist():
        cv2.line(image, *ends, rng.uniform(0, 0.9, 3).tolist(), thickness=2)
        cv2.line(labels, *ends, 0, thickness=2)
    return image, labels


def draw_object(rng, label: int, h: int, w: int, sides, roam: float):
    """The cover, (H, W, 1) from 0 to 1, and the area, with what is outside."""
    side, angle = rng.uniform(*sides) * min(h, w), rng.uniform(0, 2 * math.pi)
    cos, sin, squeeze = math.cos(angle), math.sin(angle), rng.uniform(0.8, 1)
    turn = side * np.array([[cos, sin], [-squeeze * sin, squeeze * cos]])
    centre = [w, h] * (1 + roam * rng.uniform(-0.5, 0.5, 2))
    canvas = np.zeros((2 * h, 2 * w, 1), np.uint8)
    # The points have 4 bits after the point.
    contours = OBJECTS[CLASSES[label - 1]]
    points = [np.int32((contour @ turn + centre) * 16) for contour in contours]
    cover = cv2.fillPoly(canvas, points, 255, cv2.LINE_AA, shift=4) / 255
    return cover[h // 2 :, w // 2 :][:h, :w], cover.sum()


def make_image(seed: int, split: str, index: int, size: int, portrait: int = 0):
    """Draw a scene, or one object if its label is given as ``portrait``.

    Returns the image, (H, W, 3) uint8 BGR; its labels, (H, W) uint8; and the label,
    visible pixels, (H, W) bool, and area of each object from the back to the front.
    """
    rng = np.random.default_rng((seed, list(SPLITS).index(split), index, portrait))
    h, w = rng.permutation([size, round(size * rng.uniform(0.75, 1))]).tolist()
    image, labels = draw_background(rng, h, w)
    # One label follows the number: a few images hold every class.
    chosen = [index, *rng.integers(6, size=rng.integers(1, 5)).tolist()]
    chosen = [portrait] if portrait else [1 + i % 6 for i in chosen]
    where = ((0.45, 0.75), 0.25) if portrait else ((0.14, 0.55), 0.8)
    objects = []
    for label in chosen:
        # A place that leaves less than half of any object is not taken.
        for _ in range(20):
            cover, area = draw_object(rng, label, h, w, *where)
            mask = cover[..., 0] >= 0.5
            left = [(i, m & ~mask, a) for i, m, a in objects] + [(label, mask, area)]
            if all(m.sum() >= max(16, a / 2) for _, m, a in left):
                break
        else:
            continue
        objects, labels[mask] = left, label
        # Objects have a hue of their class, as fruits do, to be learnt from few images.
        hue = (label * 60 + rng.uniform(-25, 25)) % 360
        colour = np.float32([[[hue, rng.uniform(0.6, 1), rng.uniform(0.5, 1)]]])
        colour = cv2.cvtColor(colour, cv2.COLOR_HSV2BGR) * (1 - 0.3 * noise(rng, h, w))
        shadow = 0.6 * cv2.GaussianBlur(cover, (0, 0), 0.015 * size)[..., None]
        image = image * (1 - shadow) * (1 - cover) + colour * cover
    image = image + rng.normal(0, 0.02, image.shape)
    return np.uint8(np.clip(image * 255, 0, 255)), labels, objects


def save(path: Path, image: np.ndarray) -> None:
    """Write a JPEG or PNG, by the ending of the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # cv2.imwrite would stay silent when the disk is full.
    path.write_bytes(cv2.imencode(path.suffix, image)[1].tobytes())


def write_split(root: Path, split: str, args: dict[str, int]) -> None:
    """Write one split of the three layouts."""
    coco, ade = root / 'coco', root / 'ade' / 'ADEChallengeData2016'
    images, annotations = [], []
    for index in range(1, args[split] + 1):
        image, labels, objects = make_image(args['seed'], split, index, args['size'])
        name, stem = f'{index:012d}.jpg', f'{SPLITS[split]}/ADE_{split}_{index:08d}'
        save(coco / f'{split}2017' / name, image)
        save(ade / 'images' / f'{stem}.jpg', image)
        save(ade / 'annotations' / f'{stem}.png', labels)
        h, w = labels.shape
        images.append(dict(id=index, file_name=name, height=h, width=w))
        for label, mask, _ in objects:
            rle = mask_utils.encode(np.asfortranarray(mask, np.uint8))
            box, area = mask_utils.toBbox(rle).tolist(), int(mask_utils.area(rle))
            rle['counts'] = rle['counts'].decode()
            ids = dict(id=len(annotations) + 1, image_id=index, category_id=label)
            about = dict(bbox=box, area=area, segmentation=rle, iscrowd=0)
            annotations.append(ids | about)
    categories = [dict(id=i, name=name) for i, name in enumerate(OBJECTS, 1)]
    content = dict(images=images, annotations=annotations, categories=categories)
    (coco / 'annotations').mkdir(exist_ok=True)
    path = coco / 'annotations' / f'instances_{split}2017.json'
    path.write_text(json.dumps(content))
    for label, name in enumerate(OBJECTS, 1):
        for index in range(1, math.ceil(args[split] / 10) + 1):
            image = make_image(args['seed'], split, index, args['size'], label)[0]
            save(root / 'imagenet' / split / name / f'{index:06d}.jpg', image)


def make_dataset(out: Path, args: dict[str, int]) -> None:
    """Make all of a data set or nothing, nor where the same one is there."""
    manifest = json.dumps(dict(format=FORMAT, arguments=args, classes=CLASSES))
    file = out / 'dataset.json'
    if file.is_file() and file.read_text() == manifest:
        print(f'already there: {out}')
        return
    if os.path.lexists(out):
        raise FileExistsError(f'{out} is not this data set: choose another folder')
    out.parent.mkdir(parents=True, exist_ok=True)
    # A hidden folder beside it can be renamed at once.
    with tempfile.TemporaryDirectory('.tmp', f'.{out.name}.', out.parent) as box:
        new = Path(box, 'new')
        for split in SPLITS:
            write_split(new, split, args)
        (new / 'dataset.json').write_text(manifest)
        new.rename(out)
    print(f'made: {out}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', type=os.path.expanduser, help='folder to make')
    for name, (default, low) in OPTIONS.items():
        text = f'at least {low}, default: {default}'
        parser.add_argument(f'--{name}', type=int, default=default, help=text)
    args = vars(parser.parse_args())
    out = Path(args.pop('out')).resolve()
    for name, (_, low) in OPTIONS.items():
        if args[name] < low:
            parser.error(f'--{name} must be at least {low}, but got {args[name]}')
    try:
        make_dataset(out, args)
    except OSError as error:
        parser.error(str(error))


if __name__ == '__main__':
    main()
