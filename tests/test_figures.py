"""Captions and alternative texts say as many rows, columns, images and curves as the stored pictures show, and these are sharp.

Grids of images are told by the grey lines between them, curves by the colours of the book's palette.
"""

import base64
import io
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_nb.plots import COLORS, STYLE, new_figure, plot_curves, show_images, tile, to_pixels

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "nbs").glob("*.ipynb"))
WORDS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen"]
NUMBERS = {word: i for i, word in enumerate(WORDS)} | {"twenty-four": 24, "thirty-two": 32, "forty-eight": 48, "sixty-four": 64}
DPI = STYLE["figure.dpi"]
NUMBER = rf"({'|'.join(sorted(NUMBERS, key=len, reverse=True))}|\d+)"
CURVES = rf"\b{NUMBER}(?: [\w-]+)? curves\b"
COUNTED = rf"\b{NUMBER}(?: [\w-]+)? (?:rows?|samples|digits|pictures|images|curves)\b"
GAP, MANY = 96, 40  # the grey of `tile` between images; pixels that a curve has at least
# what else a text may name that has a colour of the palette, or hides one
OTHERS = r"lines?\b|bells?\b|histograms?|dots?\b|points?\b|bars?\b|levels?\b|crosses|band|bundles|arrows|solid|dashed|coincide"


def number(word):
    """Return the number that a word or digits say."""
    return NUMBERS[word] if word in NUMBERS else int(word)


def figures():
    """Yield notebook, cell, caption with alternative text, and pixels (H, W, 3) of every stored picture whose texts count something."""
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text())["cells"]:
            texts = cell["metadata"].get("mystnb", {})
            told = [texts.get("figure", {}).get("caption", ""), texts.get("image", {}).get("alt", "")]
            data = [o["data"]["image/png"] for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
            if any(re.search(COUNTED, text.lower()) for text in told) and data:
                yield f"{path.stem} {cell['id']}", told, pixels_of(base64.b64decode("".join(data[0])))


def pixels_of(png):
    """Read a PNG as whole numbers (H, W, 3) that may become negative."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(np.int16)


def grid_of(pixels):
    """Return rows and columns of a grid of images, or None where there is no such grid."""
    grey = (abs(pixels - GAP) <= 2).all(2)
    counts = []
    for axis in (1, 0):
        share = grey.mean(axis)
        if share.max() < 0.3:
            return None
        steps = np.diff(np.flatnonzero(share > 0.9 * share.max()))
        steps = steps[steps > 1]  # from the end of one line to the next
        if not len(steps) or steps.max() > 1.2 * steps.min():
            return None  # several panels
        counts.append(len(steps))
    return tuple(counts)


def n_colors(pixels):
    """Count the colours of the palette, its grey left out, that a picture shows."""
    palette = [[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in COLORS[:6]]
    return sum(int((abs(pixels - color) <= 8).all(2).sum()) > MANY for color in palette)


def grid_problem(text, grid):
    """Say what a text tells otherwise of a grid of images, if anything."""
    rows, columns = grid
    if (found := re.search(rf"\b{NUMBER} rows? of {NUMBER}\b", text)) and "third row" not in text:
        said = tuple(map(number, found.groups()))
        if said != (rows, columns):
            return f"says {found[0]!r} of {rows} rows of {columns}"
    for found in re.finditer(rf"(?:^|[:.] ){NUMBER}(?: \w+)? (?:samples|digits|pictures|images)\b", text):
        if number(found[1]) not in (rows, columns, rows * columns):
            return f"says {found[0]!r} of {rows} rows of {columns}"
    return None


def curve_problem(text, n):
    """Say what a text tells otherwise of `n` colours, if anything."""
    said = [number(found[1]) for found in re.finditer(CURVES, text)]
    if not said:
        return None
    most, least = sum(said), max(said)
    if re.search(OTHERS, text):
        most += len(re.findall(OTHERS, text)) + 2
        least -= least // 2 if re.search("solid|dashed", text) else "coincide" in text
    return None if least <= n <= most else f"says {said} curves of {n} colours"


def test_texts_and_pictures_agree_on_rows_columns_and_curves():
    problems, n_grids, n_curves = [], 0, 0
    for where, told, pixels in figures():
        grid = grid_of(pixels)
        for text in (text.lower() for text in told):
            found = []
            if grid is not None:
                n_grids += bool(re.search(f"{NUMBER} rows? of", text))
                found.append(grid_problem(text, grid))
            else:
                if re.search(CURVES, text):
                    n_curves += 1
                    found.append(curve_problem(text, n_colors(pixels)))
            problems += [f"{where}: {problem}" for problem in found if problem]
    assert not problems, "\n".join(problems)
    assert n_grids > 30 and n_curves > 15  # the test still sees what it is about


def dull(png, width=None):
    """Tell whether a stored picture has fewer than two pixels for each pixel of the page that it is shown on."""
    with Image.open(io.BytesIO(png)) as image:
        dpi, pixels = image.info.get("dpi", (DPI,))[0], image.width
    shown = width or pixels * DPI / dpi  # as book/_ext/figures.py has it
    return pixels < 1.98 * shown


def test_stored_pictures_are_sharp():
    """Screens have two pixels for each of a page, and a page that draws without `new_figure` may not fall back."""
    found, n = [], 0
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text())["cells"]:
            for output in cell.get("outputs", []):
                if "image/png" not in output.get("data", {}):
                    continue
                n += 1
                width = output["metadata"].get("image/png", {}).get("width")
                if dull(base64.b64decode("".join(output["data"]["image/png"])), width):
                    found.append(f"{path.stem} {cell['id']}")
    assert not found, "draw with two pixels for each of the page (new_figure, or dpi=220): " + ", ".join(found)
    assert n > 100


@pytest.mark.parametrize(("dpi", "width", "is_dull"), [(100, None, True), (110, None, True), (220, None, False), (220, 300, False), (110, 300, True)])
def test_a_picture_with_one_pixel_for_each_of_the_page_is_told(dpi, width, is_dull):
    png = io.BytesIO()
    Image.new("RGB", (300 * dpi // 110, 20)).save(png, "PNG", dpi=(dpi, dpi))
    assert dull(png.getvalue(), width) is is_dull


def drawn(figure):
    """Save a figure as a notebook does and return its pixels."""
    file = io.BytesIO()
    figure.savefig(file, dpi=110, bbox_inches="tight", format="png")
    plt.close(figure)
    return pixels_of(file.getvalue())


@pytest.mark.parametrize(("n", "columns"), [(8, 8), (32, 16), (10, 5), (6, 3)])
def test_grids_are_counted(n, columns):
    images = torch.rand(n, 1, 8, 8) * 2 - 1
    figure = show_images(images, n_cols=columns, row_titles=range(n // columns)).figure
    grid = grid_of(drawn(figure))
    assert grid == (n // columns, columns)
    assert grid_problem(f"{WORDS[n // columns]} rows of {columns} digits", grid) is None
    assert grid_problem(f"nine rows of {columns} digits", grid)
    assert grid_problem("eleven samples of the network", grid)


@pytest.mark.parametrize(("n", "columns"), [(6, 3), (5, 3)])
def test_images_are_laid_in_rows_from_the_left(n, columns):
    """The order in which one reads: the second image stands right of the first, and what is missing is missing at the end."""
    x = torch.linspace(-1, 1, n).view(n, 1, 1, 1).expand(n, 1, 2, 2)
    sheet = tile(x, columns)
    assert sheet.shape == (7, 10, 1)
    assert sheet[1::3, 1::3].ravel().tolist()[:n] == to_pixels(x)[:, 0, 0, 0].tolist()
    assert (sheet[1::3, 1::3].ravel()[n:] == GAP).all()


@pytest.mark.parametrize("n", [1, 2, 4])
def test_curves_are_counted(n):
    figure, ax = new_figure()
    x = np.linspace(0, 1, 50)
    plot_curves(x, {f"curve {i}": i + x for i in range(n)}, ax=ax)
    ax.axhline(0.3, color="0.4", ls="--")
    assert n_colors(drawn(figure)) == n
    assert curve_problem(f"{WORDS[n]} rising curves", n) is None or n == 1
    assert curve_problem("six curves", n) and (n == 1 or curve_problem("three curves", n))
    assert curve_problem("four curves: two solid, two dashed", 2) is None
