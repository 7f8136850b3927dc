#!/usr/bin/env python
"""Convert weights between the authors' files and the layout of today's toolkits.

For classifiers, which can be converted back, the names differ; for detectors and
segmentors what stands beside the weights. Tensors are copied bit by bit. No tool of
this package needs it: they all read both layouts.
"""

import argparse
import os.path as osp

from convmlp_mm.checkpoint import (
    check_output,
    dump_checkpoint,
    read_checkpoint,
    to_mm_layout,
    to_published_layout,
    write_file,
)
from convmlp_mm.launch import one_line_errors

LAYOUTS = {'mm': to_mm_layout, 'published': to_published_layout}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('checkpoint', help='checkpoint file or URL, of either layout')
    add('out', type=osp.expanduser, help='file to write')
    text = 'as mmpretrain, mmdet and mmseg save it (mm, the default), or the authors'
    add('--to', choices=LAYOUTS, default='mm', help=text)
    add('--overwrite', action='store_true', help='replace OUT if it is there')
    args = parser.parse_args()
    with one_line_errors():
        check_output(args.out, args.overwrite)
        converted = LAYOUTS[args.to](read_checkpoint(args.checkpoint))
        content = dump_checkpoint(converted, args.checkpoint)
        write_file(args.out, content, args.overwrite)
    count = len(converted.get('state_dict', converted))
    print(f'wrote {args.out}: {count} tensors, layout {args.to!r}')


if __name__ == '__main__':
    main()
