"""Carries configurations and tools in the package; the rest is in pyproject.toml."""

import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = 'convmlp_mm'

# What travels with the package in the folder where mim and mmengine look for the
# configurations and tools of an OpenMMLab package.
FOLDERS, INDEX = ('configs', 'tools'), 'model-index.yml'
CACHES = shutil.ignore_patterns('.*', '__pycache__', '*.py[co]', '*~')


class BuildWithMim(build_py):
    """Put configs, tools and model index under ``convmlp_mm/.mim``.

    A wheel gets copies, made in the build folder; an editable install gets links in
    the (git-ignored) source tree, so that edits count at once.
    """

    def run(self):
        super().run()
        if self.editable_mode:
            mim = ROOT / PACKAGE / '.mim'
            shutil.rmtree(mim, ignore_errors=True)
            mim.mkdir()
            for entry in (*FOLDERS, INDEX):
                (mim / entry).symlink_to(Path('..', '..', entry))
        else:
            mim = Path(self.build_lib, PACKAGE, '.mim')
            # A build folder that is used again has the folders of the last build.
            options = dict(ignore=CACHES, dirs_exist_ok=True)
            for name in FOLDERS:
                shutil.copytree(ROOT / name, mim / name, **options)
            shutil.copy2(ROOT / INDEX, mim)

    def get_outputs(self, include_bytecode=1):
        carried = Path(self.build_lib, PACKAGE, '.mim').rglob('*')
        files = [str(path) for path in carried if path.is_file()]
        return super().get_outputs(include_bytecode) + files


if __name__ == '__main__':
    # A build/ that stays in the source tree hands files that were deleted since to
    # every later wheel, and an egg-info there passes for an installed distribution
    # wherever that tree is the working folder. (An sdist carries its own.)
    with tempfile.TemporaryDirectory(prefix=f'{PACKAGE}-build-') as folder:
        options = {'build': {'build_base': folder}}
        if 'sdist' not in sys.argv:
            options['egg_info'] = {'egg_base': folder}
        setup(cmdclass={'build_py': BuildWithMim}, options=options)
