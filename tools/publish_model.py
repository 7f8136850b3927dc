#!/usr/bin/env python
"""Strip a checkpoint of the Runner to what others need and name it by its hash.

What is left are the weights, the average of them where EMA was on, and the names of
the classes. ``torch.load`` reads the file with ``weights_only=True``.
"""

import argparse
import hashlib
import os.path as osp

from torch import Tensor

from convmlp_mm.checkpoint import (
    check_output,
    dump_checkpoint,
    read_checkpoint,
    write_file,
)
from convmlp_mm.launch import one_line_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    text = 'file to write; the hash comes before its ending .pth'
    parser.add_argument('out', type=osp.expanduser, help=text)
    args = parser.parse_args()
    with one_line_errors():
        stem, suffix = osp.splitext(args.out)
        if suffix != '.pth':
            raise ValueError(f'the file must end with .pth, but got {args.out!r}')
        check_output(args.out, overwrite=True)
        checkpoint = read_checkpoint(args.checkpoint)
        # EMAHook saves the average as state_dict.
        weights = checkpoint.get('state_dict', checkpoint)
        if not weights or not all(isinstance(v, Tensor) for v in weights.values()):
            raise ValueError(f'checkpoint {args.checkpoint!r} holds no tensors alone')
        meta = checkpoint.get('meta') or {}
        meta = {k: meta[k] for k in ('dataset_meta', 'CLASSES') if k in meta}
        content = dump_checkpoint(dict(state_dict=weights, meta=meta), args.checkpoint)
        digest = hashlib.sha256(content).hexdigest()
        path = f'{stem}-{digest[:8]}.pth'
        write_file(path, content)
    print(f'{path}\nsize: {len(content) / 2**20:.1f} MB\nSHA256: {digest}')


if __name__ == '__main__':
    main()
