"""Export models to ONNX and to ``torch.export``, checked against the toolkits.

The graph (see :mod:`convmlp_mm.export.graphs`) takes pixels and gives results. It is
run before it is written, and what differs from the toolkit is not written.
"""

from .check import EXPORTABLE, FORMATS, OPSETS, PARTS, ExportError, check_request
from .compare import TOLERANCE
from .model import ExportReport, draw_images, export_model

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
