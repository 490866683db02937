"""Each chapter that has pictures shows one at its top, and the list of these names what is there."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from docutils import nodes
from docutils.frontend import get_default_settings
from docutils.parsers.rst import Parser
from docutils.utils import new_document

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "book" / "_ext"))
import first_picture as first  # noqa: E402

LIST = first.read_list(ROOT)
CHAPTERS = {f"nbs/{path.stem}": path for path in sorted((ROOT / "nbs").glob("*.ipynb"))}


def cells_of(docname):
    """Return the cells of a chapter."""
    return json.loads(CHAPTERS[docname].read_text())["cells"]


def figures_of(docname):
    """List the names of a chapter's figures."""
    cells = cells_of(docname)
    drawn = [cell["metadata"].get("mystnb", {}).get("figure", {}).get("name") for cell in cells]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    return [*filter(None, drawn), *re.findall(r"^:name: (fig-[\w-]+)$", "\n".join(texts), re.M)]


def test_the_list_names_figures_that_are_there():
    assert set(LIST) <= set(CHAPTERS)
    for docname, (name, sentence) in LIST.items():
        assert name in figures_of(docname), f"{docname} has no figure {name}: see {first.LISTED}"
        assert re.fullmatch(r"[A-Z].{20,160}[.?]", sentence), sentence
        assert re.search(r"^> \S", "".join(cells_of(docname)[0]["source"]), re.M)


@pytest.mark.parametrize("docname", CHAPTERS)
def test_a_chapter_with_pictures_has_one_at_its_top(docname):
    begins_with_one = "```{figure}" in "".join(cells_of(docname)[0]["source"])
    assert begins_with_one != (docname in LIST) or not figures_of(docname)


# stands for Sphinx, with one page whose figure has a number
NUMBERS = {"nbs/09_training": {"figure": {"fig-train-samples": (9, 5)}}}
APP = SimpleNamespace(srcdir=ROOT, env=SimpleNamespace(toc_fignumbers=NUMBERS))


def page(name):
    """Build a page: title, sentence, a figure of this name."""
    document = new_document("page", get_default_settings(Parser))
    figure = nodes.figure("", nodes.image(uri="a.png", alt="digits", width="80%"), ids=[name])
    section = nodes.section("", nodes.title("", "Training"), nodes.block_quote())
    section += [nodes.paragraph("", "Words."), figure]
    document += section
    return document


def test_the_picture_stands_below_the_sentence_and_leads_to_its_figure():
    document = page("fig-train-samples")
    first.add_picture(APP, document, "nbs/09_training")
    _, _, top, words, _ = document[0]
    assert top["classes"] == ["first-picture"] and words.astext() == "Words."
    picture = next(top.findall(nodes.image))
    assert picture["uri"] == "a.png" and picture["alt"] == "digits" and "width" not in picture
    link = next(top.findall(nodes.reference))
    assert link["refid"] == "fig-train-samples" and link.astext() == "Fig. 9.5"
    assert top[1].astext().startswith(LIST["nbs/09_training"][1])


def test_a_page_that_is_not_listed_stays_and_a_lost_figure_is_told(caplog):
    document = page("fig-other")
    before = document.pformat()
    first.add_picture(APP, document, "nbs/91_checks")
    assert document.pformat() == before
    first.add_picture(APP, document, "nbs/09_training")
    assert document.pformat() == before and "no figure fig-train-samples" in caplog.text
