"""Images as models see them, and sheets of pictures with their numbers."""

from __future__ import annotations

import io
import os.path as osp
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..files import write_file
from ..predict import read_whole_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mmengine.model import BaseModel

__all__ = [
    'DPI',
    'MIN_SIZE',
    'arrays_path',
    'fit_image',
    'fixed_size',
    'preprocess',
    'read_image',
    'save_sheet',
]

# In pixels of the input, and to the inch of the sheet.
MIN_SIZE = 32
DPI = 100


def read_image(path: str) -> np.ndarray:
    """Read a picture.

    Args:
        path (str): The file.

    Returns:
        ndarray: Of shape (H, W, 3), uint8, blue first as in the toolkits.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a picture.
    """
    if not osp.isfile(path):
        raise FileNotFoundError(f'image {path!r} does not exist')
    try:
        return read_whole_image(path)
    # Pillow raises what it likes for broken files.
    except Exception as error:
        raise ValueError(f'image {path!r} cannot be read: {error}') from error


def fit_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cut the largest centred part of the wanted proportions, and resize it.

    Args:
        image (ndarray): Of shape (H, W, 3), uint8.
        size (tuple[int, int]): Height and width in pixels.

    Returns:
        ndarray: Of this size, by Pillow's bicubic filter.
    """
    fitted = ImageOps.fit(
        Image.fromarray(image), (size[1], size[0]), method=Image.Resampling.BICUBIC
    )
    return np.asarray(fitted)


def fixed_size(model: BaseModel) -> tuple[int, int] | None:
    """Return the height and width of a model that takes no other size.

    Args:
        model (BaseModel): Of mmpretrain, mmdet or mmseg, of timm inside of
            mmpretrain.

    Returns:
        tuple[int, int], optional: In pixels; None if it takes any size.
    """
    backbone = getattr(model, 'backbone', None)
    if type(backbone).__name__ == 'MlpMixer':
        return tuple(backbone.img_size)
    given = getattr(getattr(model, 'model', None), 'pretrained_cfg', None) or {}
    if backbone is None and given.get('fixed_input_size'):
        return tuple(given['input_size'][-2:])
    return None


def preprocess(model: BaseModel, image: np.ndarray) -> Tensor:
    """Normalise a picture as the model does it, order of colours included.

    Args:
        model (BaseModel): With ``data_preprocessor``.
        image (ndarray): Of shape (H, W, 3), uint8, blue first.

    Returns:
        Tensor: Of shape (1, 3, H, W), larger if the model pads its input.
    """
    planes = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return model.data_preprocessor(dict(inputs=[planes]), False)['inputs']


def arrays_path(out: str) -> str:
    """Name the file of the numbers beside a picture.

    Args:
        out (str): The picture, ``.png``.

    Returns:
        str: With ``.npz`` instead.
    """
    return out.removesuffix('.png') + '.npz'


def save_sheet(out: str, figure: Figure, arrays: dict[str, np.ndarray]) -> list[str]:
    """Write a picture and, beside it, what it shows as ``.npz``.

    Args:
        out (str): The picture, ``.png``. Each file is written whole or not at
            all; what was there before is replaced.
        figure (Figure): The picture.
        arrays (dict[str, ndarray]): By name.

    Returns:
        list[str]: The two paths.
    """
    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=DPI, format='png')
    np.savez_compressed(packed, **arrays)
    paths = [out, arrays_path(out)]
    for path, content in zip(paths, (drawn, packed)):
        write_file(path, content.getvalue(), overwrite=True)
    return paths
