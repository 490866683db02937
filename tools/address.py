"""Write the repository's address, kept in settings.ini, into the install cell of every notebook."""

import configparser
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CELL = """#| hide
#| eval: false
import sys
if "google.colab" in sys.modules:
    %pip install -q git+https://github.com/{user}/{repo}@{branch}"""


def install_cell(root=ROOT):
    """Write the source of the cell that installs the package on Colab."""
    settings = configparser.ConfigParser()
    settings.read(root / "settings.ini")
    return CELL.format(**settings["DEFAULT"])


def install_cells(notebook):
    """List the code cells of a notebook that install the package."""
    return [c for c in notebook["cells"] if c["cell_type"] == "code" and "google.colab" in "".join(c["source"])]


def disagreeing(root=ROOT):
    """List the notebooks whose install cell is missing, doubled or not the one that settings.ini asks for."""
    wanted, wrong = install_cell(root), []
    for path in sorted((root / "nbs").glob("[0-9]*.ipynb")):
        found = ["".join(cell["source"]) for cell in install_cells(json.loads(path.read_text(encoding="utf-8")))]
        wrong += [path] if found != [wanted] else []
    return wrong


def write(path, source):
    """Replace the source of a notebook's install cell."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = install_cells(notebook)
    if len(cells) != 1:
        sys.exit(f"{path.name} has {len(cells)} install cells; it needs one, like this:\n{source}")
    cells[0]["source"] = source.splitlines(keepends=True)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main():
    """Correct every notebook that disagrees with settings.ini."""
    paths = disagreeing()
    for path in paths:
        write(path, install_cell())
    print(f"{len(paths)} notebooks changed" if paths else "every notebook has the address in settings.ini")


if __name__ == "__main__":
    main()
