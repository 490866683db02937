"""Give each figure of the built pages a twin for dark pages, its size, and loading on sight.

A figure is drawn on white. Its twin has a transparent ground, and lines, letters and fills keep their hue while light and dark change
places. What is a picture by itself (samples, heat maps) stays as it is. A page shows one of the two and loads only that one.
"""

import re
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

DPI = 110  # of `ddpm_nb.plots`: pixels of a screen in an inch of a figure
FRAME = 96  # grey between the images of a sheet (`ddpm_nb.plots.tile`)
NEAR = 8  # what a file with few greys makes of it is so near
LINE = 91  # the grey of lines and fills (`ddpm_nb.plots.COLORS`), which is near it, too
INKED = 250  # what is lighter is paper
SMALLEST = 21  # pixels: what is smaller is a mark, not a sheet
SMALLEST_MAP = 31  # and not a heat map
PALE = 225  # nearly paper
FAINT = 200  # still light
COLOURS = 12  # a fill has fewer, a picture more
FILLS = 8  # that lie side by side make up nearly all of a box; of a picture they are less
LETTERS = 0.92  # how light black becomes
# what a notebook says of a picture with two pixels for each of the page; a page that is narrower must be free to shrink it
STATED = re.compile(r' ?style="\s*width: (\d+)px;\s*height: (\d+)px;?\s*"')
IMG = re.compile(r'<img ([^>]*?)src="([^"]*_images/[^"]+\.png)"([^>]*?)\s*/?>')


def closed(mask, size):
    """Fill what is narrower than `size` pixels in a mask."""
    return ndimage.minimum_filter(ndimage.maximum_filter(mask, size), size)


def opened(mask, size):
    """Leave out of a mask what is narrower than `size` pixels, an odd number."""
    return ndimage.maximum_filter(ndimage.minimum_filter(mask, size), size)


def is_sheet(frame):
    """Tell whether the pixels of a frame stand all round a box, or one pixel inside: the edge of a line is blurred but for its corners."""
    rings = (frame, frame[1:-1, 1:-1])
    edges = (np.concatenate([ring[0], ring[-1], ring[:, 0], ring[:, -1]]) for ring in rings)
    return any(edge.mean() > 0.6 for edge in edges)


def is_colourful(colours):
    """Tell whether some of a box is more than grey."""
    return (colours.max(2) - colours.min(2) > 60).mean() > 0.05


def is_on_paper(colours):
    """Tell whether the colours of a map begin at white, as RdBu and Blues: dark pages turn it as they turn its colour bar."""
    darkest = colours.min(2)
    if (darkest >= FAINT).mean() > 0.95:
        return True  # a map whose values are all near the white one
    return is_colourful(colours) and (darkest >= PALE).mean() > 0.15


def is_heat_map(inked, colours):
    """Tell whether nearly all of a box has ink, in many colours, none of which is most of it."""
    if inked.mean() <= 0.9 or is_on_paper(colours):
        return False
    red, green, blue = (colours // 16).astype(np.uint16).transpose(2, 0, 1)
    counts = np.sort(np.bincount((256 * red + 16 * green + blue).ravel()))
    if is_colourful(colours) and counts[-FILLS:].sum() > 0.95 * inked.size:
        return False  # bars of several colours, crossed by the lines of a grid
    return (counts > 0).sum() > COLOURS and counts[-1] < 0.7 * inked.size


def boxes(mask, smallest):
    """List the boxes round the connected parts of a mask that have at least this size."""
    found = ndimage.find_objects(ndimage.label(mask, np.ones((3, 3)))[0])
    return [box for box in found if min(side.stop - side.start for side in box) >= smallest]


def find_pictures(pixels):
    """Return where in a figure, (H, W, 3) bytes, are pictures: sheets of images, or heat maps."""
    found = np.zeros(pixels.shape[:2], bool)
    red, green, blue = pixels.transpose(2, 0, 1)
    darkest = np.minimum(np.minimum(red, green), blue)
    lightest = np.maximum(np.maximum(red, green), blue)
    frames = (darkest >= FRAME - NEAR) & (lightest <= FRAME + NEAR)
    frames &= (darkest != LINE) | (lightest != LINE)
    inked = darkest < INKED
    for box in boxes(frames, SMALLEST):
        found[box] |= is_sheet(frames[box])
    for box in boxes(opened(closed(inked, 5), SMALLEST), SMALLEST_MAP):
        found[box] |= is_heat_map(inked[box], pixels[box])
    return found


def redraw(colours):
    """Return what lines, letters and fills, (N, 3) bytes on white, are on a dark page: (N, 4) bytes."""
    x = colours / np.float32(255)
    darkest, lightest = x.min(1, keepdims=True), x.max(1, keepdims=True)
    opacity = 1 - darkest
    ink = (x - darkest) / np.maximum(opacity, np.float32(1 / 255))  # over white it gives x
    low, high = ink.min(1, keepdims=True), ink.max(1, keepdims=True)
    ink = LETTERS * np.clip(ink + 1 - low - high, 0, 1)  # lightness 1 - L, the hue kept
    colourful = np.minimum(1, 2 * (lightest - darkest))
    opacity = opacity ** (1 - 0.7 * colourful)
    return (255 * np.concatenate([ink, opacity], 1)).round().astype(np.uint8)


def turn_dark(image):
    """Return the twin of a figure for dark pages, or None if all of it is pictures, without paper beside them."""
    whole = np.asarray(image.convert("RGBA"))
    pictures = find_pictures(whole[:, :, :3])
    paper = whole[:, :, :3].min(2) >= INKED
    if not (paper & ~pictures).any():
        return None
    # a figure has millions of pixels and few colours: each colour is computed once
    numbers = whole.view("<u4")[:, :, 0] & 0xFFFFFF
    seen = np.zeros(1 << 24, bool)
    seen[numbers] = True
    colours = np.flatnonzero(seen).astype("<u4")
    table = np.zeros(len(seen), "<u4")
    table[colours] = redraw(colours.view(np.uint8).reshape(-1, 4)[:, :3]).view("<u4")[:, 0]
    twin = np.where(pictures, numbers | 0xFF000000, table.take(numbers)).astype("<u4")
    return Image.fromarray(twin[:, :, None].view(np.uint8))


@lru_cache
def write_twin(path):
    """Write the dark twin of a file beside it; return its name, or None, and the size on a screen."""
    with Image.open(path) as image:
        scale = DPI / image.info.get("dpi", (DPI,))[0]
        twin, (width, height) = turn_dark(image), image.size
    name = None
    if twin is not None:
        name = f"{path.stem}-dark.png"
        twin.save(path.with_name(name))
    return name, round(width * scale), round(height * scale)


def add_twins(text, folder):
    """Rewrite the figures of a page that lies in a folder."""

    def both(found):
        """Write one figure twice."""
        before, address, after = found.groups()
        path = (Path(folder) / address).resolve()
        if not path.is_file() or 'class="on-' in before + after:
            return found[0]
        name, width, height = write_twin(path)
        if stated := STATED.search(before) or STATED.search(after):
            width, height = stated.groups()
            before, after = STATED.sub("", before), STATED.sub("", after)
        size = "" if "width" in before + after else f' width="{width}" height="{height}"'
        load = f'{size} loading="lazy" decoding="async"'

        def tag(kind, source):
            """Write one of the two; the theme alters pictures on dark pages, but not these."""
            rest = f"{before}{after}"
            if 'class="' in rest:
                rest = rest.replace('class="', f'class="{kind} dark-light ', 1)
            else:
                rest = f'class="{kind} dark-light" {rest}'
            return f'<img {" ".join(rest.split())} src="{source}"{load}>'

        if name is None:
            return tag("on-both", address)
        return tag("on-light", address) + tag("on-dark", address.replace(path.name, name))

    return IMG.sub(both, text)
