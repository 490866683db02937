"""Check a built site: it loads nothing remote, has no dead link, its mathematics and figures are
complete, controls and headings of tables have names, the code that a reader can see or unfold on a page would run, and the search finds the
chapter that teaches a thing.

Usage: python tools/check_site.py FOLDER [--weights]
With --weights it lists instead what each page weighs over the wire (gzip), its pictures left out. What MathJax fetches later, parts of
its fonts, is not in it.
"""

import argparse
import gzip
import json
import re
import subprocess
import sys
import tempfile
from functools import cached_property, lru_cache
from pathlib import Path
from urllib.parse import unquote, urldefrag

from bs4 import BeautifulSoup

LOADS = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "embed": "src",
    "object": "data",
}
LOADING_RELATIONS = {
    "stylesheet",
    "icon",
    "preload",
    "prefetch",
    "modulepreload",
    "manifest",
    "preconnect",
    "dns-prefetch",
}
CSS_URL = re.compile(r"""(?:url\(\s*|@import\s+)["']?([^"')\s;]+)""")
TEX_COMMANDS = "begin|end|frac|sqrt|mathcal|mathbf|bar|hat|tilde|alpha|beta|epsilon|mu|sigma|theta"
RAW_TEX = re.compile(rf"\$\$|\\[(\[]|\\(?:{TEX_COMMANDS})\b|\$[^$\n]*[\\_^][^$\n]*\$")
CODE_CELL = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
NOTEBOOK = {"metadata": {"language_info": {"name": "python"}}, "nbformat": 4, "nbformat_minor": 5}
RUFF = ["--isolated", "--select", "F821", "--output-format", "json"]
RUFF += ["--config", 'builtins = ["display", "get_ipython"]']
SEARCHED = {  # what readers type, and the page that the search must name first
    "classifier-free guidance": "nbs/20_text_conditioning",
    "elbo": "nbs/03_elbo",
    "variational lower bound": "nbs/03_elbo",
    "noise schedule": "nbs/04_schedules",
    "skip connection": "nbs/07_unet",
    "latent space": "nbs/21_latent_diffusion",
    "image to image": "nbs/22_stable_diffusion",
    "learning-rate warm-up": "nbs/09_training",
    "u-net": "nbs/07_unet",
    "attention map": "nbs/20_text_conditioning",
}
HEAD = {  # what each page of a whole site has once
    "title": "a title",
    "meta[name=viewport]": "a viewport",
    "link[rel=canonical]": "a canonical address",
    "meta[property='og:image']": "a picture for previews",
    "meta[name='description']": "a description",
    "link[rel='apple-touch-icon']": "an icon for a phone's first screen",
}
HEAVIEST = {"plain": 300_000, "math": 700_000}  # bytes
WEIGHED = {"text": ".html", "scripts": ".js", "styles": ".css", "fonts": ".woff2"}
NOT_PROSE = "script, style, pre, code, textarea, noscript, .math, .output"


class Page:
    """One parsed HTML file."""

    def __init__(self, path):
        self.path, self.soup = path, BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")

    @cached_property
    def anchors(self):
        """Collect everything that a link with a fragment can point at."""
        return {tag["id"] for tag in self.soup.find_all(id=True)} | {
            tag["name"] for tag in self.soup.find_all("a", attrs={"name": True})
        }

    def loads(self):
        """Yield every address that a browser loads with the page."""
        for tag in self.soup.find_all(list(LOADS)):
            yield from filter(None, [tag.get(LOADS[tag.name])])
        for tag in self.soup.find_all("link", href=True):
            if LOADING_RELATIONS & set(tag.get("rel", [])):
                yield tag["href"]
        styles = [tag.get_text() for tag in self.soup.find_all("style")] + [
            tag["style"] for tag in self.soup.find_all(style=True)
        ]
        yield from (address for style in styles for address in CSS_URL.findall(style))


def is_remote(address):
    """Tell whether loading an address needs another host."""
    return re.match(r"(https?:|wss?:|ftp:)?//", address.strip()) is not None


def missing_file(folder, address):
    """Tell whether a local address, relative to a folder, has no file behind it."""
    name = unquote(urldefrag(address)[0].partition("?")[0])
    return bool(name) and not re.match(r"[a-z]+:", name) and not (folder / name).is_file()


def head_faults(page):
    """List what the head of a page of a whole site lacks, holds twice, or loads without need."""
    soup = page.soup
    for selector, wanted in HEAD.items():
        if len(found := soup.select(selector)) != 1:
            yield f"has {len(found)} times {wanted}"
    scripts = " ".join(tag["src"] for tag in soup.find_all("script", src=True))
    if "searchindex.js" in scripts and page.path.name != "search.html":
        yield "loads searchindex.js, which only the search page needs"
    if "mathjax" in scripts.lower() and not soup.select_one(".math"):
        yield "loads MathJax and has no mathematics"


@lru_cache
def packed(path):
    """Return how many bytes of a file go over the wire."""
    return len(gzip.compress(path.read_bytes()))


def weigh(page):
    """Return how many bytes of each kind go over the wire with a page, its pictures left out."""
    names = [address.partition("?")[0] for address in page.loads()]
    local = [name for name in names if name.endswith(tuple(WEIGHED.values()))]
    files = {(page.path.parent / name).resolve() for name in local} | {page.path}
    kinds = {kind: [path for path in files if path.suffix == end] for kind, end in WEIGHED.items()}
    return {
        kind: sum(packed(path) for path in paths if path.is_file()) for kind, paths in kinds.items()
    }


def weight_fault(page):
    """Return, as a list, that a page without its pictures is too heavy over the wire (compressed)."""
    weight = sum(weigh(page).values())
    limit = HEAVIEST["math" if page.soup.select_one(".math") else "plain"]
    return [f"weighs {weight:,} bytes; {limit:,} are allowed"] * (weight > limit)


def list_weights(root):
    """List, as lines of a table, what the pages of a site weigh, the heaviest first."""
    pages = [Page(path) for path in find_pages(root)]
    weights = {str(page.path.relative_to(Path(root).resolve())): weigh(page) for page in pages}
    yield f"{'kB over the wire':36}{'all':>7}" + "".join(f"{kind:>9}" for kind in WEIGHED)
    for name, kinds in sorted(weights.items(), key=lambda row: -sum(row[1].values())):
        numbers = "".join(f"{size / 1000:9.0f}" for size in kinds.values())
        yield f"{name:36}{sum(kinds.values()) / 1000:7.0f}{numbers}"


def load_faults(page):
    """List what a page loads from elsewhere or cannot load."""
    for address in page.loads():
        if is_remote(address):
            yield f"loads {address}"
        elif missing_file(page.path.parent, address):
            yield f"loads {address[:80]}, which does not exist"


def style_faults(path):
    """List what a style sheet loads from elsewhere."""
    return [
        f"loads {a}"
        for a in CSS_URL.findall(path.read_text(encoding="utf-8", errors="replace"))
        if is_remote(a)
    ]


def link_faults(page, pages):
    """List a page's links to files or anchors that do not exist."""
    for tag in page.soup.find_all("a", href=True):
        address, fragment = urldefrag(tag["href"])
        if re.match(r"[a-z]+:|//", address):
            continue
        target = (page.path.parent / unquote(address)).resolve() if address else page.path
        if not target.is_file():
            yield f"links to {tag['href']}, which does not exist"
        elif (
            fragment
            and target in pages
            and unquote(fragment) not in pages[target].anchors | {"top"}
        ):
            yield f"links to {tag['href']}, which has no such anchor"


def math_faults(page):
    """List mathematics that a browser would show as TeX."""
    if page.soup.select_one(".math"):
        sources = [
            tag["src"]
            for tag in page.soup.find_all("script", src=True)
            if "mathjax" in tag["src"].lower()
        ]
        if not sources:
            yield "has mathematics but no MathJax"
    for text in page.soup.find_all(string=RAW_TEX):
        if not any(
            parent.css.match(NOT_PROSE) for parent in text.parents if parent.name != "[document]"
        ):
            yield f"shows raw TeX: {' '.join(text.split())[:80]}"


def figure_faults(page):
    """List pictures without a description and figures without a caption."""
    for tag in page.soup.find_all("img"):
        alt = tag.get("alt", "").strip()
        if not alt or re.search(r"\.(png|svg|jpe?g|gif)$", alt):
            yield f"shows {tag.get('src', '')[:60]} without alternative text"
        if re.search(r"height: *\d+px", tag.get("style", "")):
            yield f"shows {tag.get('src', '')[:60]} with a fixed height, distorted where it is narrow"
    for tag in page.soup.select("figure:not(.output figure)"):
        caption = tag.find("figcaption")
        if caption is None or not caption.get_text(strip=True):
            yield f"has a figure without a caption: {tag.get('id', '')}"


def first_picture_fault(page):
    """Return, as a list, that a chapter has pictures and shows none before its first section."""
    article = page.soup.select_one("article")
    if article is None or not re.match(r"\d\d_", page.path.name):
        return []
    shown = [tag.name for tag in article.select("h2, img")]
    return ["shows no picture before its first section"] * ("img" in shown and shown[0] == "h2")


def access_faults(page):
    """List what a screen reader would call otherwise than the eye does, or not at all."""
    for tag in page.soup.select("button, summary, a[aria-label], [role=button]"):
        text, label = " ".join(tag.get_text(" ").split()), tag.get("aria-label", "").strip()
        if text and label and text.lower() not in label.lower():
            yield f"calls {text[:40]!r} {label!r}"
        if not (text or label or tag.get("title") or tag.find("img", alt=True)):
            yield f"has a {tag.name} without a name: {str(tag)[:80]}"
    named = {label["for"] for label in page.soup.select("label[for]")}
    for tag in page.soup.select("input:not([type=hidden]), select, textarea"):
        own = tag.get("aria-label") or tag.get("title") or tag.get("id") in named
        if not own and tag.find_parent("label") is None:
            yield f"has a field without a name: {str(tag)[:80]}"
    for tag in page.soup.select("th"):
        if not tag.get_text(strip=True) and not tag.find("img"):
            yield "has a table with an empty heading"


def directive_faults(page):
    """List nbdev directives that a reader would see."""
    for tag in page.soup.select("div.cell pre"):
        yield from (
            f"shows the directive {line}"
            for line in tag.get_text().splitlines()
            if line.startswith("#|")
        )


def code_of(page):
    """List the code cells of a page as a reader can copy them, folded ones and solutions too."""
    cells = page.soup.select("div.cell div.cell_input")
    # What %time runs is code, too.
    return [
        re.sub(r"^%%?time\b *", "", cell.select_one("pre").get_text(), flags=re.M) for cell in cells
    ]


def code_faults(pages):
    """Yield, with its page, each name in a page's code that nothing before it on the page defines.

    Ruff reads the cells of a page as one notebook. Inside a function, which runs later, a name may
    also be defined further down.
    """
    with tempfile.TemporaryDirectory() as folder:
        written = {}
        for i, page in enumerate(pages):
            cells = [
                CODE_CELL | {"source": source, "id": f"c{n}"}
                for n, source in enumerate(code_of(page))
            ]
            if cells:
                path = Path(folder).resolve() / f"{i}.ipynb"
                path.write_text(json.dumps(NOTEBOOK | {"cells": cells}), encoding="utf-8")
                written[path] = page
        command = [sys.executable, "-m", "ruff", "check", "--no-cache", *RUFF, folder]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode not in (0, 1):
            raise RuntimeError(f"ruff could not read the pages' code: {found.stderr}")
        places = {
            (f["filename"], f.get("cell") or 0, f["message"]) for f in json.loads(found.stdout)
        }
        for name, cell, message in sorted(places):
            fault = f"shows code that would not run, in code cell {cell}: {message}"
            yield written[Path(name).resolve()], fault


def search_faults(root):
    """Yield what the site's search would not answer with the chapter that teaches it.

    Sphinx's search gives a main entry of the index 100 points if it equals what was typed, and less
    than that to everything else.
    """
    text = Path(root, "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(text[text.index("{") : text.rindex("}") + 1])
    for words, wanted in SEARCHED.items():
        entries = index["indexentries"].get(words, [])
        first = [index["docnames"][page] for page, _, is_main in entries if is_main]
        if first != [wanted]:
            found = ", ".join(first) or "no page"
            yield f"searchindex.js: {words!r} finds {found} first, instead of {wanted}"


def find_pages(root):
    """List the pages of a site; the theme leaves templates, which are none, among the static files."""
    root = Path(root).resolve()
    paths = sorted(root.rglob("*.html"))
    return [path for path in paths if "_static" not in path.relative_to(root).parts]


def check(root):
    """List the faults of the site in a folder."""
    root = Path(root).resolve()
    packed.cache_clear()  # files may have changed since the last check
    pages = {path: Page(path) for path in find_pages(root)}
    if not pages:
        return [f"{root} has no pages"]
    faults = []
    whole = (root / "searchindex.js").is_file()  # a site with search, not a page or two
    for path, page in pages.items():
        found = [
            *(head_faults(page) if whole and path.parent != root else ()),
            *(first_picture_fault(page) if whole else ()),
            *weight_fault(page),
            *load_faults(page),
            *link_faults(page, pages),
            *math_faults(page),
            *figure_faults(page),
            *access_faults(page),
            *directive_faults(page),
        ]
        faults += [f"{path.relative_to(root)} {fault}" for fault in found]
    for page, fault in code_faults(pages.values()):
        faults.append(f"{page.path.relative_to(root)} {fault}")
    if whole:
        faults += search_faults(root)
    for path in sorted(root.rglob("*.css")):
        faults += [f"{path.relative_to(root)} {fault}" for fault in style_faults(path)]
    return faults


def main():
    """Print the faults of a site and fail if there are any, or print what its pages weigh."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site")
    parser.add_argument("--weights", action="store_true")
    options = parser.parse_args()
    if options.weights:
        print("\n".join(list_weights(options.site)))
        return
    faults = check(options.site)
    print(
        "\n".join(faults)
        or "no remote load, no dead link; mathematics, figures, code and search complete"
    )
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
