"""Write the two faces of the site, text and code, as small fonts.

Usage: python tools/fonts.py NODE_MODULES    (packages @fontsource/source-serif-4 and @fontsource/jetbrains-mono of the npm registry;
needs fonttools and brotli)

The fonts hold the characters that the pages use, under names of their own, and lie in book/_static/fonts with their licences.
"""

import sys
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTFont

FONTS = Path(__file__).resolve().parent.parent / "book" / "_static" / "fonts"
FACES = {  # file here: package, file there
    "text": ("source-serif-4", "source-serif-4-latin-400-normal"),
    "text-italic": ("source-serif-4", "source-serif-4-latin-400-italic"),
    "text-bold": ("source-serif-4", "source-serif-4-latin-600-normal"),
    "code": ("jetbrains-mono", "jetbrains-mono-latin-400-normal"),
}
NAMES = {"source-serif-4": "Book Serif", "jetbrains-mono": "Book Code"}
SIGNS = "\u2013\u2014\u2018\u2019\u201c\u201d\u2022\u2026\u2212\u2192\u0141\u0142\u0144"
CHARACTERS = {*range(0x20, 0x7F), *range(0xA0, 0x100), *map(ord, SIGNS)}
FEATURES = {"text": ["kern", "liga", "mark", "ccmp", "lnum"], "code": []}  # code has no ligatures
ALIASES = {1, 3, 4, 6, 16}  # the records of a font's names


def shrink(source, target, name, features):
    """Write a font with the characters of the pages alone, under another name."""
    font = TTFont(source)
    options = subset.Options(layout_features=features, hinting=False, notdef_outline=True)
    options.name_IDs = ["*"]
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=CHARACTERS)
    subsetter.subset(font)
    for record in font["name"].names:
        if record.nameID in ALIASES:
            record.string = name.replace(" ", "") if record.nameID == 6 else name
    font.flavor = "woff2"
    font.save(target)
    return font["name"].getDebugName(0)


def main():
    """Write all faces and the licence of each."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    packages = Path(sys.argv[1], "@fontsource")
    FONTS.mkdir(parents=True, exist_ok=True)
    for face, (package, file) in FACES.items():
        source = packages / package / "files" / f"{file}.woff2"
        kind = face.partition("-")[0]
        copyright_line = shrink(source, FONTS / f"{face}.woff2", NAMES[package], FEATURES[kind])
        licence = (packages / package / "LICENSE").read_text("utf-8")
        licence = licence[licence.index("This Font Software") :]
        (FONTS / f"OFL-{kind}.txt").write_text(f"{copyright_line}\n\n{licence}", "utf-8")


if __name__ == "__main__":
    main()
