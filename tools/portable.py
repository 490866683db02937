"""List the test files that need nothing but the package, what it needs, and pytest: they run on any versions, on the wheel alone.

Usage: python tools/portable.py
"""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = {"scikit-learn": "sklearn", "pillow": "PIL"}
TOOLS = {"pytest", "hypothesis", "mpmath", "scipy", "conftest"}
REPOSITORY = re.compile(r"\bROOT\b|__file__|parents?\b")  # a file that looks around in the repository


def allowed():
    """Collect the modules that may be imported."""
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    brought = {NAMES.get(found, found) for found in (re.match(r"[\w-]+", line)[0] for line in lines)}
    helpers = {path.stem for path in (ROOT / "tests").glob("*.py") if not path.stem.startswith("test_")}
    return brought | TOOLS | helpers | {"ddpm_nb"} | set(sys.stdlib_module_names)


def imported(path):
    """Collect the first names of all modules that a file imports, inside functions included."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.partition(".")[0] for name in names}


def portable():
    """List the files, from the root of the repository."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [f"tests/{p.name}" for p in files if imported(p) <= allowed() and not REPOSITORY.search(p.read_text(encoding="utf-8"))]


if __name__ == "__main__":
    print("\n".join(portable()))
