#!/usr/bin/env python
"""Convert weights between the authors' files and the layout of today's toolkits.

For classifiers the names differ; detectors and segmentors of mmdetection 2.x and
mmsegmentation 0.x differ in what stands beside the weights. Tensors are copied bit by
bit. No tool of this package needs it: they all read both layouts.

Files that hold objects beside tensors, as timm's with their options, are refused by all
other tools. This one reads them too, without what the objects are or do.
"""

import argparse
import os.path as osp
from collections.abc import Mapping

from convmlp_mm import checkpoint_io, layouts
from convmlp_mm.files import check_output, write_file
from convmlp_mm.launch import one_line_errors
from convmlp_mm.weights import check_tensors

LAYOUTS = {'mm': layouts.to_mm_layout, 'published': layouts.to_published_layout}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('checkpoint', help='checkpoint file or URL, of either layout')
    add('out', type=osp.expanduser, help='file to write')
    text = 'as mmpretrain, mmdet and mmseg save it (mm, the default), or the authors'
    add('--to', choices=LAYOUTS, default='mm', help=text)
    text = 'take the tensors under this key, as state_dict_ema, where timm averages'
    add('--key', help=f'{text} (default: state_dict or model)')
    add('--overwrite', action='store_true', help='replace OUT if it is there')
    args = parser.parse_args()
    with one_line_errors():
        check_output(args.out, args.overwrite)
        skipped = []
        checkpoint = checkpoint_io.read_checkpoint(args.checkpoint, skipped=skipped)
        if args.key:
            if not isinstance(checkpoint.get(args.key), Mapping):
                raise KeyError(
                    f'checkpoint {args.checkpoint!r} has no dict {args.key!r}, but '
                    f'{", ".join(checkpoint)}'
                )
            checkpoint = dict(checkpoint, state_dict=checkpoint.pop(args.key))
            checkpoint_io.check_content(checkpoint, args.checkpoint)
        try:
            converted = LAYOUTS[args.to](checkpoint)
            check_tensors(layouts.name_as_model(converted), args.checkpoint)
        except checkpoint_io.CheckpointError:
            raise
        except ValueError as error:
            raise ValueError(f'checkpoint {args.checkpoint!r}: {error}') from error
        write_file(args.out, checkpoint_io.dump_checkpoint(converted), args.overwrite)
    tensors = converted.get('state_dict', converted)
    taken = layouts.say_taken(checkpoint)
    print(f'wrote {args.out}: {len(tensors)} tensors, layout {args.to!r}{taken}')
    if skipped:
        print(f'left out: objects of {", ".join(dict.fromkeys(skipped))}')


if __name__ == '__main__':
    main()
