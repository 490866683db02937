"""Turn the comment `# checks eq-name` in a page's code into a link to the equation, by its number."""

import re

COMMENT = re.compile(
    r'(<span class="c1">#\s*checks[\s:]+)(eq-[\w-]+(?:,\s*eq-[\w-]+)*)(?=\s*</span>)'
)


def equation_number(env, label):
    """Give the number that Sphinx prints beside an equation, such as 3.4; None for a label that no page has."""
    docname, number = env.get_domain("math").equations.get(label, (None, None))
    if docname is None:
        return None
    if env.config.math_numfig and env.config.numfig:
        parts = (
            env.toc_fignumbers.get(docname, {}).get("displaymath", {}).get(f"equation-{label}", ())
        )
        return ".".join(map(str, parts))
    return str(number)


def linked(env, labels):
    """Write the labels of a comment as links."""
    links = []
    for label in re.split(r",\s*", labels):
        number = equation_number(env, label)
        links.append(
            f'<a class="check" href="#equation-{label}" title="{label}">({number})</a>'
            if number
            else label
        )
    return ", ".join(links)


def on_page(app, pagename, templatename, context, doctree):
    """Rewrite the comments of a page that is about to be written."""
    if "body" in context:
        context["body"] = COMMENT.sub(lambda m: m[1] + linked(app.env, m[2]), context["body"])


def setup(app):
    """Register the extension with Sphinx."""
    app.connect("html-page-context", on_page)
    return {"version": "1", "parallel_read_safe": True}
