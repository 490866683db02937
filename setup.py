"""Build a wheel whose `help()` shows each parameter, and whose description has links that work.

The sources stay as exported: an editable install reads them, and its `help()` has one line.
"""

import re
import sys
import tomllib
from pathlib import Path
from urllib.parse import urljoin

from setuptools import setup
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))
import docstrings

HERE = Path(__file__).resolve().parent


class BuildWithTexts(build_py):
    """Copy the modules, and complete the docstrings of the copies."""

    def run(self):
        """Build as usual, then write the comment beside each parameter into the docstrings."""
        super().run()
        if not self.editable_mode:
            docstrings.write(Path(self.build_lib, "ddpm_nb"))


def readme():
    """Return the README with links and pictures that are found from outside the repository."""
    project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    repository = project["urls"]["Repository"]

    def whole(found):
        place = "raw" if found[1].endswith(".png") else "blob"
        return f"]({urljoin(f'{repository}/{place}/HEAD/', found[1])})"

    return re.sub(r"\]\(([^)]+)\)", whole, (HERE / "README.md").read_text(encoding="utf-8"))


setup(
    cmdclass={"build_py": BuildWithTexts},
    long_description=readme(),
    long_description_content_type="text/markdown",
)
