"""What differs between the three toolkits, one row for each.

What depends on ``default_scope`` and is wanted in more than one place stands here.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from mmengine.config import Config
from mmengine.registry import Registry

__all__ = ['TOOLKITS', 'Toolkit', 'default_shape', 'toolkit_of']

# Steps of a test pipeline that decide the size.
CROPS = ('Resize', 'CenterCrop', 'EfficientNetCenterCrop')


@dataclass(frozen=True)
class Toolkit:
    """A toolkit that builds models with this backbone.

    Attributes:
        scope (str): Its name, as package and as ``default_scope``.
        inferencer (str): Module and class of its inferencer.
        visualizer (str): The type of its visualizer.
        sample (str): The class of its samples, in its module ``structures``.
        results (dict): By output of an exported file, what a sample has of it.
    """

    scope: str
    inferencer: str
    visualizer: str
    sample: str
    results: dict[str, str]

    def register(self) -> None:
        """Import its modules, so that its registries know their classes."""
        import_module(f'{self.scope}.utils').register_all_modules(False)

    def registry(self, name: str) -> Registry:
        """Return one of its registries, such as ``'DATASETS'``, filled."""
        self.register()
        return getattr(import_module(f'{self.scope}.registry'), name)

    def sample_class(self) -> type:
        """Return the class of its samples."""
        return getattr(import_module(f'{self.scope}.structures'), self.sample)

    def inferencer_class(self) -> type:
        """Return the class of its inferencer."""
        module, _, name = self.inferencer.rpartition('.')
        return getattr(import_module(module), name)


ROWS = (
    Toolkit(
        scope='mmpretrain',
        inferencer='mmpretrain.apis.ImageClassificationInferencer',
        visualizer='UniversalVisualizer',
        sample='DataSample',
        results=dict(scores='pred_score'),
    ),
    Toolkit(
        scope='mmdet',
        inferencer='mmdet.apis.DetInferencer',
        visualizer='DetLocalVisualizer',
        sample='DetDataSample',
        results=dict(
            boxes='pred_instances.bboxes',
            scores='pred_instances.scores',
            labels='pred_instances.labels',
        ),
    ),
    Toolkit(
        scope='mmseg',
        inferencer='mmseg.apis.MMSegInferencer',
        visualizer='SegLocalVisualizer',
        sample='SegDataSample',
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
