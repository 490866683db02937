"""Finish the built pages: what no page uses is left out, and what search engines and shared links show is put in.

- Icons come as one small font with the few that occur, instead of 1.5 MB of script.
- The search index is loaded by the search page alone, MathJax by pages with formulas alone.
- What a page shows and what a screen reader says agree.
- Figures get twins for dark pages (figures.py).
- Each line of code is a block, so that one which is longer than its column goes on further in.
- A line does not end between a formula and the full stop behind it.
- The fonts of a page's first screen are asked for at once.
- Each page has a description, a canonical address and a picture for previews; there is a page for addresses that do not exist,
  light or dark as the reader has chosen.
"""

import html
import logging
import re
from pathlib import Path

import pydata_sphinx_theme
from docutils import nodes
from figures import add_twins
from fontTools import subset
from fontTools.ttLib import TTFont
from site_settings import page_address

ICONS = {"solid": "fa-solid-900", "brands": "fa-brands-400"}
RULE = re.compile(r'((?:\.fa-[a-z0-9-]+:before,?)+)\{content:"\\([0-9a-f]+)"\}')
DRAWN = re.compile(
    r'--pst-icon-[\w-]+:"([\ue000-\uf8ff])"'
)  # by style sheets: a triangle beside a warning
NAME = re.compile(r"\.fa-([a-z0-9-]+):before")
STYLES = {"fa-solid": "solid", "fas": "solid", "fab": "brands", "fa-brands": "brands"}
SCRIPTED = "sun moon circle-half-stroke xmark bars chevron-down chevron-right angles-left"  # shown by scripts
RENAMED = [  # what is seen is what is heard: a name that says something else goes
    (r'(<button class="btn search-button-field[^>]*?) aria-label="[^"]*"', r"\1"),
    (r'<summary aria-label="Toggle hidden content">', "<summary>"),
    # roles of the bibliography that are no longer allowed, and a title outside of all landmarks
    (r' role="doc-biblioentry"', ""),
    (r'<div role="list" class="citation-list">', '<div class="citation-list">'),
    (
        r'<div class="sidebar-primary-item">(\s*<a class="navbar-brand)',
        r'<div class="sidebar-primary-item" role="navigation" aria-label="Home">\1',
    ),
    (r"(Solution to)(<a [^>]*>) ", r"\1 \2"),  # the blank is no part of the link
    (
        r"<th([^>]*)>(?:<p></p>)?\s*</th>",
        r"<td\1></td>",
    ),  # the empty corner of a table is no heading
]
FORMULA = re.compile(
    r'([(\[“]*)(<span class="math notranslate nohighlight">[^<]*</span>)([.,;:!?)\]”]*)'
)
INDENTED = re.compile(r'^( +<span class="[nk][a-z]?">[^<]*</span>)')  # no break after the indent
UNUSED = "fontawesome.js|sphinx-thebe.js|design-tabs.js"
SEARCH = "searchtools.js|language_data.js|searchindex.js"
logging.getLogger("fontTools").setLevel(logging.WARNING)
PRELOADED = ("text", "code")  # fonts of book/_static/fonts that every first screen needs
LONGEST = 200  # characters of a description
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>{head}
<style>:root {{ color-scheme: light dark }} body {{ font: 1.1rem/1.6 system-ui, sans-serif; max-width: 34rem; margin: 15vh auto; padding: 0 1rem }}</style>
<script>document.documentElement.style.colorScheme = {{ light: "light", dark: "dark" }}[localStorage.getItem("mode")] || ""</script></head>
<body><main><h1>{title}</h1><p>{text}</p></main></body></html>
"""


def describe(doctree):
    """Return the first words of a page: its summary, or its first paragraph."""
    if doctree is None:
        return ""
    first = next(iter(doctree.findall(nodes.block_quote)), None)
    first = first or next(iter(doctree.findall(nodes.paragraph)), None)
    text = " ".join(first.astext().split()) if first else ""
    return text if len(text) <= LONGEST else text[: text.rfind(" ", 0, LONGEST)] + " ..."


def on_page(app, pagename, templatename, context, doctree):
    """Say in the page's head what it is about and where it lives."""
    title = re.sub("<[^>]*>", "", context.get("title") or "")
    text = describe(doctree) or f"{html.unescape(title)}: a page of {app.config.html_title}."
    facts = {"og:type": "article", "og:title": title}
    facts |= {"og:url": page_address(app.srcdir, f"{pagename}.html")}
    facts |= {"og:image": page_address(app.srcdir, f"_static/{app.config.preview_picture}")}
    tags = [f'<meta property="{k}" content="{html.escape(v)}">' for k, v in facts.items()]
    if 'name="description"' not in context.get("metatags", ""):  # a page may bring its own
        tags.append(f'<meta name="description" content="{html.escape(text)}">')
    tags.append(f'<meta property="og:description" content="{html.escape(text)}">')
    tags.append('<meta name="twitter:card" content="summary_large_image">')
    href = context["pathto"]("_static/apple-touch-icon.png", 1)
    tags.append(f'<link rel="apple-touch-icon" href="{href}">')
    for face in PRELOADED:
        href = context["pathto"](f"_static/fonts/{face}.woff2", 1)
        tags.append(f'<link rel="preload" href="{href}" as="font" type="font/woff2" crossorigin>')
    context["metatags"] = context.get("metatags", "") + "\n".join(tags)


def lighten(text, is_search):
    """Leave out of a page what it loads and does not use."""
    unused = UNUSED if is_search else f"{UNUSED}|{SEARCH}"
    if 'class="math' not in text:
        unused += "|tex-chtml-full.js"
    if 'class="touch"' not in text:
        unused += "|touch.js"
    text = re.sub(rf'\s*<script[^>]*src="[^"]*(?:{unused})[^"]*"[^>]*></script>', "", text)
    text = re.sub(r'\s*<script type="text/x-thebe-config">.*?</script>', "", text, flags=re.S)
    text = re.sub(r"\s*<link[^>]*sphinx-thebe.css[^>]*/>", "", text)
    for old, new in RENAMED:
        text = re.sub(old, new, text)
    first, *others = re.split(r'(?=<meta name="viewport")', text)
    return first + "".join(others[:1] + [re.sub("^<meta[^>]*>", "", part) for part in others[1:]])


def hang(text):
    """Make each line of code a block that knows how far it is indented; a page from an earlier build stays."""

    def line_block(line):
        """Wrap one line, which keeps its end."""
        indent = len(plain := re.sub("<[^>]*>", "", line)) - len(plain.lstrip(" "))
        style = f' style="--in:{indent}ch"' if indent else ""
        line = INDENTED.sub(r'<span class="in">\1</span>', line)
        return f'<span class="ln"{style}>{line}</span>'

    def code_block(block):
        """Wrap the lines of one block of code."""
        lines = block[2].splitlines(keepends=True)
        return block[1] + "".join(map(line_block, lines)) + "</pre>"

    return re.sub(
        r'(<div class="highlight"><pre><span></span>)(?!<span class="ln")(.*?)</pre>',
        code_block,
        text,
        flags=re.S,
    )


def keep_together(text):
    """Let no line break between a formula and the brackets and signs beside it; once for each page."""

    def whole(found):
        """Wrap a formula that has such neighbours."""
        if not (found[1] or found[3]):
            return found[0]
        return f'<span class="together">{found[0]}</span>'

    return text if '<span class="together">' in text else FORMULA.sub(whole, text)


def used_icons(pages):
    """Collect the names of the icons on the pages, per style."""
    found = {"solid": set(SCRIPTED.split()), "brands": set()}
    for text in pages:
        for classes in re.findall(r'<i class="(fa[^"]*)"', text):
            first, *others = classes.split()
            if first in STYLES:
                found[STYLES[first]] |= {name.removeprefix("fa-") for name in others}
    return found


def write_icons(out, found):
    """Write fonts with these icons and nothing else, and the theme's style sheet without the others."""
    theme = Path(pydata_sphinx_theme.__file__).parent / "theme" / "pydata_sphinx_theme" / "static"
    css, kept = (theme / "styles" / "pydata-sphinx-theme.css").read_text("utf-8"), set()
    for style, file in ICONS.items():
        # a rule is .fa-name:before,.fa-other:before{content:"\\f065"}
        codes = {
            int(m[2], 16) for m in RULE.finditer(css) if found[style] & set(NAME.findall(m[1]))
        }
        codes |= {ord(sign) for sign in DRAWN.findall(css)}
        font = TTFont(theme / "vendor" / "fontawesome" / "webfonts" / f"{file}.ttf")
        subsetter = subset.Subsetter(subset.Options(notdef_outline=True))
        subsetter.populate(unicodes=codes)
        subsetter.subset(font)
        font.flavor = "woff"
        font.save(out / f"icons-{style}.woff")
        sources = (
            rf'src:url\([^)]*{file}.woff2\) format\("woff2"\),url\([^)]*\) format\("truetype"\)'
        )
        css = re.sub(sources, f'src:url(../icons-{style}.woff) format("woff")', css)
        kept |= codes
    css = RULE.sub(lambda rule: rule[0] if int(rule[2], 16) in kept else "", css)
    (out / "styles" / "pydata-sphinx-theme.css").write_text(css, "utf-8")


EXCERPT = '[".headerlink", "script", "style"]'  # what Sphinx leaves out of the search's excerpts


def without_formulas(text):
    """Let the search leave formulas, which pages hold as TeX, out of its excerpts, too."""
    if EXCERPT not in text:
        raise ValueError("searchtools.js is not as it was: the search's excerpts would show TeX")
    return text.replace(EXCERPT, '[".headerlink", "script", "style", ".math"]')


def on_build_finished(app, exception):
    """Go over all pages once more."""
    if exception or app.builder.format != "html":
        return
    out, home = Path(app.outdir), app.config.root_doc + ".html"
    paths = [p for p in out.rglob("*.html") if "_static" not in p.parts]
    texts = {path: path.read_text("utf-8") for path in paths}
    write_icons(out / "_static", used_icons(texts.values()))
    for path, text in texts.items():
        text = keep_together(hang(lighten(text, path.name == "search.html")))
        path.write_text(add_twins(text, path.parent), "utf-8")
    for path in (*out.rglob("_static/**/*.map"), *out.rglob("_static/vendor/**/fa-*")):
        path.unlink()
    (out / "_static" / "scripts" / "fontawesome.js").unlink(missing_ok=True)
    search = out / "_static" / "searchtools.js"
    search.write_text(without_formulas(search.read_text("utf-8")), "utf-8")
    address = page_address(app.srcdir, "")
    title = app.config.html_title
    head = f'<link rel="canonical" href="{page_address(app.srcdir, home)}"><meta http-equiv="refresh" content="0; url={home}">'
    words = f'<a href="{home}">The book begins here.</a>'
    (out / "index.html").write_text(
        PAGE.format(title=html.escape(title), head=head, text=words), "utf-8"
    )
    words = f'There is no page at this address. <a href="{address}{home}">To the first page</a>, or <a href="{address}search.html">search the book</a>.'
    (out / "404.html").write_text(PAGE.format(title="Not found", head="", text=words), "utf-8")


def setup(app):
    """Register the extension with Sphinx."""
    app.add_config_value("preview_picture", "samples.png", "html")
    app.connect("html-page-context", on_page, priority=950)
    app.connect("build-finished", on_build_finished, priority=950)
    return {"version": "1", "parallel_read_safe": True}
