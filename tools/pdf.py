"""Print the built book as one PDF: all pages in the order of _toc.yml, chapters with their numbers, links inside the file.

Usage: python tools/pdf.py [_build/html] [--out _build/ddpm.pdf]

The articles of all pages are put into one page, which Chromium prints once; so it must be on the path.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import look
import yaml
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parent.parent
SHELL = "nbs/02_forward_process.html"  # a page with formulas: it gives head, styles and scripts
PATIENCE = 1500  # seconds for setting and printing everything
STYLE = """
@page { @bottom-center { content: counter(page); font: 9pt serif; } }
article.bd-article { break-before: page; }
article.bd-article:first-of-type { break-before: auto; }
"""


def list_chapters(toc):
    """List the pages of the table of contents in reading order, as paths without an ending."""
    files = [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    return [toc["root"], *files]


def anchor(page, name=""):
    """Name a place of a page in the whole book."""
    return f"{page.replace('/', '-')}--{name}" if name else page.replace("/", "-")


def localize(article, page, pages):
    """Make the addresses of a page's article those of the one page at the site's root."""
    folder = os.path.dirname(page)
    for tag in article.select("script, .headerlink, button"):
        tag.decompose()
    for tag in article.find_all(True):
        tag.attrs.pop("loading", None)
        for key in ("id", "for"):
            if key in tag.attrs:
                tag[key] = anchor(page, tag[key])
        for key in ("href", "src"):
            address = tag.get(key)
            if not address or ":" in address:
                continue
            path, _, name = address.partition("#")
            path = os.path.normpath(os.path.join(folder, path)) if path else f"{page}.html"
            target = path.removesuffix(".html")
            tag[key] = f"#{anchor(target, name)}" if target in pages else path
    article["id"] = anchor(page)


def join(site, toc):
    """Return the markup of one page with all chapters of a built site."""
    pages = list_chapters(toc)
    shell = BeautifulSoup(Path(site, SHELL).read_text("utf-8"), "html.parser")
    place, folder = shell.select_one("article.bd-article"), os.path.dirname(SHELL)
    for tag in shell.select("[href], [src]"):
        key = "href" if "href" in tag.attrs else "src"
        if ":" not in tag[key] and not tag[key].startswith("#"):
            tag[key] = os.path.normpath(os.path.join(folder, tag[key]))
    for tag in shell.find_all("script"):
        if "ui/lazy" in tag.text:  # all formulas are set, not those in sight
            tag.string = tag.text.replace('"ui/lazy"', "")
        if "touch.js" in tag.get("src", ""):  # the still pictures are printed
            tag.decompose()
    shell.head.append(shell.new_tag("style", string=STYLE))
    for page in pages:
        text = Path(site, f"{page}.html").read_text("utf-8")
        article = BeautifulSoup(text, "html.parser").select_one("article.bd-article")
        localize(article, page, set(pages))
        place.insert_before(article)
    place.decompose()
    return str(shell)


def print_page(path, out, timeout=PATIENCE):
    """Let Chromium print a page once its formulas are set."""
    with tempfile.TemporaryDirectory() as profile:
        options = [f"--print-to-pdf={out}", "--no-pdf-header-footer"]
        options += ["--generate-pdf-document-outline", "--allow-file-access-from-files"]
        options += ["--virtual-time-budget=60000", "--window-size=800,1100"]
        command = look.chromium(*options, path.as_uri(), profile=profile)
        subprocess.run(command, check=True, capture_output=True, timeout=timeout)


def main(arguments=None):
    """Join the pages and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", nargs="?", default="_build/html")
    parser.add_argument("--out", default="_build/ddpm.pdf")
    options = parser.parse_args(arguments)
    if look.find_browser() is None:
        sys.exit(f"none of {', '.join(look.NAMES)} is on the path")
    if not Path(options.site, SHELL).is_file():
        sys.exit(f"no book in {options.site}: build it first (make book)")
    whole = Path(options.site, "whole.html").resolve()
    whole.write_text(join(options.site, yaml.safe_load((ROOT / "_toc.yml").read_text())), "utf-8")
    try:
        print_page(whole, Path(options.out).resolve())
    finally:
        whole.unlink()
    print(f"{options.out}: {Path(options.out).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
