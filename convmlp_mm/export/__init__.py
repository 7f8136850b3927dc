"""Export models to ONNX and ``torch.export``, compared with the toolkits.

:func:`export` makes a file in memory, :func:`verify` refuses it if it differs from the
toolkit, :func:`write` writes it.
"""

# ruff: noqa: F401
from .formats import FORMATS, check_request, export, write
from .systems import ExportError
from .verify import draw_images, verify
