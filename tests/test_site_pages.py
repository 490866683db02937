"""What is done to the built pages: what is left out of them, what is put in, and what a browser sees."""

import sys
from pathlib import Path

import check_site
import look
import pytest
from docutils import nodes
from docutils.core import publish_doctree
from fontTools.ttLib import TTFont

sys.path.append(str(Path(__file__).resolve().parent.parent / "book" / "_ext"))

import finish

HEAD = (
    '<meta name="viewport" content="width=device-width, initial-scale=1.0" />'
    '<meta name="viewport" content="width=device-width, initial-scale=1" />'
    '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
    '<script defer src="../_static/scripts/fontawesome.js?digest=1"></script>'
    '<script src="../searchindex.js"></script>'
    '<script defer="defer" src="../_static/mathjax/tex-chtml-full.js"></script>'
    '<script src="../_static/fit.js"></script>'
    '<script src="../_static/touch.js"></script>'
)


def test_page_loses_what_it_does_not_use():
    plain = finish.lighten(HEAD, is_search=False)
    assert plain.count("viewport") == 1
    assert plain.count("<script") == 1 and "fit.js" in plain
    assert "mathjax" in finish.lighten(HEAD + '<span class="math notranslate">x</span>', False)
    assert "touch.js" in finish.lighten(HEAD + '<div class="touch" role="group">', False)
    assert "searchindex" in finish.lighten(HEAD, is_search=True)
    assert finish.lighten(plain, is_search=False) == plain


def test_what_is_seen_is_what_is_heard():
    page = (
        '<button class="btn search-button-field pst" title="Search" aria-label="Search">Search Ctrl+K</button>'
        '<summary aria-label="Toggle hidden content">Show the code</summary>'
        '<table><tr><th class="head"><p></p></th><th class="head"><p>T</p></th></tr></table>'
    )
    text = finish.lighten(page, is_search=False)
    assert "aria-label" not in text and 'title="Search"' in text
    assert text.count("<th ") == 1 and '<td class="head"></td>' in text


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('<button aria-label="Search">Find it</button>', "calls 'Find it' 'Search'"),
        ("<button><i></i></button>", "has a button without a name"),
        ('<input type="range">', "has a field without a name"),
        ("<table><tr><th> </th></tr></table>", "has a table with an empty heading"),
        ('<button aria-label="Play the walk">Play</button>', None),
        ('<label for="t">t</label><input type="range" id="t">', None),
        ('<label><input type="radio"> one</label>', None),
    ],
)
def test_names_of_controls_and_columns_are_checked(tmp_path, text, fault):
    (tmp_path / "page.html").write_text(f"<!doctype html><body>{text}</body>")
    found = list(check_site.access_faults(check_site.Page(tmp_path / "page.html")))
    assert [words[: len(fault)] for words in found] == [fault] if fault else found == []


def test_icons_are_those_of_the_pages(tmp_path):
    (tmp_path / "styles").mkdir()
    found = finish.used_icons(['<i class="fas fa-rocket"></i>', '<i class="fab fa-github"></i>'])
    assert "rocket" in found["solid"] and found["brands"] == {"github"}
    finish.write_icons(tmp_path, found)
    css = (tmp_path / "styles" / "pydata-sphinx-theme.css").read_text("utf-8")
    assert ".fa-rocket:before" in css and ".fa-dragon:before" not in css
    assert "icons-solid.woff" in css and "fa-solid-900.ttf" not in css
    codes = TTFont(tmp_path / "icons-brands.woff").getBestCmap()
    assert list(codes) == [0xF09B]  # GitHub alone
    assert (tmp_path / "icons-solid.woff").stat().st_size < 5000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Some words.\n\n   The summary\n   goes on.\n", "The summary goes on."),
        ("The first paragraph.\n\nThe second.\n", "The first paragraph."),
    ],
)
def test_description_is_the_summary_or_the_first_paragraph(text, words):
    assert finish.describe(publish_doctree(text)) == words


def test_long_description_ends_with_a_whole_word():
    doctree = nodes.paragraph(text="word " * 100)
    text = finish.describe(doctree)
    assert len(text) <= finish.LONGEST + 4 and text.endswith("word ...")
    assert finish.describe(None) == ""


@pytest.mark.skipif(look.find_browser() is None, reason="needs Chromium")
def test_browser_reports_what_is_cut(tmp_path):
    wide = "<div class='highlight'><pre style='overflow: auto'>" + "x" * 300 + "</pre></div>"
    (tmp_path / "good.html").write_text("<!doctype html><div class='highlight'><pre>x</pre></div>")
    (tmp_path / "cut.html").write_text(f"<!doctype html>{wide}")
    (tmp_path / "wide.html").write_text("<!doctype html><p style='width: 900px'>x</p>")
    rows = look.measure(tmp_path, look.list_pages(tmp_path), [800, 390], timeout=120)
    seen = {(row["page"], row["width"]): (row["code"], row["page_too_wide"] > 0) for row in rows}
    assert seen["good.html", 390] == ([0, 1], False)
    assert seen["cut.html", 800][0] == seen["cut.html", 390][0] == [1, 1]
    assert seen["wide.html", 800][1] and seen["wide.html", 390][1]
