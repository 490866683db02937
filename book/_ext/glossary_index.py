"""Put the terms of the glossary into the index, so that the site's search finds the chapter that explains one first.

The last column of book/glossary.md names the chapter. The entry leads to the section whose heading holds the term, or
to the top of the page.
"""

import re
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform

GLOSSARY = "book/glossary.md"
ROW = re.compile(r"^\| (?P<term>[^|]+?) \|.*\(\.\./(?P<docname>[\w/]+)\.ipynb\) \|$", re.M)
ALIASES = {  # what readers also type
    "ELBO": ["evidence lower bound"],
    "EMA": ["exponential moving average"],
    "GAN": ["generative adversarial network"],
    "U-Net": ["unet"],
    "VAE": ["variational autoencoder"],
    "image-to-image": ["img2img"],
    "reparameterisation trick": ["reparameterization trick"],
    "text-to-image": ["txt2img"],
    "timestep": ["time step"],
    "variational lower bound": ["variational bound", "vlb"],
}


def terms_of(root):
    """Map the pages of chapters to the terms that they explain."""
    found = {}
    for row in ROW.finditer(Path(root, GLOSSARY).read_text(encoding="utf-8")):
        found.setdefault(row["docname"], []).append(row["term"])
    return found


def spellings(term):
    """List the ways in which a reader may type a term."""
    words = [term, *ALIASES.get(term, [])]
    return list(dict.fromkeys([*words, *(word.replace("-", " ") for word in words)]))


def plain(words):
    """Write words as they are compared: in small letters, hyphens as spaces."""
    return words.casefold().replace("-", " ")


class IndexTerms(SphinxTransform):
    """Add the terms that a page explains to the index."""

    default_priority = 500

    def apply(self, **kwargs):
        """Put an index entry before each section that explains a term."""
        self.env.note_dependency(GLOSSARY)  # a page without terms may get one
        terms = terms_of(self.env.srcdir).get(self.env.docname)
        sections = [
            s for s in self.document.findall(nodes.section) if isinstance(s[0], nodes.title)
        ]
        if not terms or not sections:
            return
        for term in terms:
            named = [s for s in sections if plain(term) in plain(s[0].astext())]
            target = (named or sections)[0]["ids"][0]
            entries = [("single", words, target, "main", None) for words in spellings(term)]
            self.document.insert(0, addnodes.index(entries=entries))


def setup(app):
    """Register the extension with Sphinx."""
    app.add_transform(IndexTerms)
    return {"version": "1", "env_version": 1, "parallel_read_safe": True}
