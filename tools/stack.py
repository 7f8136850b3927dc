"""Answers what tools/setup.sh asks of an environment, run by the Python of that one.

`works [STACK]` and `has [EXTRA ...]` answer by the exit status; `mmcv STACK` prints the
range of mmcv, the page of its compiled wheels, and a folder's name for the own one.
"""

import os
import platform
import sys
from importlib.metadata import metadata, requires, version
from importlib.util import find_spec

DISTRIBUTIONS = {'onedl': 'onedl-mmcv', 'openmmlab': 'mmcv'}


def works(*stacks: str):
    """Run the operators, of which a mmcv that was built without torch has none."""
    for stack in stacks:
        version(DISTRIBUTIONS[stack])
    assert all(map(find_spec, ('mmengine', 'mmdet', 'mmseg', 'mmpretrain')))
    import torch
    from mmcv.ops import nms, roi_align

    for device in ['cpu'] + ['cuda'] * torch.cuda.is_available():
        boxes = torch.tensor([[0, 0, 9, 9], [1, 1, 9, 9], [20, 20, 30, 30.0]])
        scores = torch.tensor([0.9, 0.8, 0.7])
        kept = nms(boxes.to(device), scores.to(device), 0.5)[1]
        image = torch.arange(16.0, device=device).view(1, 1, 4, 4)
        region = torch.tensor([[0, 0, 0, 4, 4.0]], device=device)
        means = roi_align(image, region, (2, 2), 1.0, 2, 'avg', True)
        assert kept.tolist() == [0, 2]
        assert means.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def wanted(*extras: str):
    """Yield what the project and these extras of it require here."""
    from packaging.requirements import Requirement

    for requirement in map(Requirement, requires('convmlp_mm')):
        marker = requirement.marker
        if not marker or any(marker.evaluate({'extra': extra}) for extra in extras):
            yield requirement


def has(*extras: str):
    """Look for each distribution that is required, in its range."""
    assert set(extras) <= set(metadata('convmlp_mm').get_all('Provides-Extra'))
    for requirement in wanted(*extras):
        assert version(requirement.name) in requirement.specifier


def mmcv(stack: str):
    """Name pages as onedl-mim 0.5.1 and openmim 0.3.9 do, which read that variable."""
    import torch

    name = DISTRIBUTIONS[stack]
    (requirement,) = (r for r in wanted(stack) if r.name == name)
    major, minor = torch.__version__.split('.')[:2]
    cuda = torch.version.cuda
    device = 'cu' + cuda.replace('.', '') if cuda else 'cpu'
    if stack == 'onedl':
        base = os.environ.get('MMCV_BASE_URL', 'https://mmwheels.onedl.ai')
        page = f'{device}-torch{major}{minor}0/simple/onedl-mmcv/index.html'
    else:
        base = os.environ.get('MMCV_BASE_URL', 'https://download.openmmlab.com')
        page = f'mmcv/dist/{device}/torch{major}.{minor}.0/index.html'
    # A compiler that sees a GPU makes operators for it.
    seen = 'cuda' if torch.cuda.is_available() else 'cpu'
    parts = (stack, f'torch-{torch.__version__}', sys.implementation.cache_tag)
    folder = '_'.join((*parts, platform.machine(), seen))
    print(f'{name}{requirement.specifier} {base}/{page} {folder}')


if __name__ == '__main__':
    del sys.path[0]  # the folder of this file, whose names would hide others
    {'works': works, 'has': has, 'mmcv': mmcv}[sys.argv[1]](*sys.argv[2:])
