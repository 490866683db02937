"""Build a wheel whose `help()` shows the text of each parameter; the sources stay as exported."""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))
import docstrings


class BuildWithTexts(build_py):
    """Copy the modules, and complete the docstrings of the copies."""

    def run(self):
        """Build as usual, then write the comment beside each parameter into the docstrings."""
        super().run()
        if not self.editable_mode:
            docstrings.write(Path(self.build_lib, "ddpm_nb"))


setup(cmdclass={"build_py": BuildWithTexts})
