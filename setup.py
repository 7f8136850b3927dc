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
MIM_ENTRIES = ('configs', 'tools', 'model-index.yml')


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
            for entry in MIM_ENTRIES:
                (mim / entry).symlink_to(Path('..', '..', entry))
        else:
            for source, target in self.copies():
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))

    def get_outputs(self, include_bytecode=1):
        outputs = super().get_outputs(include_bytecode)
        if self.editable_mode:
            return outputs
        return outputs + [str(target) for _, target in self.copies()]

    def copies(self) -> list[tuple[Path, Path]]:
        """Pair each file to carry with its place in the build folder."""
        mim = Path(self.build_lib, PACKAGE, '.mim')
        files = [path for entry in MIM_ENTRIES for path in self.files(ROOT / entry)]
        return [(file, mim / file.relative_to(ROOT)) for file in files]

    def files(self, path: Path) -> list[Path]:
        """List a file or the files of a folder, without caches and editors' copies."""
        if path.name.startswith(('.', '__pycache__')) or path.suffix in (
            '.pyc',
            '.pyo',
        ):
            return []
        if path.is_dir():
            return sum(map(self.files, sorted(path.iterdir())), [])
        return [path] if path.is_file() and not path.name.endswith('~') else []


if __name__ == '__main__':
    # A build/ that stays in the source tree hands files that were deleted since to
    # every later wheel, and an egg-info there passes for an installed distribution
    # wherever that tree is the working folder. (An sdist carries its own.)
    with tempfile.TemporaryDirectory(prefix=f'{PACKAGE}-build-') as folder:
        options = {'build': {'build_base': folder}}
        if 'sdist' not in sys.argv:
            options['egg_info'] = {'egg_base': folder}
        setup(cmdclass={'build_py': BuildWithMim}, options=options)
