"""Print the built book as one PDF: all pages in the order of _toc.yml, with an outline, links inside the file and page numbers.

Usage: python tools/pdf.py [_build/html] [--out _build/ddpm.pdf]

Chromium, which must be on the path, prints page by page; the parts are joined afterwards, and links between them are led there.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

import look
import yaml
from bs4 import BeautifulSoup
from pypdf import PdfReader, PdfWriter
from pypdf.generic import ArrayObject, DictionaryObject, NameObject

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 300  # seconds for a page
STYLE = """
@page {{ @bottom-center {{ content: counter(page); font: 9pt serif; }} }}
html {{ counter-reset: page {before}; }}
"""


def list_chapters(toc):
    """List the pages of the table of contents in reading order, as paths without an ending."""
    files = [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    return [toc["root"], *files]


def prepare(text, before):
    """Return a page's markup made for printing, after so many pages, and its title."""
    soup = BeautifulSoup(text, "html.parser")
    for tag in soup.find_all("script"):
        if "ui/lazy" in tag.text:  # all formulas are set, not those in sight
            tag.string = tag.text.replace('"ui/lazy"', "")
        if "touch.js" in tag.get("src", ""):  # the still pictures are printed
            tag.decompose()
    for tag in soup.select("[loading]"):
        del tag["loading"]
    for tag in soup.select(".headerlink"):
        tag.decompose()
    soup.head.append(soup.new_tag("style", string=STYLE.format(before=before)))
    return str(soup), soup.select_one("h1").get_text().strip()


def print_page(path, out, timeout=PATIENCE):
    """Let Chromium print a page once its formulas are set."""
    with tempfile.TemporaryDirectory() as profile:
        options = [f"--print-to-pdf={out}", "--no-pdf-header-footer"]
        options += ["--generate-pdf-document-outline", "--allow-file-access-from-files"]
        options += ["--virtual-time-budget=60000", "--window-size=800,1100"]
        command = look.chromium(*options, path.as_uri(), profile=profile)
        subprocess.run(command, check=True, capture_output=True, timeout=timeout)


def lead_inside(writer, site, starts):
    """Lead the links from page to page of the book to where these begin in the file; return how many."""
    root, n_links = unquote(Path(site).resolve().as_uri()), 0
    first = {f"{root}/{page}.html": n for page, n in starts.items()}
    for sheet in writer.pages:
        for link in sheet.get("/Annots", ()):
            action = link.get_object().get("/A", {})
            address = unquote(urlsplit(action.get("/URI", ""))._replace(fragment="").geturl())
            if address in first:
                target = writer.pages[first[address]].indirect_reference
                goal = ArrayObject([target, NameObject("/Fit")])
                goto = {NameObject("/S"): NameObject("/GoTo"), NameObject("/D"): goal}
                link.get_object()[NameObject("/A")] = DictionaryObject(goto)
                n_links += 1
    return n_links


def print_book(site, toc, out):
    """Print the pages of a built site one after the other, and join them."""
    writer, starts = PdfWriter(), {}
    for page in list_chapters(toc):
        starts[page] = len(writer.pages)
        text, title = prepare(Path(site, f"{page}.html").read_text("utf-8"), starts[page])
        copy = Path(site, f"{page}.print.html").resolve()  # beside the page, whose addresses are relative
        copy.write_text(text, "utf-8")
        try:
            with tempfile.TemporaryDirectory() as folder:
                print_page(copy, Path(folder, "part.pdf"))
                writer.append(PdfReader(Path(folder, "part.pdf")), outline_item=title, import_outline=False)
        finally:
            copy.unlink()
        print(f"{title}: {len(writer.pages) - starts[page]} pages", flush=True)
    n_links = lead_inside(writer, site, starts)
    writer.compress_identical_objects()
    temporary = Path(f"{out}.part")
    writer.write(temporary)
    os.replace(temporary, out)
    return len(writer.pages), n_links


def main(arguments=None):
    """Print the book."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", nargs="?", default="_build/html")
    parser.add_argument("--out", default="_build/ddpm.pdf")
    options = parser.parse_args(arguments)
    if look.find_browser() is None:
        sys.exit(f"none of {', '.join(look.NAMES)} is on the path")
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    if not Path(options.site, f"{toc['root']}.html").is_file():
        sys.exit(f"no book in {options.site}: build it first (make book)")
    n_pages, n_links = print_book(options.site, toc, options.out)
    size = Path(options.out).stat().st_size / 1e6
    print(f"{options.out}: {n_pages} pages, {n_links} links between chapters, {size:.1f} MB")


if __name__ == "__main__":
    main()
