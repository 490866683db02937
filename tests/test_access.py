"""What axe-core says of the parts that are ours, on light and on dark pages; skipped where it or Chromium is missing.

`make axe` brings it, or AXE_CORE names its axe.min.js. BOOK_SITE may name a built site, of which every
page is judged.
"""

import os
import sys
from pathlib import Path

import look
import pytest
import torch
from PIL import Image

from ddpm_nb.plots import image_slider, new_figure, touchable

sys.path.append(str(Path(__file__).resolve().parent.parent / "book" / "_ext"))

import figures
import finish

STATIC = Path(__file__).resolve().parent.parent / "book" / "_static"
BUILT = os.environ.get("BOOK_SITE")
pytestmark = [
    pytest.mark.skipif(look.find_browser() is None, reason="needs Chromium"),
    pytest.mark.skipif(
        look.find_axe() is None, reason=f"needs axe-core at {look.AXE} or in AXE_CORE"
    ),
]
LIGHT = "<script>document.documentElement.dataset.theme = localStorage.getItem('mode')</script>"
COLOURS = """<style>html[data-theme=light] { --pst-color-background: #fff; --pst-color-text-base: #222832;
--pst-color-text-muted: #48566b; --pst-color-border: #c9c9c9; background: #fff; color: #222832 }
html[data-theme=dark] { --pst-color-background: #121212; --pst-color-text-base: #ced6dd; --pst-color-link: #5f9df7;
--pst-color-text-muted: #9ca4af; --pst-color-border: #3d4750; background: #121212; color: #ced6dd }</style>"""


def write_page(folder, name, body):
    """Write a page with the book's style and scripts."""
    head = "".join(f"<script src='{script}'></script>" for script in ("fit.js", "touch.js"))
    head += f"{LIGHT}<link rel='stylesheet' href='book.css'>{COLOURS}<title>A page</title>"
    (folder / name).write_text(
        f"<!doctype html><html lang='en'><head>{head}</head><body><main class='bd-article bd-content'><h1>A page</h1>"
        f"{body}</main></body></html>"
    )


@pytest.fixture
def site(tmp_path):
    """Write a page with everything that is ours, and one with two faults."""
    for name in ("book.css", "fit.js", "touch.js"):
        (tmp_path / name).write_bytes((STATIC / name).read_bytes())
    (tmp_path / "_images").mkdir()
    Image.new("RGB", (2000, 300), "white").save(tmp_path / "_images" / "a.png", dpi=(110, 110))
    frames = {"one": [torch.ones(2, 1, 4, 4)] * 3, "other": [-torch.ones(2, 1, 4, 4)] * 3}
    slider = image_slider(frames, ["t = 9", "t = 5", "t = 0"], alt="squares", name="step").data
    bells = touchable(
        "bells", {"betas": [0.1, 0.2]}, still=new_figure()[1], alt="bells", label="bells"
    ).data
    figure = (
        '<figure><img alt="white" src="_images/a.png"><figcaption>Nothing.</figcaption></figure>'
    )
    figure = figures.add_twins(figure, tmp_path)
    code = finish.hang(
        '<div class="highlight"><pre><span></span><span class="n">x</span> = 1\n</pre></div>'
    )
    button = "<p><a class='btn btn-outline-primary' href='#'>Start</a></p>"
    table = "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td>2</td></tr></tbody></table>"
    write_page(tmp_path, "ours.html", slider + bells + figure + code + button + table)
    faults = "<img src='_images/a.png'><p style='color: #888; background: #999'>words</p>"
    write_page(tmp_path, "faults.html", faults)
    return tmp_path


@pytest.mark.parametrize("dark", [False, True])
def test_parts_of_ours_have_no_grave_fault(site, dark):
    pages = ["ours.html", "faults.html"]
    ours, faults = look.measure(site, pages, [1280], dark, access=True, timeout=120)
    assert look.grave_faults(ours) == [] and not look.is_bad(ours), ours
    assert {fault.split()[0] for fault in look.grave_faults(faults)} == {
        "image-alt",
        "color-contrast",
    }
    assert look.is_bad(faults)


@pytest.mark.skipif(BUILT is None, reason="BOOK_SITE names no built site")
@pytest.mark.parametrize("dark", [False, True])
def test_pages_have_no_grave_fault(dark):
    rows = look.measure(BUILT, look.list_pages(BUILT), [1280], dark, access=True, timeout=3000)
    faults = {row["page"]: row.get("error") or look.grave_faults(row) for row in rows}
    assert {page: found for page, found in faults.items() if found} == {}
