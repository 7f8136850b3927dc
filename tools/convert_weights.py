#!/usr/bin/env python
"""Convert weights between the authors' files and the layout of today's toolkits.

For classifiers the names differ; detectors and segmentors of mmdetection 2.x and
mmsegmentation 0.x differ in what stands beside the weights. Tensors are copied bit by
bit. No tool of this package needs it: they all read both layouts.
"""

import argparse
import os.path as osp

from convmlp_mm.checkpoint_io import dump_checkpoint, read_checkpoint
from convmlp_mm.cli import one_line_errors
from convmlp_mm.files import check_output, write_file
from convmlp_mm.layouts import to_mm_layout, to_published_layout

LAYOUTS = {'mm': to_mm_layout, 'published': to_published_layout}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('checkpoint', help='checkpoint file or URL, of either layout')
    parser.add_argument('out', type=osp.expanduser, help='file to write')
    parser.add_argument(
        '--to',
        choices=LAYOUTS,
        default='mm',
        help='mm: state_dict and meta as mmpretrain, mmdet and mmseg save them; '
        'published: as the authors do (default: %(default)s)',
    )
    parser.add_argument(
        '--overwrite', action='store_true', help='replace OUT if it is there'
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with one_line_errors():
        check_output(args.out, args.overwrite)
        checkpoint = read_checkpoint(args.checkpoint)
        try:
            converted = LAYOUTS[args.to](checkpoint)
        except ValueError as error:
            raise ValueError(f'checkpoint {args.checkpoint!r}: {error}') from error
        write_file(args.out, dump_checkpoint(converted), args.overwrite)
    tensors = converted.get('state_dict', converted)
    print(f'wrote {args.out}: {len(tensors)} tensors, layout {args.to!r}')


if __name__ == '__main__':
    main()
