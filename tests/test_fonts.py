"""The faces of the site: small, licensed, with every letter that the pages write, and asked for in time."""

import re
import sys
import unicodedata
from pathlib import Path

import fonts
import nbformat
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "book" / "_ext"))

import finish

ROOT = Path(__file__).resolve().parent.parent
STATIC = ROOT / "book" / "_static"
CSS = (STATIC / "book.css").read_text("utf-8")
LIGHTEST = 80_000  # bytes of all faces together
MATHS = re.compile(r"\$\$.*?\$\$|\$[^$]*\$|`[^`]*`", re.S)


def prose():
    """Yield name and text of every page that is written as text."""
    for path in sorted((ROOT / "book").glob("*.md")):
        yield path.name, path.read_text("utf-8")
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        cells = nbformat.read(path, 4).cells
        yield path.name, "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def test_faces_are_small_and_come_with_their_licences():
    sources = set(re.findall(r"url\((fonts/[\w-]+\.woff2)\)", CSS))
    files = {path.relative_to(STATIC).as_posix() for path in fonts.FONTS.glob("*.woff2")}
    assert sources == files == {f"fonts/{face}.woff2" for face in fonts.FACES}
    assert sum((STATIC / file).stat().st_size for file in files) <= LIGHTEST
    for kind in ("text", "code"):
        licence = (fonts.FONTS / f"OFL-{kind}.txt").read_text("utf-8")
        assert (
            "SIL OPEN FONT LICENSE Version 1.1" in licence and re.match("©|Copyright", licence)
        )
    assert all("Source" not in name for name in fonts.NAMES.values())  # a reserved name


def test_every_letter_of_the_pages_is_in_the_face():
    missing = {}
    for name, text in prose():
        letters = {c for c in MATHS.sub("", text) if not c.isspace() and ord(c) > 126}
        wide = {c for c in letters if unicodedata.east_asian_width(c) in "WF"}  # Chinese terms
        lacking = letters - wide - set(map(chr, fonts.CHARACTERS))
        if lacking:
            missing[name] = sorted(lacking)
    assert missing == {}


def test_every_face_swaps_and_has_a_fallback_of_its_width():
    for rule in re.findall(r"@font-face \{[^}]*\}", CSS):
        assert "font-display: swap" in rule or "size-adjust" in rule, rule
    for name in ("base", "monospace"):
        families = re.search(rf"--pst-font-family-{name}: ([^;]*);", CSS)[1].split(", ")
        face = families[0].strip('"')
        assert re.search(rf'"{face} 2"; src: local', CSS), f"no fallback for {face}"
        assert families[-1] in ("serif", "monospace")


def test_the_fonts_of_the_first_screen_are_preloaded():
    class App:
        srcdir = ROOT
        config = type("Config", (), {"preview_picture": "samples.png", "html_title": "A book"})

    context = {"title": "A page", "pathto": lambda name, resource: f"../{name}"}
    finish.on_page(App, "nbs/a", "page.html", context, None)
    found = re.findall(r'<link rel="preload" href="\.\./_static/(\S+)"', context["metatags"])
    assert found == [f"fonts/{face}.woff2" for face in finish.PRELOADED]
    assert all((STATIC / name).is_file() for name in found)


@pytest.mark.parametrize("own", ["", '<meta content="Mine." name="description" />'])
def test_a_page_is_described_once(own):
    class App:
        srcdir = ROOT
        config = type("Config", (), {"preview_picture": "samples.png", "html_title": "A book"})

    context = {"title": "Source &amp; names", "metatags": own, "pathto": lambda name, resource: name}
    finish.on_page(App, "_modules/a", "page.html", context, None)
    assert context["metatags"].count('name="description"') == 1
    assert "Source &amp; names: a page of A book." in context["metatags"]


def test_excerpts_of_the_search_hold_no_formulas():
    sphinx = pytest.importorskip("sphinx")
    text = next(Path(sphinx.__file__).parent.rglob("searchtools.js")).read_text("utf-8")
    assert '".math"' in finish.without_formulas(text) and '".math"' not in text
    with pytest.raises(ValueError, match="not as it was"):
        finish.without_formulas("Search = {}")
