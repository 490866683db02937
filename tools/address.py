"""Write the repository's address, kept in settings.ini, wherever else it must stand: install cells, README, pyproject.toml, the index of names.

Usage: python tools/address.py            (needs Python alone)
       python tools/address.py --check OWNER/NAME   (end with 1, and say what to do, if settings.ini names another repository)
"""

import configparser
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CELL = """#| hide
#| eval: false
import sys
if "google.colab" in sys.modules:
    # Half a minute. The torch that is here stays, and nothing needs a restart.
    !pip install -q "{lib_name}[book] @ git+https://github.com/{user}/{repo}@{branch}\""""
URLS = """[project.urls]
Homepage = "https://{user}.github.io/{repo}/"
Repository = "https://github.com/{user}/{repo}"
Issues = "https://github.com/{user}/{repo}/issues"
"""
LINKS = (
    "[Read the book](https://{user}.github.io/{repo}/) or "
    "[run its first page on Colab](https://colab.research.google.com/github/{user}/{repo}/blob/{branch}/nbs/00_start.ipynb)"
)
INSTALL = "pip install git+https://github.com/{user}/{repo}"
INDEX = {
    "doc_host": "https://{user}.github.io",
    "doc_baseurl": "/{repo}",
    "git_url": "https://github.com/{user}/{repo}",
}


def settings(root=ROOT):
    """Read settings.ini."""
    parser = configparser.ConfigParser()
    parser.read(root / "settings.ini")
    return parser["DEFAULT"]


def install_cell(root=ROOT):
    """Write the source of the cell that installs the package on Colab."""
    return CELL.format(**settings(root))


def install_cells(notebook):
    """List the code cells of a notebook that install the package."""
    return [
        c
        for c in notebook["cells"]
        if c["cell_type"] == "code" and "google.colab" in "".join(c["source"])
    ]


def with_cell(text, source, name):
    """Return a notebook's text with this install cell."""
    notebook = json.loads(text)
    cells = install_cells(notebook)
    if len(cells) != 1:
        raise ValueError(
            f"{name} has {len(cells)} install cells; it needs one, like this:\n{source}"
        )
    cells[0]["source"] = source.splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def with_urls(text, root):
    """Return pyproject.toml with the addresses of the project."""
    return re.sub(
        r"\[project\.urls\]\n(?:\w+ = .*\n)*", lambda _: URLS.format(**settings(root)), text
    )


def with_links(text, root):
    """Return the README with the line that installs, and links to the published book and to its first notebook on Colab."""
    text = re.sub(r"^pip install git\+\S+$", lambda _: INSTALL.format(**settings(root)), text, flags=re.M)
    pattern = r"\[Read the book\]\([^)]*\) or\s\[run its first page on Colab\]\([^)]*\)"
    return re.sub(pattern, lambda _: LINKS.format(**settings(root)), text)


def with_index(text, root):
    """Return the index of names, which nbdev_export writes, with the addresses of the project."""
    for key, value in INDEX.items():
        text = re.sub(
            rf"('{key}': ')[^']*'", lambda m, v=value: m[1] + v.format(**settings(root)) + "'", text
        )
    return text


def corrected(root=ROOT):
    """Return what each file that holds the address ought to say."""
    source = install_cell(root)
    found = {}
    for path in sorted((root / "nbs").glob("[0-9]*.ipynb")):
        text = path.read_text(encoding="utf-8")
        cells = install_cells(json.loads(text))
        same = len(cells) == 1 and "".join(cells[0]["source"]) == source
        found[path] = text if same else with_cell(text, source, path.name)
    for path, correct in (
        (root / "README.md", with_links),
        (root / "pyproject.toml", with_urls),
        (root / settings(root)["lib_name"] / "_modidx.py", with_index),
    ):
        if path.is_file():
            found[path] = correct(path.read_text(encoding="utf-8"), root)
    return found


def disagreeing(root=ROOT):
    """List the files whose address is missing, doubled or not the one in settings.ini."""
    wanted = install_cell(root)
    wrong = []
    for path in sorted((root / "nbs").glob("[0-9]*.ipynb")):
        cells = install_cells(json.loads(path.read_text(encoding="utf-8")))
        wrong += [path] if ["".join(cell["source"]) for cell in cells] != [wanted] else []
    if wrong:
        return wrong
    return [
        path for path, text in corrected(root).items() if path.read_text(encoding="utf-8") != text
    ]


def check(repository, root=ROOT):
    """Return what is wrong if settings.ini does not name this repository, OWNER/NAME."""
    named = f"{settings(root)['user']}/{settings(root)['repo']}"
    if named == repository:
        return None
    owner, _, name = repository.partition("/")
    return (
        f"settings.ini names {named}, but this is {repository}: the published notebooks would install, and the book would link to, "
        f"another project. Set `user = {owner}` and `repo = {name}` in settings.ini, run `make address`, and commit."
    )


def main():
    """Correct every file that disagrees with settings.ini, or check the address."""
    if sys.argv[1:]:
        if len(sys.argv) != 3 or sys.argv[1] != "--check" or sys.argv[2].count("/") != 1:
            sys.exit(__doc__.partition("\n\n")[2].rstrip())
        sys.exit(check(sys.argv[2]))
    try:
        texts = corrected()
    except ValueError as error:
        sys.exit(str(error))
    changed = [path for path, text in texts.items() if path.read_text(encoding="utf-8") != text]
    for path in changed:
        path.write_text(texts[path], encoding="utf-8")
    print(
        f"{len(changed)} files changed" if changed else "every file has the address in settings.ini"
    )


if __name__ == "__main__":
    main()
