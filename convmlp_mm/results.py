"""What was predicted for a folder of images, in formats that others read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mmengine.infer import BaseInferencer
    from mmengine.structures import BaseDataElement

__all__ = [
    'RESULTS',
    'ClassificationResults',
    'DetectionResults',
    'Results',
    'SegmentationResults',
    'labels_of',
]

# COCO numbers its 80 classes from 1 to 90 and leaves these out.
UNUSED_COCO_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)


def labels_of(sample: BaseDataElement) -> np.ndarray:
    """Return what a segmentor has predicted.

    Args:
        sample (BaseDataElement): Its prediction for an image.

    Returns:
        np.ndarray: The classes of the pixels, (H, W).
    """
    return sample.pred_sem_seg.data[0].cpu().numpy()


class Results:
    """What is written beside the pictures: the content of ``results.json``.

    Args:
        inferencer (BaseInferencer): Where the classes come from.
        score_thr (float): Lowest score of the detections that are kept.
    """

    def __init__(self, inferencer: BaseInferencer, score_thr: float):
        meta = inferencer.model.dataset_meta
        self.classes = list(meta.get('classes') or ())
        self.score_thr = score_thr
        self.images, self.predictions, self.skipped = [], [], []
        self.ids = self.category_ids()

    # What the list of predictions is called in the file.
    key = 'predictions'

    def category_ids(self) -> list[int]:
        """Numbers of the classes in the file."""
        return list(range(len(self.classes)))

    def add(
        self,
        name: str,
        size: tuple[int, int],
        sample: BaseDataElement,
        label_map: str,
        picture: str,
    ) -> None:
        """Add an image.

        Args:
            name (str): Its name in the folder.
            size (tuple[int, int]): Height and width in pixels.
            sample (BaseDataElement): The prediction.
            label_map (str): The file that a segmentor's label map goes to.
            picture (str): The file that shows the prediction.
        """
        image = dict(id=len(self.images) + 1, file_name=name, picture=picture)
        image.update(height=int(size[0]), width=int(size[1]))
        self.images.append(image)
        self.predictions += self.describe(image['id'], sample, label_map)

    def describe(self, image_id: int, sample: BaseDataElement, label_map: str) -> list:
        """Say what has been predicted in an image."""
        raise NotImplementedError

    def content(self, **info: object) -> dict:
        """Return what the file will hold."""
        return dict(
            info=info,
            images=self.images,
            categories=[
                dict(id=i, name=name) for i, name in zip(self.ids, self.classes)
            ],
            skipped=self.skipped,
            **{self.key: self.predictions},
        )


class ClassificationResults(Results):
    """The five most probable classes of each image."""

    def describe(self, image_id: int, sample: BaseDataElement, label_map: str) -> list:
        scores, labels = sample.pred_score.topk(min(5, len(sample.pred_score)))
        top = [
            dict(category_id=label, score=score, **self.name(label))
            for label, score in zip(labels.tolist(), scores.tolist())
        ]
        return [dict(image_id=image_id, **top[0], top5=top)]

    def name(self, label: int) -> dict:
        """Name a class, if the data set of the configuration does."""
        return dict(name=self.classes[label]) if label < len(self.classes) else {}


class DetectionResults(Results):
    """Boxes as x, y, width, height and run-length encoded masks, as COCO has them."""

    key = 'annotations'

    def category_ids(self) -> list[int]:
        from mmdet.datasets import CocoDataset

        if tuple(self.classes) == tuple(CocoDataset.METAINFO['classes']):
            return [i for i in range(1, 91) if i not in UNUSED_COCO_IDS]
        return list(range(1, len(self.classes) + 1))

    def describe(self, image_id: int, sample: BaseDataElement, label_map: str) -> list:
        from mmdet.structures.mask import encode_mask_results

        found = sample.pred_instances
        found = found[found.scores >= self.score_thr].cpu().numpy()
        records = []
        for i, (x1, y1, x2, y2) in enumerate(found.bboxes.tolist()):
            box = [x1, y1, x2 - x1, y2 - y1]
            record = dict(
                id=len(self.predictions) + i + 1,
                image_id=image_id,
                category_id=self.ids[int(found.labels[i])],
                bbox=[round(value, 2) for value in box],
                area=round(box[2] * box[3], 2),
                score=round(float(found.scores[i]), 5),
                iscrowd=0,
            )
            if 'masks' in found:
                (mask,) = encode_mask_results([found.masks[i]])
                record['segmentation'] = dict(
                    size=list(map(int, mask['size'])), counts=mask['counts'].decode()
                )
                record['area'] = int(found.masks[i].sum())
            records.append(record)
        return records


class SegmentationResults(Results):
    """The share of each class; the label maps are files of their own."""

    def describe(self, image_id: int, sample: BaseDataElement, label_map: str) -> list:
        labels = labels_of(sample)
        found, counts = np.unique(labels, return_counts=True)
        return [
            dict(
                image_id=image_id,
                label_map=label_map,
                pixels={
                    self.classes[label]: int(count)
                    for label, count in zip(found, counts)
                },
            )
        ]


RESULTS = {
    'mmpretrain': ClassificationResults,
    'mmdet': DetectionResults,
    'mmseg': SegmentationResults,
}
