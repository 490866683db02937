"""Number a chapter after its file: `nbs/09_training.ipynb` is chapter 9, and a page whose file has no number has none."""

import re

from docutils.nodes import Element
from sphinx_external_toc.collectors import TocTreeCollectorWithStyles as Collector

COUNT = Collector.assign_section_numbers


def chapter_of(docname):
    """Read the number that a file's name begins with; None where there is none."""
    found = re.match(r"(\d+)_", docname.rpartition("/")[2])
    return int(found[1]) if found else None


def renumbered(number, chapter):
    """Put the chapter's number in place of the first part of a section's."""
    return (chapter, *number[1:]) if number and chapter is not None else None


def assign_section_numbers(collector, env):
    """Let Sphinx number the sections, then put each page's chapter first; list the pages whose numbers changed."""
    before = env.toc_secnumbers
    COUNT(collector, env)
    for docname, numbers in env.toc_secnumbers.items():
        chapter = chapter_of(docname)
        env.toc_secnumbers[docname] = {
            anchor: renumbered(number, chapter) for anchor, number in numbers.items()
        }
        for node in (env.titles[docname], *env.tocs[docname].findall(Element)):
            if "secnumber" in node:
                node["secnumber"] = renumbered(node["secnumber"], chapter)
    return [
        docname for docname, numbers in env.toc_secnumbers.items() if numbers != before.get(docname)
    ]


def setup(app):
    """Register the extension with Sphinx."""
    Collector.assign_section_numbers = assign_section_numbers
    return {"version": "1", "env_version": 1, "parallel_read_safe": True}
