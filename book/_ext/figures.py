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
SMALLEST = 21  # pixels: what is smaller is a mark, not a sheet
SMALLEST_MAP = 31  # and not a heat map
COLOURS = 12  # a fill has fewer, a picture more
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
    """Tell whether the pixels of a frame stand all round a box."""
    edge = np.concatenate([frame[0], frame[-1], frame[:, 0], frame[:, -1]])
    return edge.mean() > 0.6


def is_heat_map(inked, colours):
    """Tell whether nearly all of a box has ink, in many colours, none of which is most of it."""
    counts = np.unique((colours // 16) @ (256, 16, 1), return_counts=True)[1]
    return inked.mean() > 0.9 and len(counts) > COLOURS and counts.max() < 0.7 * inked.size


def boxes(mask, smallest):
    """List the boxes round the connected parts of a mask that have at least this size."""
    found = ndimage.find_objects(ndimage.label(mask, np.ones((3, 3)))[0])
    return [box for box in found if min(side.stop - side.start for side in box) >= smallest]


def find_pictures(pixels):
    """Return where in a figure, (H, W, 3) bytes, are pictures: sheets of images, or heat maps."""
    found = np.zeros(pixels.shape[:2], bool)
    frames = (abs(pixels.astype(int) - FRAME) <= NEAR).all(2)
    inked = (pixels < 250).any(2)
    for box in boxes(frames, SMALLEST):
        found[box] |= is_sheet(frames[box])
    for box in boxes(opened(closed(inked, 5), SMALLEST), SMALLEST_MAP):
        found[box] |= is_heat_map(inked[box], pixels[box])
    return found


def turn_dark(image):
    """Return the twin of a figure for dark pages, or None if all of it is a picture."""
    pixels = np.asarray(image.convert("RGB"))
    pictures = find_pictures(pixels)
    if pictures.all():
        return None
    x = pixels / 255
    opacity = 1 - x.min(2, keepdims=True)
    ink = (x - (1 - opacity)) / np.maximum(opacity, 1 / 255)  # over white it gives x
    low, high = ink.min(2, keepdims=True), ink.max(2, keepdims=True)
    ink = LETTERS * np.clip(ink + 1 - low - high, 0, 1)  # lightness 1 - L, the hue kept
    colourful = np.minimum(1, 2 * (x.max(2, keepdims=True) - x.min(2, keepdims=True)))
    opacity = opacity ** (1 - 0.7 * colourful)
    twin = np.concatenate([ink, opacity], 2)
    twin[pictures] = np.concatenate([x, np.ones_like(opacity)], 2)[pictures]
    return Image.fromarray((255 * twin).round().astype(np.uint8))


@lru_cache
def write_twin(path):
    """Write the dark twin of a file beside it; return its name, or None, and the size on a screen."""
    with Image.open(path) as image:
        scale = DPI / image.info.get("dpi", (DPI,))[0]
        twin, (width, height) = turn_dark(image), image.size
    name = None
    if twin is not None:
        name = f"{path.stem}-dark.png"
        twin.save(path.with_name(name), optimize=True)
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
