#!/usr/bin/env python
"""Strip a checkpoint of the Runner to what others need and name it by its hash.

What is left are the weights, the average of them where EMA was on, and the names of
the classes. ``torch.load`` reads the file with ``weights_only=True``.
"""

import argparse
import hashlib
import io
import os
import os.path as osp
import sys
import tempfile

import torch

from convmlp_mm.cli import one_line_errors
from convmlp_mm.weights import read_checkpoint


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument(
        'out', help='file to write; the hash comes before its ending .pth'
    )
    return parser.parse_args()


def publish(filename: str, out: str) -> tuple[str, bytes]:
    """Make the file's content and its name."""
    if not out.endswith('.pth'):
        raise ValueError(f'the file to write must end with .pth, but got {out!r}')
    folder = osp.dirname(out) or '.'
    if not osp.isdir(folder):
        raise FileNotFoundError(f'folder {folder!r} does not exist')
    checkpoint = read_checkpoint(filename)
    # EMAHook saves the average as state_dict.
    state_dict = checkpoint.get('state_dict', checkpoint)
    if not state_dict or not all(
        isinstance(value, torch.Tensor) for value in state_dict.values()
    ):
        raise ValueError(f'checkpoint {filename!r} holds no state dict of tensors')
    # A tensor may be a part of a larger one, all of which would be saved.
    state_dict = {key: value.clone() for key, value in state_dict.items()}
    meta = checkpoint.get('meta', {})
    kept = {key: meta[key] for key in ('dataset_meta', 'CLASSES') if key in meta}
    buffer = io.BytesIO()
    torch.save(dict(state_dict=state_dict, meta=kept), buffer)
    content = buffer.getvalue()
    buffer.seek(0)
    torch.load(buffer, weights_only=True)
    digest = hashlib.sha256(content).hexdigest()
    return f'{out.removesuffix(".pth")}-{digest[:8]}.pth', content


def write_new(path: str, content: bytes) -> None:
    """Write all of a file or nothing, and not over another."""
    if osp.exists(path):
        raise FileExistsError(f'{path!r} is already there')
    file, temporary = tempfile.mkstemp(dir=osp.dirname(path) or '.')
    try:
        with os.fdopen(file, 'wb') as stream:
            stream.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def main() -> None:
    args = parse_args()
    with one_line_errors():
        path, content = publish(args.checkpoint, args.out)
        write_new(path, content)
    print(f'{path}\nsize: {len(content) / 2**20:.1f} MB', file=sys.stdout)
    print(f'SHA256: {hashlib.sha256(content).hexdigest()}')


if __name__ == '__main__':
    main()
