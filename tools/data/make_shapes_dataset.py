"""Make a small data set of drawn shapes for mmdet, mmseg and mmpretrain.

Nothing is downloaded: all is drawn from the seed, and the same arguments give the
same bytes (with the same versions of NumPy and OpenCV). A picture depends on the
seed, the size, its split and its number only, so a larger data set begins with the
pictures of a smaller one. Three layouts are made in one go::

    OUT/dataset.json                  arguments, class names and counts
    OUT/coco/{train2017,val2017}/000000000001.jpg
    OUT/coco/annotations/instances_{train,val}2017.json
    OUT/ade/ADEChallengeData2016/{images,annotations}/{training,validation}/
    OUT/imagenet/{train,val}/<class>/000001.jpg

The first two hold the same pictures. Label maps count like those of ADE20K: 0 is
unlabelled (the seam between two backgrounds), and the classes start at 1.

Example:
    python tools/data/make_shapes_dataset.py data/shapes --train 400 --val 100
"""

import argparse
import json
import math
import os
import os.path as osp
import shutil
import signal
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import cv2
import numpy as np
from numpy.random import Generator
from pycocotools import mask as mask_utils

TOOL = 'make_shapes_dataset'
FORMAT = 1  # to be raised when the same arguments give other pictures than before
ENTRIES = {'dataset.json', 'coco', 'ade', 'imagenet'}  # all that OUT holds
OPTIONS = {  # default, smallest and largest value, meaning
    'train': (400, 1, 99999, 'pictures to train on'),
    'val': (100, 1, 99999, 'pictures to validate on'),
    'size': (160, 64, 2048, 'longer side of a picture in pixels'),
    'seed': (0, 0, 2**32 - 1, 'start of all random numbers'),
    'classification_per_class': (40, 1, 99999, 'to train on; a quarter to validate'),
}
SPLITS = {'train': 'training', 'val': 'validation'}  # as COCO and as ADE20K say it

OBJECTS = ('circle', 'square', 'triangle', 'star', 'ring', 'cross')
BACKGROUNDS = ('plain', 'patterned')
TEXTURES = {
    'plain': ('clouds', 'slope', 'sand'),
    'patterned': ('stripes', 'wood', 'checks'),
}
SIDES = (0.14, 0.55)  # longer side of an object, in shorter sides of its picture
MIN_VISIBLE = 0.5  # share of an object that the frame and later objects leave
MIN_PIXELS = 16  # what they leave at least
# As fruits have, objects have a hue of their class, where it stands out from what is
# around: with colour and shape to go by, a small set is enough to learn from.
HUES = {name: 360 * i / len(OBJECTS) for i, name in enumerate(OBJECTS)}
HUE_SPREAD = 25.0  # degrees to either side
MIN_CONTRAST = 45.0  # CIELAB distance of an object to all that is around it
CROWD_EVERY, CROWD_AT = 8, 4  # pictures 4, 12, 20, ... hold a crowd
SCALE = 4  # outlines are drawn this much larger, then averaged down


@dataclass
class Layer:
    """One thing to draw: an object, or a crowd of tiny ones.

    Attributes:
        category: Index into ``OBJECTS``.
        cover: (H, W) float32, the share of each pixel that the thing covers.
        area: All of it in pixels, also what is hidden or outside of the picture.
        crowd: Whether it is a crowd.
    """

    category: int
    cover: np.ndarray
    area: float
    crowd: bool = False


# --------------------------------------------------------- textures and colours


def noise(rng: Generator, h: int, w: int, cells: int) -> np.ndarray:
    """Smooth noise in four octaves, (H, W) float32, about -1 to 1."""
    total = np.zeros((h, w), np.float32)
    for octave in range(4):
        grid = rng.random([cells * 2**octave] * 2, np.float32) * 2 - 1
        total += cv2.resize(grid, (w, h), interpolation=cv2.INTER_CUBIC) / 2**octave
    return total


def ramps(rng: Generator, h: int, w: int) -> tuple[np.ndarray, np.ndarray]:
    """Two (H, W) coordinates at right angles, turned at random; longer side = 1."""
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[:h, :w].astype(np.float32) / max(h, w) - 0.5
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return x * cos + y * sin, y * cos - x * sin


def texture(rng: Generator, background: str, h: int, w: int) -> np.ndarray:
    """A random texture of one of ``BACKGROUNDS``, (H, W) float32 from 0 to 1."""
    name = str(rng.choice(TEXTURES[background]))
    along, across = ramps(rng, h, w)
    waves = np.float32(2 * math.pi * rng.uniform(6, 12))
    if name == 'clouds':
        field = 0.9 * noise(rng, h, w, 4)
    elif name == 'slope':
        field = 1.6 * along + 0.2 * noise(rng, h, w, 6)
    elif name == 'sand':
        grains = cv2.GaussianBlur(rng.standard_normal((h, w), np.float32), (0, 0), 0.8)
        field = grains + 0.4 * noise(rng, h, w, 3)
    elif name == 'stripes':
        field = np.tanh(np.float32(rng.uniform(1, 4)) * np.sin(waves * along))
    elif name == 'wood':
        field = np.sin(waves * (along + 0.06 * noise(rng, h, w, 2)))
    else:
        field = np.tanh(5 * np.sin(waves / 2 * along) * np.sin(waves / 2 * across))
    return np.clip(0.5 + 0.5 * field, 0, 1)


def convert(colours: Any, code: int) -> np.ndarray:
    """(N, 3) colours to another space of OpenCV; BGR and HSV from 0 to 1, but H."""
    return cv2.cvtColor(np.float32(colours)[None], code)[0]


def pick_colour(rng: Generator, name: str, around: np.ndarray) -> np.ndarray:
    """A vivid colour that stands out from the (N, 3) colours around it.

    Args:
        rng: Source of random numbers.
        name: Class of the object to be coloured.
        around: (N, 3) float32 BGR, the colours to stand out from.

    Returns:
        (3,) float32 BGR: the first of 128 that is ``MIN_CONTRAST`` away from them
        all, or the one that is farthest if there is none.
    """
    # Contrast goes before the hue of the class: the second half is of any hue.
    some = rng.uniform([-1, 0.5, 0.35], [1, 1, 1], (128, 3))
    some[:, 0] = (HUES[name] + some[:, 0] * np.repeat([HUE_SPREAD, 180], 64)) % 360
    some = convert(some, cv2.COLOR_HSV2BGR)
    # Distance in CIELAB is contrast as the eye has it.
    apart = convert(some, cv2.COLOR_BGR2LAB)[:, None]
    apart = apart - convert(around, cv2.COLOR_BGR2LAB)
    apart = np.linalg.norm(apart, axis=-1).min(axis=1)
    enough = apart >= MIN_CONTRAST
    return some[enough.argmax() if enough.any() else apart.argmax()]


# --------------------------------------------------------------------- geometry


def outline(rng: Generator, name: str) -> list[np.ndarray]:
    """A shape of random proportions, turned at random.

    Args:
        rng: Source of random numbers.
        name: One of ``OBJECTS``.

    Returns:
        Closed contours, (N, 2) x and y, of which a second one is a hole. The box
        around them is centred on 0, and its longer side is 1.
    """

    def spokes(count: int, radius: Any = 1.0) -> np.ndarray:
        angles = np.arange(count) * 2 * math.pi / count
        return np.stack([np.cos(angles), np.sin(angles)], 1) * radius

    if name == 'star':
        contours = [spokes(10, np.tile([[1], [rng.uniform(0.38, 0.48)]], (5, 1)))]
    elif name == 'ring':
        contours = [spokes(72), spokes(72, rng.uniform(0.5, 0.62))]
    elif name == 'cross':
        a = rng.uniform(0.28, 0.38)
        half = np.array([[1, -a], [1, a], [a, a], [a, 1], [-a, 1], [-a, a]])
        contours = [np.concatenate([half, -half])]
    else:
        contours = [spokes({'circle': 72, 'square': 4, 'triangle': 3}[name])]
    # The square stands on a corner: its sides are squeezed, not its corners.
    start = math.pi / 4 if name == 'square' else 0.0
    for angle, squeeze in ((start, rng.uniform(0.8, 1)), (rng.uniform(0, 7), 1.0)):
        cos, sin = math.cos(angle), math.sin(angle)
        contours = [c @ [[cos, sin], [-sin, cos]] * [1, squeeze] for c in contours]
    low, high = contours[0].min(axis=0), contours[0].max(axis=0)
    return [(c - (low + high) / 2) / (high - low).max() for c in contours]


def draw(contours: Sequence[np.ndarray], h: int, w: int) -> np.ndarray:
    """Contours in pixels, where pixel 0 spans 0 to 1 -> (H, W) float32 cover."""
    bits = 4  # after the point in the whole numbers that OpenCV takes
    points = [np.int32(np.round((c * SCALE - 0.5) * 2**bits)) for c in contours]
    large = np.zeros((h * SCALE, w * SCALE), np.uint8)
    cv2.fillPoly(large, points, 255, shift=bits)  # a contour in another is a hole
    return cv2.resize(large, (w, h), interpolation=cv2.INTER_AREA) / np.float32(255)


def make_object(
    rng: Generator,
    category: int,
    h: int,
    w: int,
    sides: tuple[float, float] = SIDES,
    roam: float = 0.8,
) -> Layer:
    """An object of random size and place.

    Args:
        rng: Source of random numbers.
        category: Index into ``OBJECTS``.
        h: Height of the picture in pixels.
        w: Width of the picture in pixels.
        sides: Range of its longer side, in shorter sides of the picture.
            Default: ``SIDES``.
        roam: Middle part of the picture in which its centre lies, as a share of
            each side. Default: 0.8.
    """
    side = rng.uniform(*sides) * min(h, w)
    centre = [w, h] * (0.5 + roam * rng.uniform(-0.5, 0.5, 2))
    contours = [c * side + centre for c in outline(rng, OBJECTS[category])]
    areas = [cv2.contourArea(np.float32(c)) for c in contours]
    return Layer(category, draw(contours, h, w), areas[0] - sum(areas[1:]))


def make_crowd(rng: Generator, category: int, h: int, w: int) -> Layer:
    """A heap of tiny objects of one class that do not touch each other."""
    pitch = max(7.0, 0.075 * min(h, w))
    rows = range(-2, 3)
    spots = np.array([(x + y % 2 / 2, 0.87 * y) for y in rows for x in rows])
    spots = spots[np.linalg.norm(spots, axis=1) < rng.uniform(1.8, 2.6)]
    spots = pitch * (spots + rng.uniform(-0.05, 0.05, spots.shape))
    contours = []
    for spot in spots + rng.uniform(2.6 * pitch, np.array([w, h]) - 2.6 * pitch):
        side = rng.uniform(0.55, 0.75) * pitch
        contours += [c * side + spot for c in outline(rng, OBJECTS[category])]
    cover = draw(contours, h, w)
    return Layer(category, cover, float(cover.sum()), crowd=True)


def visible_masks(layers: Sequence[Layer]) -> list[np.ndarray]:
    """The pixels of each layer that no later one covers, (H, W) bool each."""
    masks, hidden = [], np.zeros((), bool)
    for layer in reversed(layers):
        own = layer.cover >= 0.5
        masks.append(own & ~hidden)
        hidden = hidden | own
    return masks[::-1]


def arrange(rng: Generator, index: int, h: int, w: int) -> list[Layer]:
    """Place two to five objects, and a crowd in some pictures.

    A place that leaves too little of any object is not taken, so that whatever is
    in the picture is annotated. One class follows the number of the picture: a few
    pictures hold every class.
    """
    categories = rng.integers(len(OBJECTS), size=rng.integers(2, 6)).tolist()
    categories[0] = index % len(OBJECTS)
    rng.shuffle(categories)
    layers: list[Layer] = []
    if index % CROWD_EVERY == CROWD_AT:
        layers.append(make_crowd(rng, int(rng.integers(len(OBJECTS))), h, w))
    for category in categories:
        for _ in range(20):
            tried = [*layers, make_object(rng, category, h, w)]
            left = [mask.sum() for mask in visible_masks(tried)]
            least = [max(MIN_PIXELS, MIN_VISIBLE * layer.area) for layer in tried]
            if all(np.greater_equal(left, least)):
                layers = tried
                break
    return layers


# --------------------------------------------------------------------- pictures


def make_background(rng: Generator, h: int, w: int) -> tuple[np.ndarray, ...]:
    """One texture, or two that meet along a wavy seam.

    Returns:
        The picture, (H, W, 3) float32 from 0 to 1; its labels, (H, W) uint8, 0 on
        the seam; and the (2, 3) or (4, 3) colours in it.
    """
    seam = ramps(rng, h, w)[0] + 0.1 * noise(rng, h, w, 2) + rng.uniform(-0.2, 0.2)
    sides = (seam, -seam) if rng.random() < 0.5 else (np.ones_like(seam),)
    picture, labels, colours = np.zeros((h, w, 3)), np.zeros((h, w), np.uint8), []
    for kind, side in zip(rng.permutation(len(BACKGROUNDS)), sides, strict=False):
        share = np.clip(side * max(h, w) / 2 + 0.5, 0, 1)  # blends over two pixels
        dim, hue = rng.uniform(0.2, 0.7), rng.uniform(0, 330)
        lit = dim + rng.uniform(0.15, 0.25)
        grey, turn = rng.uniform(0.1, 0.4, 2), rng.uniform(0, 30)
        pair = [[hue, grey[0], dim], [hue + turn, grey[1], lit]]
        pair = convert(pair, cv2.COLOR_HSV2BGR)
        field = texture(rng, BACKGROUNDS[kind], h, w)[..., None]
        picture += share[..., None] * (pair[0] + field * (pair[1] - pair[0]))
        labels[share == 1] = 1 + len(OBJECTS) + kind
        colours.extend(pair)
    return np.float32(picture), labels, np.stack(colours)


def paint(
    rng: Generator, picture: np.ndarray, colours: np.ndarray, layers: Sequence[Layer]
) -> np.ndarray:
    """Paint objects with a texture, a lit edge and a shadow onto a background.

    Args:
        rng: Source of random numbers.
        picture: (H, W, 3) float32, the background.
        colours: (N, 3) float32, the colours in it, which the objects avoid.
        layers: What to paint, from the back to the front.

    Returns:
        (H, W, 3) uint8.
    """
    h, w = picture.shape[:2]
    angle = rng.uniform(0, 2 * math.pi)
    light_x, light_y = math.cos(angle), math.sin(angle)  # where it comes from
    for layer in layers:
        colour = pick_colour(rng, OBJECTS[layer.category], colours)
        colours = np.vstack([colours, colour])
        # Seen as a height, an object rises from its edge: to a bevel or a dome.
        depth = cv2.distanceTransform(np.uint8(layer.cover >= 0.5), cv2.DIST_L2, 3)
        bevel = max(2.0, depth.max() * rng.uniform(0.15, 1))
        height = np.sqrt(np.minimum(depth / bevel, 1)) * min(bevel, 0.05 * max(h, w))
        rise_y, rise_x = np.gradient(cv2.GaussianBlur(height, (0, 0), 1.0))
        shade = np.clip(1 - 0.35 * (rise_x * light_x + rise_y * light_y), 0.6, 1.35)
        surface = texture(rng, BACKGROUNDS[int(rng.random() < 0.2)], h, w)
        tone = shade * (1.05 - 0.25 * surface)
        far = rng.uniform(0.01, 0.025) * max(h, w)
        move = np.float32([[1, 0, -light_x * far], [0, 1, -light_y * far]])
        shadow = cv2.warpAffine(layer.cover, move, (w, h))
        shadow = 0.45 * cv2.GaussianBlur(shadow, (0, 0), 0.012 * max(h, w))
        picture = picture * ((1 - shadow) * (1 - layer.cover))[..., None]
        picture += colour * (tone * layer.cover)[..., None]
    picture = picture + 0.012 * rng.standard_normal(picture.shape, np.float32)  # grain
    return np.uint8(np.clip(picture * 255, 0, 255).round())


def start(size: int, *key: int) -> tuple[Generator, int, int]:
    """Random numbers that belong to a key, and a picture's height and width."""
    rng = np.random.default_rng(key)
    sides = [size, round(size * rng.uniform(0.75, 1))]
    rng.shuffle(sides)
    return rng, *sides


def make_scene(
    seed: int, split: str, index: int, size: int
) -> tuple[np.ndarray, np.ndarray, list[Layer], list[np.ndarray]]:
    """Make a picture for the COCO and the ADE20K layout.

    Args:
        seed: Seed of the data set.
        split: 'train' or 'val'.
        index: Number of the picture, from 1.
        size: Its longer side in pixels; the other one is 0.75 to 1 of it.

    Returns:
        The picture, (H, W, 3) uint8 BGR; its labels, (H, W) uint8: 0 unlabelled,
        then ``OBJECTS``, then ``BACKGROUNDS``; its layers from the back to the
        front; and the visible pixels of each layer, (H, W) bool.
    """
    rng, h, w = start(size, seed, list(SPLITS).index(split), index)
    background, labels, colours = make_background(rng, h, w)
    layers = arrange(rng, index, h, w)
    masks = visible_masks(layers)
    for layer, mask in zip(layers, masks, strict=True):
        labels[mask] = 1 + layer.category
    return paint(rng, background, colours, layers), labels, layers, masks


def make_portrait(
    seed: int, split: str, category: int, index: int, size: int
) -> np.ndarray:
    """Make a picture of one object, (H, W, 3) uint8; see :func:`make_scene`."""
    # Counted from 1: a key that ends in 0 is the same as one without it.
    rng, h, w = start(size, seed, list(SPLITS).index(split), index, 1 + category)
    background, _, colours = make_background(rng, h, w)
    layer = make_object(rng, category, h, w, sides=(0.45, 0.75), roam=0.25)
    return paint(rng, background, colours, [layer])


# ------------------------------------------------------------------------ files


def encode_mask(mask: np.ndarray, crowd: bool) -> dict[str, Any]:
    """The fields of a COCO annotation that follow from a (H, W) bool mask.

    The mask is said in polygons, or in RLE if it has a hole or is a crowd. Polygons
    run a little inside the edge of the outermost pixels, where pycocotools decodes
    them to the very same mask.
    """
    rle = mask_utils.encode(np.asfortranarray(mask, np.uint8))
    large = np.uint8(mask).repeat(4, axis=0).repeat(4, axis=1)
    contours, _ = cv2.findContours(large, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    contours = [cv2.approxPolyDP(contour, 1.5, True) for contour in contours]
    said: Any = [((c + 0.5) / 4).ravel().tolist() for c in contours if len(c) > 2]
    decoded = mask_utils.merge(mask_utils.frPyObjects(said, *mask.shape))
    if crowd or decoded['counts'] != rle['counts']:
        said = {'size': list(mask.shape), 'counts': rle['counts'].decode()}
    return {
        'iscrowd': int(crowd),
        'bbox': mask_utils.toBbox(rle).tolist(),
        'area': int(mask_utils.area(rle)),
        'segmentation': said,
    }


def save(path: Path, image: np.ndarray) -> None:
    """Write a JPEG or PNG, by the ending of the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not cv2.imwrite, which stays silent when the disk is full.
    path.write_bytes(cv2.imencode(path.suffix, image)[1].tobytes())


def write_scenes(
    root: Path, split: str, count: int, size: int, seed: int
) -> dict[str, int]:
    """Write one split of the COCO and the ADE20K layout, and count what is in it."""
    coco, ade = root / 'coco', root / 'ade' / 'ADEChallengeData2016'
    images, annotations = [], []
    for index in range(1, count + 1):
        image, labels, layers, masks = make_scene(seed, split, index, size)
        (h, w), name = labels.shape, f'{index:012d}.jpg'
        images.append({'id': index, 'file_name': name, 'height': h, 'width': w})
        for layer, mask in zip(layers, masks, strict=True):
            ids = {'id': len(annotations) + 1, 'image_id': index}
            ids['category_id'] = 1 + layer.category
            annotations.append(ids | encode_mask(mask, layer.crowd))
        stem = f'{SPLITS[split]}/ADE_{split}_{index:08d}'
        save(coco / f'{split}2017' / name, image)
        save(ade / 'images' / f'{stem}.jpg', image)
        save(ade / 'annotations' / f'{stem}.png', labels)
    categories = [{'id': 1 + i, 'name': name} for i, name in enumerate(OBJECTS)]
    content = {'info': {'description': TOOL}, 'licenses': [], 'images': images}
    content.update(annotations=annotations, categories=categories)
    path = coco / 'annotations' / f'instances_{split}2017.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    crowds = sum(annotation['iscrowd'] for annotation in annotations)
    return {'images': count, 'objects': len(annotations) - crowds, 'crowds': crowds}


def write_portraits(
    root: Path, split: str, count: int, size: int, seed: int
) -> dict[str, int]:
    """Write one split of the image folder, and count what is in it."""
    for category, name in enumerate(OBJECTS):
        for index in range(1, count + 1):
            image = make_portrait(seed, split, category, index, size)
            save(root / 'imagenet' / split / name / f'{index:06d}.jpg', image)
    return {'images': count * len(OBJECTS)}


def write_all(root: Path, arguments: dict[str, int]) -> None:
    """Write the three layouts and the manifest into a new folder."""
    sizes = arguments['size'], arguments['seed']
    portraits = arguments['classification_per_class']
    portraits = {'train': portraits, 'val': math.ceil(portraits / 4)}
    coco: dict[str, Any] = {'root': 'coco', 'classes': OBJECTS}
    ade: dict[str, Any] = {'root': 'ade/ADEChallengeData2016'}
    ade.update(classes=OBJECTS + BACKGROUNDS, reduce_zero_label=True)
    # An image folder numbers its classes in the order of their names.
    imagenet: dict[str, Any] = {'root': 'imagenet', 'classes': sorted(OBJECTS)}
    for split in SPLITS:
        coco[split] = write_scenes(root, split, arguments[split], *sizes)
        ade[split] = {'images': arguments[split]}
        imagenet[split] = write_portraits(root, split, portraits[split], *sizes)
    manifest = {'tool': TOOL, 'format': FORMAT, 'arguments': arguments}
    manifest.update(coco=coco, ade=ade, imagenet=imagenet)
    (root / 'dataset.json').write_text(json.dumps(manifest, indent=2) + '\n')


def read_manifest(out: Path) -> dict[str, Any] | None:
    """What ``dataset.json`` says, or None if the folder is not all our own."""
    try:
        manifest = json.loads((out / 'dataset.json').read_text())
        ours = manifest['tool'] == TOOL and set(os.listdir(out)) <= ENTRIES
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if ours else None


def check_option(name: str, value: int | str) -> int:
    """The value as a number.

    Raises:
        ValueError: If it is not a whole number in the range of the option.
    """
    _, low, high, _ = OPTIONS[name]
    try:
        number = int(str(value))
        if low <= number <= high:
            return number
    except ValueError:
        pass
    option = '--' + name.replace('_', '-')
    raise ValueError(f'{option} {value}: allowed is a whole number, {low} to {high}')


def make_dataset(out: str | Path, overwrite: bool = False, **options: int) -> bool:
    """Make a data set, all of it or nothing.

    It grows in a hidden folder beside ``out`` that is renamed at the end, or removed
    if anything goes wrong, which includes Ctrl-C.

    Args:
        out: Folder to make.
        overwrite: Whether to replace a data set of this tool. Default: False.
        **options: Values for ``OPTIONS``, which holds their defaults.

    Returns:
        False if the same data set is there already, so nothing was to do.

    Raises:
        ValueError: If an option is out of its range.
        FileExistsError: If ``out`` is there and may not be replaced.
        OSError: If writing fails.
    """
    values = {name: default for name, (default, *_) in OPTIONS.items()} | options
    arguments = {name: check_option(name, value) for name, value in values.items()}
    out = Path(os.path.realpath(out))  # a link stays, the folder behind it is made
    if os.path.lexists(out):
        found = read_manifest(out)
        if found is None:
            raise FileExistsError(f'{out} holds other things: choose another folder')
        same = found.get('format') == FORMAT and found.get('arguments') == arguments
        if same and not overwrite:
            return False
        if not overwrite:
            raise FileExistsError(
                f'{out} was made with other arguments: --overwrite replaces it'
            )

    token = uuid.uuid4().hex[:8]
    growing = out.with_name(f'.{out.name}.{token}.tmp')
    replaced = out.with_name(f'.{out.name}.{token}.old')
    try:
        growing.mkdir(parents=True)
        write_all(growing, arguments)
        if out.exists():
            out.rename(replaced)
        growing.rename(out)
    except BaseException:
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        raise
    finally:
        shutil.rmtree(growing, ignore_errors=True)
        if out.exists():
            shutil.rmtree(replaced, ignore_errors=True)
    return True


# ----------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{TOOL}: error: {message}\n')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = Parser(prog=TOOL, description=__doc__.splitlines()[0])
    parser.add_argument(
        'out', type=osp.expanduser, metavar='OUT', help='folder to make'
    )
    for name, (default, low, high, text) in OPTIONS.items():
        text = f'{text}; {low} to {high}, default: {default}'
        option = '--' + name.replace('_', '-')
        parser.add_argument(option, metavar='N', default=default, help=text)
    text = 'replace a data set that this tool made'
    parser.add_argument('--overwrite', action='store_true', help=text)
    args = parser.parse_args(argv)
    for name in OPTIONS:
        try:
            setattr(args, name, check_option(name, getattr(args, name)))
        except ValueError as error:
            parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = vars(parse_args(argv))
    out = Path(options.pop('out'))
    try:
        made = make_dataset(out, **options)
    except OSError as error:
        print(f'{TOOL}: error: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f'{TOOL}: interrupted, {out} is as it was', file=sys.stderr)
        return 130
    manifest = json.loads((out / 'dataset.json').read_text())
    print(f'{"made" if made else "already there"}: {out / "dataset.json"}')
    for name in ('coco', 'ade', 'imagenet'):
        part = manifest[name]
        counts = ' + '.join(f'{part[split]["images"]} {split}' for split in SPLITS)
        print(f'{out / part["root"]}: {counts} pictures; {", ".join(part["classes"])}')
    return 0


if __name__ == '__main__':
    # A scheduler's polite stop cleans up as well.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
