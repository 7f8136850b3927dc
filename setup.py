"""Package description. Every version range of the project stands here.

The ranges are plain literals: ``tools/setup_env.sh`` reads them without running this
file, so that none has to be written twice.
"""

import atexit
import re
import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = 'convmlp_mm'

# What travels with the package in the folder where mim and mmengine look for the
# configurations and tools of an OpenMMLab package.
MIM_ENTRIES = ('configs', 'tools', 'model-index.yml')

PYTHON_REQUIRES = '>=3.10,<3.13'
REQUIREMENTS = [
    'torch>=2.2',
    'numpy',
]

# The toolkits are extras, since there are two stacks whose distributions put files
# into the same import packages: an environment holds one of them, never both. mmcv
# must be built with torch present and without build isolation, or it silently lacks
# its operators: see tools/setup_env.sh.
EXTRAS = {
    'onedl': [
        'torch>=2.4',
        'torchvision',
        'onedl-mmengine>=0.10.12,<0.11',
        'onedl-mmcv>=2.3.6,<2.4',
        'onedl-mmdetection>=3.5.1,<3.6',
        'onedl-mmsegmentation>=1.4.2,<1.5',
        'onedl-mmpretrain>=1.3.6,<1.4',
        # mmengine's report of the environment imports distutils, which setuptools
        # provides from Python 3.12 on.
        'setuptools>=80,<82',
    ],
    'openmmlab': [
        # mmengine 0.10.7 cannot resume with the torch.load of 2.6.
        'torch>=2.2,<2.6',
        'torchvision',
        'mmengine>=0.10.7,<0.11',
        # mmdet 3.3.0 and mmseg 1.2.2 refuse mmcv 2.2.
        'mmcv>=2.1,<2.2',
        'mmdet>=3.3,<3.4',
        'mmsegmentation>=1.2.2,<1.3',
        'mmpretrain>=1.2,<1.3',
        # mmsegmentation imports them without requiring them.
        'ftfy',
        'regex',
        # torch 2.2 and pycocotools of this stack were built for numpy 1.
        'numpy<2',
        'opencv-python<4.12',
        # mmengine 0.10.7 and the setup of mmcv 2.1 import pkg_resources.
        'setuptools>=64,<70',
    ],
    # For the comparisons of the paper: complexity, feature maps and saliency of models
    # that the toolkits do not have, and the methods of attribution.
    'analysis': [
        'timm>=1.0.9,<1.1',
    ],
    # For tools/export.py, which writes ONNX files and runs them. The oldest and the
    # newest releases that the tests have passed with.
    'deploy': [
        'onnx>=1.17,<1.24',
        'onnxruntime>=1.20,<1.33',
    ],
    'tests': [
        # With 9.2, pytest-xdist 3.8 no longer keeps groups of tests together.
        'pytest>=8,<9.2',
        # On two cores the suite takes two thirds of the time in two processes.
        'pytest-xdist>=3.6,<4',
        # One minor release of ruff: another formats differently. The same release
        # stands in .pre-commit-config.yaml.
        'ruff>=0.17.6,<0.18',
    ],
}


def read_version() -> str:
    """Read the version from the package's text, which imports nothing."""
    text = (ROOT / PACKAGE / '__init__.py').read_text(encoding='utf-8')
    match = re.search(r"^__version__ = ['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    if match is None:
        raise RuntimeError(f'no __version__ in {PACKAGE}/__init__.py')
    return match.group(1)


def read_readme() -> str:
    """Return the README, or nothing where a source tree comes without one."""
    readme = ROOT / 'README.md'
    return readme.read_text(encoding='utf-8') if readme.is_file() else ''


def build_base() -> str:
    """Return a build folder of this run alone.

    A ``build/`` that stays in the source tree hands files that were deleted since to
    every later wheel.
    """
    folder = tempfile.mkdtemp(prefix=f'{PACKAGE}-build-')
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class BuildWithMim(build_py):
    """Put configs, tools and model index under ``convmlp_mm/.mim``.

    A wheel gets copies, made in the build folder; an editable install gets links in
    the (git-ignored) source tree, so that edits count at once.
    """

    def run(self):
        super().run()
        if getattr(self, 'editable_mode', False):
            self.link_entries()
        else:
            for source, target in self.copies():
                Path(target).parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(str(source), target)

    def get_outputs(self, include_bytecode=1):
        outputs = super().get_outputs(include_bytecode)
        if getattr(self, 'editable_mode', False):
            return outputs
        return outputs + [target for _, target in self.copies()]

    def copies(self) -> list[tuple[Path, str]]:
        """Pair each file to carry with its place in the build folder."""
        mim = Path(self.build_lib, PACKAGE, '.mim')
        files = []
        for entry in MIM_ENTRIES:
            source = ROOT / entry
            files += [source] if source.is_file() else sorted(source.rglob('*'))
        return [
            (file, str(mim / file.relative_to(ROOT)))
            for file in files
            if file.is_file() and not self.is_rubbish(file.relative_to(ROOT))
        ]

    @staticmethod
    def is_rubbish(path: Path) -> bool:
        """Tell bytecode, caches, hidden files and editors' copies."""
        return path.suffix in {'.pyc', '.pyo'} or any(
            part.startswith('.') or part.endswith('~') or part == '__pycache__'
            for part in path.parts
        )

    def link_entries(self):
        """Make the links anew, so that none points to what is gone."""
        mim = ROOT / PACKAGE / '.mim'
        shutil.rmtree(mim, ignore_errors=True)
        mim.mkdir()
        for entry in MIM_ENTRIES:
            if (ROOT / entry).exists():
                (mim / entry).symlink_to(Path('..', '..', entry))


if __name__ == '__main__':
    options = {'build': {'build_base': build_base()}}
    if 'sdist' not in sys.argv:
        # An egg-info left in the source tree passes for an installed distribution
        # wherever that tree is the working folder. (An sdist carries its own.)
        options['egg_info'] = {'egg_base': build_base()}
    setup(
        name=PACKAGE,
        version=read_version(),
        description='ConvMLP backbones for OpenMMLab: classification, detection and '
        'segmentation',
        long_description=read_readme(),
        long_description_content_type='text/markdown',
        author='The convmlp_mm authors',
        license='Apache-2.0',
        license_files=['LICENSE'],
        keywords=[
            'computer vision',
            'ConvMLP',
            'object detection',
            'semantic segmentation',
            'image classification',
            'OpenMMLab',
        ],
        classifiers=[
            'Development Status :: 4 - Beta',
            'Intended Audience :: Science/Research',
            'Operating System :: POSIX',
            'Programming Language :: Python :: 3',
            'Programming Language :: Python :: 3.10',
            'Programming Language :: Python :: 3.11',
            'Programming Language :: Python :: 3.12',
            'Topic :: Scientific/Engineering :: Artificial Intelligence',
        ],
        python_requires=PYTHON_REQUIRES,
        packages=find_packages(include=[PACKAGE, f'{PACKAGE}.*']),
        include_package_data=False,
        install_requires=REQUIREMENTS,
        extras_require=EXTRAS,
        cmdclass={'build_py': BuildWithMim},
        options=options,
        zip_safe=False,
    )
