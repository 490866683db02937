"""Show a figure of each chapter at its top, too, so that a reader sees at once what it is about.

book/first_pictures.yml names a figure for a page, and a sentence for who has not read on. Picture and alternative text are those of
the figure, so both agree for ever; the sentence ends with a link to it.
"""

from pathlib import Path

import yaml
from docutils import nodes
from sphinx.util import logging

LISTED = "book/first_pictures.yml"


def read_list(root):
    """Map pages to the name of a figure and a sentence about it."""
    return yaml.safe_load(Path(root, LISTED).read_text(encoding="utf-8"))


def number_of(env, docname, figure):
    """Write the number that a figure has on the site."""
    numbers = env.toc_fignumbers.get(docname, {}).get("figure", {})
    return ".".join(map(str, numbers.get(figure["ids"][0], ())))


def first_picture(figure, sentence, number):
    """Build what stands at the top of a page: the picture, the sentence, and the way to the figure."""
    picture = next(figure.findall(nodes.image)).deepcopy()
    picture["ids"], picture["names"] = [], []
    for option in ("width", "height", "scale"):
        picture.attributes.pop(option, None)
    link = nodes.reference("", f"Fig. {number}", refid=figure["ids"][0], internal=True)
    words = nodes.paragraph("", "", nodes.Text(f"{sentence} ("), link, nodes.Text(")"))
    return nodes.container("", picture, words, classes=["first-picture"])


def add_picture(app, doctree, docname):
    """Put the picture of a page below its title and its sentence."""
    wanted = read_list(app.srcdir).get(docname)
    if wanted is None:
        return
    name, sentence = wanted
    figure = next((f for f in doctree.findall(nodes.figure) if name in f["ids"]), None)
    quote = next(doctree.findall(nodes.block_quote), None)
    if figure is None or quote is None:
        missing = f"{docname} has no figure {name}, or no sentence below its title: see {LISTED}"
        logging.getLogger(__name__).warning(missing)
        return
    place = quote.parent.index(quote) + 1
    picture = first_picture(figure, sentence, number_of(app.env, docname, figure))
    quote.parent.insert(place, picture)


def note_list(app, doctree):
    """Read a page again when the list has changed."""
    app.env.note_dependency(LISTED)


def setup(app):
    """Register the extension with Sphinx."""
    app.connect("doctree-read", note_list)
    app.connect("doctree-resolved", add_picture)
    return {"version": "1", "parallel_read_safe": True}
