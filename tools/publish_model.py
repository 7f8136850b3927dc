#!/usr/bin/env python
"""Strip a checkpoint of the Runner to what others need and name it by its hash.

What is left are the weights, the average of them where EMA was on, and the names of
the classes. ``torch.load`` reads the file with ``weights_only=True``.
"""

import argparse
import hashlib
import os.path as osp

import torch

from convmlp_mm.checkpoint import (
    check_output,
    check_tensors,
    dump_checkpoint,
    read_checkpoint,
    write_file,
)
from convmlp_mm.launch import one_line_errors


def publish(filename: str, out: str) -> tuple[str, bytes]:
    """Make the file's name and its content."""
    if not out.endswith('.pth'):
        raise ValueError(f'the file to write must end with .pth, but got {out!r}')
    check_output(out, overwrite=True)
    checkpoint = read_checkpoint(filename)
    # EMAHook saves the average as state_dict.
    state_dict = checkpoint.get('state_dict', checkpoint)
    if not state_dict or not all(map(torch.is_tensor, state_dict.values())):
        raise ValueError(f'checkpoint {filename!r} holds no state dict of tensors')
    check_tensors(state_dict, filename)
    meta = checkpoint.get('meta') or {}
    kept = {key: meta[key] for key in ('dataset_meta', 'CLASSES') if key in meta}
    content = dump_checkpoint(dict(state_dict=state_dict, meta=kept))
    digest = hashlib.sha256(content).hexdigest()
    return f'{out.removesuffix(".pth")}-{digest[:8]}.pth', content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    note = 'file to write; the hash comes before its ending .pth'
    parser.add_argument('out', type=osp.expanduser, help=note)
    args = parser.parse_args()
    with one_line_errors():
        path, content = publish(args.checkpoint, args.out)
        write_file(path, content)
    print(f'{path}\nsize: {len(content) / 2**20:.1f} MB')
    print(f'SHA256: {hashlib.sha256(content).hexdigest()}')


if __name__ == '__main__':
    main()
