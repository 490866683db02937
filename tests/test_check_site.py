"""The site check finds each kind of fault when it is planted in a small site."""

import json
import os

import check_site
import pytest
from check_site import SEARCHED, Page, check, first_picture_fault

PAGE = """<!DOCTYPE html><html><head>
<link rel="stylesheet" href="_static/style.css"><script src="_static/mathjax/tex.js"></script></head>
<body><h1 id="top-title">A page</h1><p>Then <span class="math">\\(x_t\\)</span>.</p>
<figure><img src="a.png" alt="a curve"><figcaption>A curve.</figcaption></figure>
<div class="cell"><div class="cell_input"><pre>import math  # | no directive</pre></div></div>
<div class="cell"><details><div class="cell_input"><pre>%time x = 1
def f(y):
    return math.exp(y) + later</pre></div></details></div>
<div class="cell"><div class="cell_input"><pre>later = x; f(later); display(x)</pre></div></div>
<a href="other.html#part">other</a> <a href="#top-title">up</a> <a href="https://example.org">elsewhere</a>
EXTRA</body></html>"""


def cell(source):
    """Write a cell of code as the book does."""
    return f"<div class='cell'><div class='cell_input'><pre>{source}</pre></div></div>"


@pytest.fixture
def site(tmp_path):
    """Build a small site without faults and return a function that adds to its page and lists the faults."""
    (tmp_path / "_static" / "mathjax").mkdir(parents=True)
    (tmp_path / "_static" / "mathjax" / "tex.js").write_text("")
    (tmp_path / "_static" / "style.css").write_text(
        "p { background: url(data:image/png;base64,AA) }"
    )
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "other.html").write_text("<p id='part'>part</p>")

    def faults(extra="", old="", new=""):
        (tmp_path / "index.html").write_text(
            PAGE.replace(old, new).replace("EXTRA", extra) if old else PAGE.replace("EXTRA", extra)
        )
        return check(tmp_path)

    faults.root = tmp_path
    return faults


def test_good_site_has_no_faults(site):
    assert site() == []


@pytest.mark.parametrize(
    ("extra", "fault"),
    [
        (
            "<script src='https://cdn.example.org/a.js'></script>",
            "loads https://cdn.example.org/a.js",
        ),
        ("<script src='//cdn.example.org/a.js'></script>", "loads //cdn.example.org/a.js"),
        (
            "<link rel='stylesheet' href='http://example.org/a.css'>",
            "loads http://example.org/a.css",
        ),
        ("<link rel='icon' href='https://example.org/a.ico'>", "loads https://example.org/a.ico"),
        ("<img alt='x' src='https://example.org/a.png'>", "loads https://example.org/a.png"),
        ("<iframe src='https://example.org'></iframe>", "loads https://example.org"),
        ("<style>@import 'https://example.org/a.css';</style>", "loads https://example.org/a.css"),
        (
            "<p style='background: url(https://example.org/a.png)'>x</p>",
            "loads https://example.org/a.png",
        ),
        ("<img alt='x' src='gone.png'>", "loads gone.png, which does not exist"),
        ("<a href='gone.html'>x</a>", "links to gone.html, which does not exist"),
        ("<a href='other.html#gone'>x</a>", "links to other.html#gone, which has no such anchor"),
        ("<a href='#gone'>x</a>", "links to #gone, which has no such anchor"),
        ("<p>and $$x = 1$$</p>", "shows raw TeX"),
        ("<p>and \\(x\\)</p>", "shows raw TeX"),
        ("<p>and $x_t$ again</p>", "shows raw TeX"),
        ("<img src='a.png'>", "without alternative text"),
        (
            "<img src='a.png' alt='x' style='width: 9px; height: 9px;'>",
            "with a fixed height, distorted",
        ),
        ("<img src='a.png' alt='_images/a.png'>", "without alternative text"),
        (
            "<figure id='fig'><img src='a.png' alt='x'></figure>",
            "has a figure without a caption: fig",
        ),
        (cell("print(y)"), "in code cell 4: Undefined name `y`"),
        (cell("z = z + 1"), "in code cell 4: Undefined name `z`"),
        (cell("g(1)") + cell("def g(n):\n    return n"), "in code cell 4: Undefined name `g`"),
        (cell("def g(n):\n    return n + lost"), "in code cell 4: Undefined name `lost`"),
        (cell("x ="), "in code cell 4: Expected an expression"),
        ("<div class='cell'><pre>#| export\nx = 1</pre></div>", "shows the directive #| export"),
    ],
)
def test_planted_fault_is_found(site, extra, fault):
    found = site(extra)
    assert len(found) == 1
    assert fault in found[0]


def test_missing_mathjax_is_found(site):
    (site.root / "_static" / "mathjax" / "tex.js").unlink()
    assert "mathjax/tex.js, which does not exist" in site()[0]
    assert (
        "has mathematics but no MathJax"
        in site("", '<script src="_static/mathjax/tex.js"></script>', "")[0]
    )


def test_remote_style_sheet_is_found(site):
    (site.root / "_static" / "style.css").write_text(
        "@font-face { src: url('https://example.org/a.woff') }"
    )
    assert site() == ["_static/style.css loads https://example.org/a.woff"]


def test_code_and_outputs_may_show_tex(site):
    assert (
        site(
            "<pre>$$x$$</pre><p><code>\\alpha</code></p><div class='output'>$x_t$</div><p>5 $ and 6 $</p>"
        )
        == []
    )


def test_folder_without_pages_is_a_fault(tmp_path):
    assert "has no pages" in check(tmp_path)[0]


def test_search_that_finds_another_page_first_is_found(site):
    pages = list(dict.fromkeys(SEARCHED.values()))
    entries = {words: [[pages.index(page), "part", True]] for words, page in SEARCHED.items()}
    index = {"docnames": pages, "indexentries": entries}
    path = site.root / "searchindex.js"
    path.write_text(f"Search.setIndex({json.dumps(index)})")
    assert site() == []
    entries["elbo"][0][2] = False  # mentioned, not explained
    entries["u-net"].append([0, "", True])
    del entries["noise schedule"]
    path.write_text(f"Search.setIndex({json.dumps(index)})")
    found = [fault.split("'")[1] for fault in site()]
    assert found == ["elbo", "noise schedule", "u-net"]


def test_a_file_that_all_pages_load_is_weighed_once(site):
    (site.root / "_static" / "shared.js").write_text("x = 1;")
    for name in ("a", "b"):
        (site.root / f"{name}.html").write_text("<html><head><script src='_static/shared.js'></script></head></html>")
    site()
    assert check_site.packed.cache_info().hits > 0


def test_what_a_page_weighs_is_listed_by_kind_without_its_pictures(site):
    (site.root / "text.woff2").write_bytes(os.urandom(40_000))
    (site.root / "_static" / "shared.js").write_bytes(os.urandom(20_000).hex().encode())
    (site.root / "a.png").write_bytes(os.urandom(90_000))
    site("<link rel='preload' href='text.woff2'><script src='_static/shared.js?digest=1'></script>")
    heading, first, second = check_site.list_weights(site.root)
    assert heading.split()[-5:] == ["all", "text", "scripts", "styles", "fonts"]
    name, whole, text, scripts, styles, fonts = first.split()
    assert (name, styles, fonts) == ("index.html", "0", "40") and int(text) <= 1
    assert 20 < int(scripts) < 25 and abs(int(whole) - int(scripts) - 41) <= 1
    assert second.split() == ["other.html", "0", "0", "0", "0", "0"]


def test_head_and_weight_of_a_page_of_a_whole_site(site):
    """A page below the root has each tag once, and loads neither search nor MathJax without need."""
    pages = list(dict.fromkeys(SEARCHED.values()))
    entries = {words: [[pages.index(page), "part", True]] for words, page in SEARCHED.items()}
    index = json.dumps({"docnames": pages, "indexentries": entries})
    (site.root / "searchindex.js").write_text(f"Search.setIndex({index})")
    (site.root / "nbs").mkdir()
    good = (
        "<title>A</title><meta name='viewport'><link rel='canonical' href='https://example.org/a'>"
        "<meta property='og:image' content='https://example.org/a.png'>"
        "<meta name='description' content='A page.'><link rel='apple-touch-icon' href='../icon.png'>"
    )

    def write(head):
        (site.root / "nbs" / "a.html").write_text(f"<html><head>{head}</head><body></body></html>")
        return [fault.removeprefix("nbs/a.html ") for fault in site()]

    assert write(good) == []
    assert write(good + "<meta name='viewport'>") == ["has 2 times a viewport"]
    assert write(good.replace("<title>A</title>", "")) == ["has 0 times a title"]
    assert (
        "only the search page needs" in write(f"{good}<script src='../searchindex.js'></script>")[0]
    )
    mathjax = "<script src='../_static/mathjax/tex.js'></script>"
    assert write(good + mathjax) == ["loads MathJax and has no mathematics"]
    (site.root / "_static" / "style.css").write_bytes(os.urandom(310_000).hex().encode())
    assert any(
        "bytes; 300,000 are allowed" in f
        for f in write(f"{good}<link rel='stylesheet' href='../_static/style.css'>")
    )


@pytest.mark.parametrize(
    ("words", "is_fault"),
    [
        ("<h2>One</h2><p>x</p><img alt='a curve' src='a.png'>", True),
        ("<img alt='a curve' src='a.png'><h2>One</h2>", False),
        ("<h2>One</h2><p>No pictures.</p>", False),
    ],
)
def test_a_chapter_shows_a_picture_before_its_first_section(tmp_path, words, is_fault):
    (tmp_path / "09_training.html").write_text(f"<article>{words}</article>")
    found = first_picture_fault(Page(tmp_path / "09_training.html"))
    assert found == ["shows no picture before its first section"] * is_fault
    (tmp_path / "notation.html").write_text(f"<article>{words}</article>")
    assert first_picture_fault(Page(tmp_path / "notation.html")) == []
