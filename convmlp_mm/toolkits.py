"""What differs between the three toolkits, one row for each.

What depends on ``default_scope`` and is wanted in several places stands here.
"""

from importlib import import_module
from typing import NamedTuple

from mmengine.config import Config

# Steps of a test pipeline that decide the size.
CROPS = ('Resize', 'CenterCrop', 'EfficientNetCenterCrop')


class Toolkit(NamedTuple):
    """A toolkit that builds models with this backbone.

    Attributes:
        scope: Its name, as package and as ``default_scope``.
        inferencer: Path of its inferencer's class.
        predictor: The class in ``convmlp_mm.predict`` that uses the inferencer.
        visualizer: The type of its visualizer.
        sample: Path of the class of its samples.
        results: By output of an exported file, what a sample has of it.
    """

    scope: str
    inferencer: str
    predictor: str
    visualizer: str
    sample: str
    results: dict[str, str]

    def register(self) -> None:
        """Import its modules, so that its registries know their classes."""
        import_module(f'{self.scope}.utils').register_all_modules(False)


ROWS = (
    Toolkit(
        scope='mmpretrain',
        inferencer='mmpretrain.apis.ImageClassificationInferencer',
        predictor='ClassificationPredictor',
        visualizer='UniversalVisualizer',
        sample='mmpretrain.structures.DataSample',
        results=dict(scores='pred_score'),
    ),
    Toolkit(
        scope='mmdet',
        inferencer='mmdet.apis.DetInferencer',
        predictor='DetectionPredictor',
        visualizer='DetLocalVisualizer',
        sample='mmdet.structures.DetDataSample',
        results=dict(
            boxes='pred_instances.bboxes',
            scores='pred_instances.scores',
            labels='pred_instances.labels',
        ),
    ),
    Toolkit(
        scope='mmseg',
        inferencer='mmseg.apis.MMSegInferencer',
        predictor='SegmentationPredictor',
        visualizer='SegLocalVisualizer',
        sample='mmseg.structures.SegDataSample',
        results=dict(logits='seg_logits.data'),
    ),
)
TOOLKITS = {row.scope: row for row in ROWS}


def toolkit_of(scope: str | None) -> Toolkit:
    """Return the toolkit that ``default_scope`` of a configuration names.

    Raises:
        ValueError: If it names none of them.
    """
    if scope not in TOOLKITS:
        raise ValueError(
            f'default_scope of the configuration must be one of {tuple(TOOLKITS)}, '
            f'but is {scope!r}'
        )
    return TOOLKITS[scope]


def default_shape(cfg: Config) -> tuple[int, int]:
    """Return the height and width, in pixels, that a configuration is tested at.

    That is what the test pipeline resizes or crops to, else 224x224; for segmentors the
    crop of the training, else 512x512; and 800x1280 for 1333x800, as in the tables of
    mmdet.
    """
    scope = cfg.get('default_scope')
    if scope == 'mmseg':
        given = cfg.get('data_preprocessor') or cfg.model.get('data_preprocessor') or {}
        return tuple(given.get('size') or cfg.get('crop_size') or (512, 512))
    shape = 224
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    for step in dataset.get('pipeline') or ():
        if str(step['type']).rpartition('.')[2] in CROPS:
            keys = [key for key in ('scale', 'crop_size', 'size') if key in step]
            shape = step[keys[0]] if keys else shape
    if isinstance(shape, int):
        return shape, shape
    # mmdet has the width first.
    shape = tuple(shape[::-1] if scope == 'mmdet' else shape)
    return (800, 1280) if shape == (800, 1333) else shape
