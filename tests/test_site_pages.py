"""What is done to the built pages: what is left out of them, what is put in, and what a browser sees."""

import re
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import check_site
import look
import numpy as np
import pdf
import pypdf
import pytest
from docutils import nodes
from docutils.core import publish_doctree
from fontTools.ttLib import TTFont
from PIL import Image

from ddpm_nb import plots

sys.path.append(str(Path(__file__).resolve().parent.parent / "book" / "_ext"))

import figures
import finish
import glossary_index
from nbdev_directives import package_files

STATIC = Path(finish.__file__).resolve().parent.parent / "_static"
ROOT = STATIC.parent.parent
browser = pytest.mark.skipif(look.find_browser() is None, reason="needs Chromium")

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
    assert 0xF09B in codes and len(codes) <= 2  # GitHub, and what style sheets draw
    solid = TTFont(tmp_path / "icons-solid.woff").getBestCmap()
    assert {0xF071, 0xF05A} <= set(solid)  # beside warnings and notes
    assert (tmp_path / "icons-solid.woff").stat().st_size < 8000


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


@browser
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


@browser
def test_what_one_scrolls_through_is_counted(tmp_path):
    """Pictures to the screen, and the longest run of code, which words, outputs and pictures end."""
    code = "<div class='cell'><div class='cell_input'><div class='highlight' style='height: {}px; margin: 0'><pre>x</pre></div></div></div>"
    folded = "<details><summary><p>Show the code</p></summary><div class='highlight' style='height: 9000px'></div></details>"
    picture = "<img width='300' height='{}' style='display: block' src='none.png'>"
    page = "<!doctype html><body style='margin: 0'><article class='bd-article'>{}</article>"
    early = picture.format(700) + "<h2>One</h2>" + code.format(600) + folded + code.format(600) + "<p>words</p>" + code.format(900)
    output = "<div class='cell_output'><div class='highlight' style='height: 2000px'>said</div></div>"
    late = "<p style='height: 790px'>words</p>" + picture.format(400) + code.format(400) + output + code.format(800) + picture.format(10)
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs" / "early.html").write_text(page.format(early))
    (tmp_path / "nbs" / "late.html").write_text(page.format(late))
    (tmp_path / "plain.html").write_text("<!doctype html><p>no article</p>")
    rows = look.measure(tmp_path, ["nbs/early.html", "nbs/late.html", "plain.html"], [1280], timeout=120)
    first, second, plain = (row["scrolled"] for row in rows)
    assert plain is None and (first["soon"], second["soon"]) == (True, False) and first["pictures"] == second["pictures"] == 1
    assert 1.5 < first["code"][0] < 1.7 and first["code"][1] == "One" and second["code"][0] == 1
    assert first["screens"] > 3 and second["screens"] > 5
    *_, none, sparse, coded = look.tell_scrolling(rows)
    assert none == "no picture at once: nbs/late.html" and sparse.endswith(": nbs/late.html, nbs/early.html") and coded.endswith(": nbs/early.html, nbs/late.html")


def run_page(body, script, tmp_path, *options, mode="light"):
    """Load a page with the book's style and script in Chromium and return what a script finds there."""
    if not (tmp_path / "_static").exists():
        (tmp_path / "_static").symlink_to(STATIC)
    head = "<meta charset='utf-8'><link rel='stylesheet' href='_static/book.css'><script src='_static/fit.js'></script>"
    page = f"<!doctype html><html data-theme='{mode}'><head>{head}</head><body><div class='bd-article'>{body}</div>"
    return look.run_script(tmp_path, page, script, *options)


@browser
def test_a_page_is_waited_for_until_it_answers(tmp_path):
    """A busy machine takes longer, and gives the same answer; a script that fails says why, at once."""
    slow = "await new Promise(done => setTimeout(done, 6000)); return getComputedStyle(document.querySelector('button')).minHeight"
    assert run_page("<button class='enlarge'>x</button>", slow, tmp_path) == "28.8px"
    with pytest.raises(RuntimeError, match="the script in the page failed: TypeError"):
        run_page("<p>words</p>", "return document.querySelector('button').clientHeight", tmp_path)
    with pytest.raises(TimeoutError, match="did not answer within 2 s"):
        look.run_script(tmp_path, "<p>words</p>", "await new Promise(() => {})", timeout=2)


CODE = '<div class="highlight"><pre><span></span><span class="k">def</span> f():\n\n    <span class="c1"># two &lt;</span>\n</pre></div>'


def test_lines_of_code_know_their_indent():
    text = finish.hang(CODE)
    assert text.count('<span class="ln"') == 3 and 'style="--in:4ch"' in text
    assert re.sub("</?span[^>]*>", "", text) == re.sub("</?span[^>]*>", "", CODE)
    assert finish.hang(text) == text  # a page that the next build leaves as it is


def test_a_formula_stays_with_its_full_stop():
    formula = '<span class="math notranslate nohighlight">\\(x_t\\)</span>'
    text = f"<p>Draw {formula}, then ({formula}). Or {formula} again.</p>"
    kept = finish.keep_together(text)
    whole = (
        f'<span class="together">{formula},</span>',
        f'<span class="together">({formula}).</span>',
    )
    assert all(words in kept for words in whole) and f"Or {formula} again" in kept
    assert finish.keep_together(kept) == kept


@browser
def test_a_long_line_goes_on_further_in_and_is_copied_as_it_was(tmp_path):
    line = "    x = " + "word " * 60
    page = finish.hang(f'<div class="highlight"><pre><span></span>def f():\n\n{line}\n</pre></div>')
    script = """
    const pre = document.querySelector("pre"), text = document.querySelectorAll(".ln")[2].firstChild;
    const range = document.createRange();
    const box = i => { range.setStart(text, i); range.setEnd(text, i + 1); return range.getBoundingClientRect(); };
    const below = [...text.data.trimEnd()].map((_, i) => box(i)).filter(({ top }) => top > box(4).bottom);
    getSelection().selectAllChildren(pre);
    return [box(4).left, Math.min(...below.map(({ left }) => left)), getSelection().toString()];
    """
    first, further, copied = run_page(page, script, tmp_path, "--window-size=500,600")
    assert further > first + 10
    assert copied.rstrip() == f"def f():\n\n{line}".rstrip()


@browser
def test_the_edge_of_what_scrolls_is_clear_at_its_end(tmp_path):
    page = "<table><tr><td>" + "<td>".join(["a-long-word"] * 40) + "</table>"
    script = """
    const table = document.querySelector("table"), faded = () => getComputedStyle(table).maskImage !== "none";
    const seen = [table.classList.contains("scrolls") && table.tabIndex === 0, faded()];
    for (const left of [9999, 0]) {
      table.scrollLeft = left;
      table.dispatchEvent(new Event("scroll"));
      seen.push(faded());
    }
    return seen;
    """
    assert run_page(page, script, tmp_path, "--window-size=800,600") == [True, True, False, True]


@browser
def test_the_edge_fades_again_when_more_is_hidden(tmp_path):
    page = "<table><tr><td>" + "<td>".join(["a-long-word"] * 40) + "</table>"
    script = """
    const table = document.querySelector("table"), faded = () => getComputedStyle(table).maskImage !== "none";
    table.scrollLeft = 9999;
    table.dispatchEvent(new Event("scroll"));
    const seen = [faded()];
    table.style.maxWidth = "300px";  // as after the turn of a phone
    table.scrollLeft -= 50;
    fitTable(table);
    return [...seen, faded()];
    """
    assert run_page(page, script, tmp_path, "--window-size=800,600") == [False, True]


FORMULA = '<div class="math"><mjx-container display="true" style="display: block; overflow-x: auto; font-size: 110%">{}</mjx-container></div>'
LONG = f'<span style="white-space: nowrap">{"x + " * 60}</span>'


@browser
def test_a_displayed_formula_keeps_the_size_that_mathjax_gave_it(tmp_path):
    script = """
    return [...document.querySelectorAll("div.math")].map(box => {
      fitFormula(box);
      fitFormula(box);
      return box.firstElementChild.style.fontSize;
    });
    """
    short, long = run_page(FORMULA.format("x") + FORMULA.format(LONG), script, tmp_path, "--window-size=800,600")
    assert short == "110%" and 65 <= float(long.removesuffix("%")) < 110


@browser
def test_a_formula_that_was_set_smaller_has_full_size_after_a_tap(tmp_path):
    script = """
    return [...document.querySelectorAll("div.math")].map(box => {
      const formula = box.firstElementChild, sizes = [], note = () => sizes.push([parseFloat(formula.style.fontSize), box.title !== ""]);
      note();
      for (let i = 0; i < 2; i++) { formula.firstChild.dispatchEvent(new Event("click", { bubbles: true })); fitFormula(box); note(); }
      return sizes;
    });
    """
    short, long = run_page(FORMULA.format("<b>x</b>") + FORMULA.format(LONG), script, tmp_path, "--window-size=500,600")
    assert short == [[110, False]] * 3
    assert long[0] == long[2] == [65, True] and long[1] == [110, False]


@browser
def test_the_keyboard_reaches_formulas_that_were_set_smaller_and_no_others(tmp_path):
    """Its button shows while it has the focus, does what a tap does, and goes when there is room again; no formula is a tab stop for nothing."""
    script = """
    const boxes = [...document.querySelectorAll("div.math")], [short, long] = boxes, formula = long.firstElementChild;
    const wait = () => new Promise(done => setTimeout(done, 100));
    const stops = () => boxes.map(box => [...box.querySelectorAll("button, [tabindex='0']")].map(e => e.textContent.slice(0, 7)));
    const seen = [stops()], button = long.querySelector("button"), hidden = getComputedStyle(button).opacity;
    button.focus({ focusVisible: true });
    const shown = getComputedStyle(button).opacity, sizes = [];
    for (let i = 0; i < 2; i++) { button.click(); await wait(); sizes.push([parseFloat(formula.style.fontSize), button.textContent]); }
    formula.firstChild.textContent = "x";
    await wait();
    return { seen: [...seen, stops()], opacities: [hidden, shown].map(Number), sizes };
    """
    # set smaller, it fits and needs no scrolling
    fits = FORMULA.format(LONG.replace("x + " * 60, "x + " * 20))
    found = run_page(FORMULA.format("x") + fits, script, tmp_path, "--window-size=500,600")
    assert found["seen"] == [[[], ["Enlarge"]], [[], []]]
    assert found["opacities"][0] == 0 and found["opacities"][1] > 0.8
    (full, told), (small, after) = found["sizes"]
    assert full == 110 > small and (told, after) == ("Shrink formula", "Enlarge formula")


def test_a_browser_that_dies_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(look, "chromium", lambda *_, **__: [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(RuntimeError, match="the browser ended with 3"):
        look.measure(tmp_path, [], [800], timeout=30)


@pytest.mark.parametrize("pattern", tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["ddpm_nb"])
def test_outputs_depend_on_all_that_the_package_ships(pattern):
    shipped = set((ROOT / "ddpm_nb").glob(pattern))
    listed = package_files(ROOT)
    assert shipped and shipped <= set(listed)
    assert ROOT / "ddpm_nb/__init__.py" in listed and not [p for p in listed if p.suffix == ".pyc"]


def test_every_page_waits_for_its_first_term():
    noted = []
    transform = glossary_index.IndexTerms.__new__(glossary_index.IndexTerms)
    transform.document = publish_doctree("words")
    env = SimpleNamespace(srcdir=ROOT, docname="nbs/none", note_dependency=noted.append)
    transform.document.settings.env = env
    transform.apply()
    assert noted == [glossary_index.GLOSSARY]


@browser
def test_a_picture_keeps_its_distance_from_the_words_below(tmp_path):
    image = "<img src='_static/landing-sentence.png' style='width: 100%'>"
    page = (
        f"<section><a class='image-reference'>{image}</a><p style='margin: 0'>words</p></section>"
    )
    script = """
    const [picture, words] = ["img", "p"].map(name => document.querySelector(name).getBoundingClientRect());
    return words.top - picture.bottom;
    """
    assert run_page(page, script, tmp_path) >= 12


def draw_figure(path):
    """Write a figure: a black and a blue line on white, and a sheet of two images; return its pixels."""
    pixels = np.full((120, 300, 3), 255, np.uint8)
    pixels[10:110, 10:12] = 0
    pixels[50:53, 10:140] = (0, 114, 178)
    pixels[10:75, 160:285] = figures.FRAME
    pixels[15:70, 165:220] = 255
    pixels[15:70, 225:280] = 0
    Image.fromarray(pixels).save(path, dpi=(220, 220))
    return pixels


def test_dark_twin_turns_lines_and_keeps_pictures(tmp_path):
    path = tmp_path / "a.png"
    pixels = draw_figure(path)
    twin = np.asarray(figures.turn_dark(Image.open(path)))
    assert (twin[0, 0, 3], twin[100, 200, 3]) == (0, 0)  # the ground
    assert (twin[20, 10] >= (230, 230, 230, 255)).all()  # black is light
    red, green, blue, opacity = map(int, twin[51, 60])
    assert blue > green > red and blue > 220 and opacity > 220  # blue is a lighter blue
    assert (twin[10:75, 160:285, :3] == pixels[10:75, 160:285]).all()
    sheet = Image.fromarray(pixels[10:75, 160:285])
    assert figures.turn_dark(sheet) is None
    for path in STATIC.glob("landing-*.png"):  # with few greys
        assert figures.turn_dark(Image.open(path)) is None, path.name


def test_twin_over_black_is_the_turned_figure():
    colours = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    colours[::2] = 255  # no box of many colours
    twin = np.asarray(figures.turn_dark(Image.fromarray(colours))).astype(float)
    assert (twin == figures.redraw(colours.reshape(-1, 3)).reshape(twin.shape)).all()
    # by hand: opacity is what white lacks, ink over white gives the colour back, lightness L becomes 1 - L
    x = colours / 255
    low, high = x.min(2, keepdims=True), x.max(2, keepdims=True)
    ink = np.where(low < 1, (x - low) / np.maximum(1 - low, 1e-9), 0)
    turned = 0.92 * (ink + 1 - ink.min(2, keepdims=True) - ink.max(2, keepdims=True))
    assert abs(twin[:, :, :3] - 255 * turned).max() <= 1
    opacity = (1 - low) ** (1 - 0.7 * np.minimum(1, 2 * (high - low)))
    assert abs(twin[:, :, 3:] - 255 * opacity).max() <= 1


def test_heat_maps_stay_and_fills_turn():
    ramp = np.linspace(0, 240, 60).astype(np.uint8)
    pixels = np.full((100, 200, 3), 255, np.uint8)
    pixels[20:80, 20:80] = np.stack([ramp, ramp[::-1], ramp], 1)
    pixels[20:80, 120:180] = (0, 158, 115)
    found = figures.find_pictures(pixels)
    assert found[20:80, 20:80].all() and not found[:, 100:].any()


def test_maps_that_begin_at_white_turn_as_their_colour_bar_does():
    """Else a map stays light beside a bar on which white has become black."""
    value = np.linspace(-1, 1, 90)[None] * np.linspace(0.2, 1, 90)[:, None]
    red, blue = 1 - np.maximum(-value, 0), 1 - np.maximum(value, 0)
    pixels = np.full((110, 200, 3), 255, np.uint8)
    pixels[10:100, 10:100] = 255 * np.stack([red, np.minimum(red, blue), blue], 2)
    pixels[10:100, 150:165] = pixels[10:100, 99:100]  # the bar
    assert not figures.find_pictures(pixels).any()
    faint = pixels.copy()
    faint[10:100, 10:100] = np.random.default_rng(0).integers(205, 256, (90, 90, 3))  # all near the middle of the bar
    assert not figures.find_pictures(faint).any()
    grey = pixels[:, :, 1:2].repeat(3, 2)  # a photograph may be pale
    grey[10:100, 10:60] //= 2
    assert figures.find_pictures(grey)[10:100, 10:100].all()


def test_bars_of_several_colours_turn_as_their_legend_does():
    """With the lines of a grid over them they have more colours than a fill, and kept those of the light page."""
    pixels = np.full((120, 300, 3), 255, np.uint8)
    for i, colour in enumerate(plots.COLORS):
        pixels[20:100, 20 + 36 * i : 56 + 36 * i] = [int(colour[j : j + 2], 16) for j in (1, 3, 5)]
    for line in (60, 90):
        pixels[line] = (pixels[line] * 0.8 + 30).astype(np.uint8)
        pixels[:, 2 * line] = (pixels[:, 2 * line] * 0.6 + 80).astype(np.uint8)
    assert len(np.unique(pixels[20:100, 20:272].reshape(-1, 3) // 16, axis=0)) > figures.COLOURS
    assert not figures.find_pictures(pixels)[25:95, 25:260].any()


def test_grey_lines_and_bars_are_no_sheets():
    """The grey of lines, 91, is near that of the frames of a sheet, 96: a box drawn with it stayed white."""
    pixels = np.full((120, 200, 3), 255, np.uint8)
    pixels[10:100, 10:90] = figures.LINE
    pixels[14:96, 14:86] = 233
    pixels[10:100, 120:170] = figures.LINE
    assert not figures.find_pictures(pixels).any()
    assert plots.COLORS[-1] == f"#{figures.LINE:02X}" + 2 * f"{figures.LINE:02X}"


def test_a_picture_with_a_drawn_frame_stays():
    """A mask of black and white has no colours that tell it from paper and ink; the frame is blurred but for its corners."""
    pixels = np.full((120, 120, 3), 255, np.uint8)
    pixels[10:110, 10:110] = 128
    for corner in np.ix_((10, 109), (10, 109)), (slice(11, 109), slice(11, 109)):
        pixels[corner] = figures.FRAME
    pixels[14:106, 14:106] = 255
    pixels[60:106, 14:106] = 0
    assert figures.find_pictures(pixels)[11:109, 11:109].all()


def test_sheets_without_paper_between_them_stay(tmp_path):
    """A black gap between two sheets would become a white one."""
    pixels = draw_figure(tmp_path / "a.png")[10:75, 160:285]
    gap = np.zeros((65, 30, 3), np.uint8)
    two = np.concatenate([pixels, gap, pixels], 1)
    assert figures.turn_dark(Image.fromarray(two)) is None
    assert figures.turn_dark(Image.fromarray(np.concatenate([pixels, gap + 255, pixels], 1))) is not None


@browser
@pytest.mark.parametrize("width", ["60.3px", "60.7px", "61px"])
def test_a_formula_that_makes_its_column_as_wide_as_it_is_stays(width, tmp_path):
    """Widths of boxes are told in whole pixels: the formula was set smaller, its column followed, and its edge faded."""
    formula = f"<span class='math'><mjx-container style='display: inline-block; width: {width}; font-size: 110%'>x</mjx-container></span>"
    page = f"<script>{(STATIC / 'fit.js').read_text()}</script><style>{(STATIC / 'book.css').read_text()}</style>"
    page += f"<article class='bd-article'><div style='width: 300px'><table><tr><td><p>{formula}</p></td><td>{'words ' * 40}</td></tr></table></div></article>"
    script = """
    const formula = document.querySelector("mjx-container");
    fitInline(formula);
    return [formula.style.fontSize, formula.parentElement.className];
    """
    assert look.run_script(tmp_path, page, script) == ["110%", "math"]


@browser
@pytest.mark.parametrize("dark", [False, True])
def test_pictures_show_the_mode_that_was_asked_for(tmp_path, dark):
    """A page takes its mode from what its reader chose earlier, before it is drawn; and a phone is no narrow window."""
    site = tmp_path / "site"
    site.mkdir()
    mode = "<script>document.documentElement.dataset.theme = localStorage.getItem('theme')</script>"
    style = "<style>html[data-theme=dark] { background: #121212 } @media (max-width: 400px) { body { border-top: 90px solid red } }</style>"
    (site / "page.html").write_text(f"<!doctype html><html><head>{mode}{style}</head><body style='margin: 0'>words</body></html>")
    (site / "missing.html").write_text(finish.PAGE.format(title="Not found", head="", text="words"))
    for name, width in (("page", 800), ("page", 390), ("missing", 800)):
        look.picture(site, f"{name}.html", width, 300, tmp_path / "seen.png", dark)
        seen = np.asarray(Image.open(tmp_path / "seen.png").convert("RGB"))
        assert seen[250, 300].max() < 60 if dark else seen[250, 300].min() > 240
        assert (seen[40, 300].tolist() == [255, 0, 0]) == (width == 390)


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        ({"soon": False}, "no picture in the first screen"),
        ({"pictures": 3}, "4.0 screens a picture, 3.0 allowed"),
        ({"code": [1.26, "One"]}, "1.3 screens of code in 'One', 1.0 allowed"),
    ],
)
def test_too_little_to_see_is_a_fault(seen, words, monkeypatch):
    usual = {"screens": 12, "soon": True, "pictures": 6, "code": [0.9, "One"]}
    row = {"page": "nbs/a.html", "width": 1280, "page_too_wide": 0, "scrolled": usual} | {kind: [0, 1] for kind in look.KINDS}
    assert look.rhythm_faults("nbs/a.html", usual) == [] and not look.is_bad(row)
    assert look.rhythm_faults("nbs/a.html", usual | seen) == [words] and look.is_bad(row | {"scrolled": usual | seen})
    assert look.rhythm_faults("book/a.html", usual | seen) == []  # a page of words
    assert not look.is_bad(row | {"width": 390, "scrolled": usual | seen})
    assert all((ROOT / page).with_suffix(".ipynb").is_file() for page in look.EXCEPTIONS)
    known = {"late": True, "screens a picture": 4.0, "screens of code": 1.3}
    monkeypatch.setattr(look, "EXCEPTIONS", {"nbs/a.html": known})
    assert look.rhythm_faults("nbs/a.html", usual | seen) == []


def test_figures_of_a_page_get_twin_size_and_loading(tmp_path):
    folder = tmp_path / "_images"
    folder.mkdir()
    draw_figure(folder / "a.png")
    text = figures.add_twins(
        '<img alt="two" src="../_images/a.png" /><img src="x.svg"/>', tmp_path / "nbs"
    )
    images = re.findall("<img[^>]*>", text)
    assert [re.search("on-[a-z]*", image)[0] for image in images[:2]] == ["on-light", "on-dark"]
    for image in images[:2]:
        assert 'alt="two"' in image and 'width="150" height="60"' in image and "lazy" in image
    assert (folder / "a-dark.png").is_file() and images[2] == '<img src="x.svg"/>'
    stated = '<img alt="two" src="../_images/a.png" style="width: 75px; height: 30px;" />'
    image = figures.add_twins(stated, tmp_path / "nbs")
    assert 'width="75" height="30"' in image and "style" not in image
    assert figures.add_twins(text, tmp_path / "nbs") == text


@browser
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_one_of_two_twins_shows_and_opens_on_a_narrow_screen(tmp_path, mode):
    (tmp_path / "_images").mkdir()
    picture = Image.fromarray(np.full((300, 900, 3), 255, np.uint8))
    picture.save(tmp_path / "_images" / "a.png", dpi=(figures.DPI, figures.DPI))
    page = figures.add_twins('<p><img alt="white" src="_images/a.png"></p>', tmp_path)
    script = """
    const shown = [...document.querySelectorAll("img")].filter(image => image.clientWidth).map(image => image.className);
    const button = document.querySelector("button.enlarge");
    button.click();
    const [large, height] = [document.querySelector("dialog img").clientWidth, button.clientHeight];
    document.querySelector("dialog button").click();
    return [shown, large, height];
    """
    shown, large, height = run_page(page, script, tmp_path, "--window-size=500,700", mode=mode)
    assert shown == [f"on-{mode} dark-light"] and large == 900 and height >= 24


@browser
def test_a_dark_page_is_printed_as_a_light_one(tmp_path):
    script = """
    const found = [], theme = () => found.push(document.documentElement.dataset.theme);
    for (const name of ["beforeprint", "afterprint"]) { dispatchEvent(new Event(name)); theme(); }
    return found;
    """
    assert run_page("<p>words</p>", script, tmp_path, mode="dark") == ["light", "dark"]


@browser
def test_columns_keep_their_lines_and_long_formulas_fit_a_phone(tmp_path):
    rows = "".join(f"{name:30} {name:30} 1.0\n" for name in ("one", "two"))
    words = "a long sentence, which goes on below where it must " * 3
    outputs = "".join(
        f'<div class="cell_output"><div class="output"><div class="highlight"><pre>{text}</pre></div></div></div>'
        for text in (rows, words)
    )
    wide = '<p><span class="math"><mjx-container style="display: inline-block; font-size: 110%">'
    wide += f'<span style="white-space: nowrap">{"x + " * 16}</span></mjx-container></span></p>'
    head = '<th></th><th>value at <span class="math">\\(\\beta_t\\)</span></th>'
    table = (
        f"<table><thead><tr>{head}</tr></thead><tbody><tr><td>a</td><td>1</td></tr></tbody></table>"
    )
    script = """
    const formula = document.querySelector("mjx-container");
    fitInline(formula);
    const fits = formula.offsetWidth <= formula.closest("p").clientWidth;
    const kinds = [...document.querySelectorAll("pre")].map(pre => pre.classList.contains("columns"));
    return [...kinds, fits, document.querySelector("tbody td:last-child").dataset.column];
    """
    found = run_page(outputs + wide + table, script, tmp_path, "--window-size=500,700")
    assert found == [True, False, True, "value at βₜ"]


@browser
def test_pages_are_printed_in_order_with_numbers_outline_and_links(tmp_path, capsys):
    tmp_path /= "a book"
    (tmp_path / "nbs").mkdir(parents=True)
    (tmp_path / "book").mkdir()
    links = '<a href="#x">here</a> <a href="../book/intro.html#y">there</a> <a href="../book/intro.html">page</a> '
    links += '<a href="https://example.org/intro.html">away</a>'
    body = "<head><script>{{'load': [\"ui/lazy\"]}}</script></head><h1 id='x'>{}<a class='headerlink'>#</a></h1>{}"
    (tmp_path / "nbs" / "two.html").write_text(f"<html>{body.format('Two', links)}</html>")
    long = "<p id='y' style='height: 20in'>tall</p>"
    (tmp_path / "book" / "intro.html").write_text(f"<html>{body.format('One', long)}</html>")
    toc = {"root": "book/intro", "parts": [{"chapters": [{"file": "nbs/two"}]}]}
    n_pages, n_links = pdf.print_book(tmp_path, toc, tmp_path / "book.pdf")
    found = pypdf.PdfReader(tmp_path / "book.pdf")
    texts = [page.extract_text().split() for page in found.pages]
    assert n_pages == len(texts) > 2 and n_links == 2
    assert "One" in texts[0] and "Two" in texts[-1]
    numbers = [next(word for word in text if word.isdigit()) for text in texts]
    assert numbers == [*map(str, range(1, n_pages + 1))]
    assert [(entry.title, found.get_destination_page_number(entry)) for entry in found.outline] == [("One", 0), ("Two", n_pages - 1)]
    goals = [link.get_object()["/A"] for link in found.pages[-1]["/Annots"] if "/A" in link.get_object()]
    inside = [goal["/D"][0].get_object() for goal in goals if goal["/S"] == "/GoTo"]
    assert [page == found.pages[0] for page in inside] == [True, True]
    assert [goal["/URI"] for goal in goals if goal["/S"] == "/URI"] == ["https://example.org/intro.html"]
    assert "lazy" not in pdf.prepare((tmp_path / "nbs" / "two.html").read_text(), 0)[0]
    assert not list(tmp_path.rglob("*.print.html"))
