"""Settings that the site shares with the project: the repository's address, MathJax's files; and two of whoever builds it.

BOOK_EXECUTE=off renders the committed outputs, BOOK_SOLUTIONS=off leaves out the solutions of the exercises.
"""

import configparser
import os
import shutil
from importlib.metadata import files
from pathlib import Path
from urllib.parse import urlsplit

MATHJAX = ("tex-chtml-full.js", "ui/lazy.js", "output/chtml/fonts/woff-v2/*.woff")


def repository(root):
    """Read the repository's URL and branch from settings.ini."""
    settings = configparser.ConfigParser()
    settings.read(Path(root, "settings.ini"))
    values = settings["DEFAULT"]
    return f"https://github.com/{values['user']}/{values['repo']}", values["branch"]


def page_address(root, page):
    """Return the address at which a page of the published site will be."""
    owner, repo = repository(root)[0].split("/")[-2:]
    return f"https://{owner}.github.io/{repo}/{page}"


def on_config_inited(app, config):
    """Point the theme's buttons at the repository and choose whether notebooks run."""
    url, branch = repository(app.srcdir)
    config.html_theme_options |= {
        "repository_url": url,
        "repository_branch": branch,
        "use_repository_button": True,
        "use_issues_button": True,
        "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    }
    config.html_baseurl = page_address(app.srcdir, "")
    config.nb_execution_mode = os.environ.get("BOOK_EXECUTE") or config.nb_execution_mode
    config.hide_solutions = config.hide_solutions or os.environ.get("BOOK_SOLUTIONS") == "off"


def on_source(app, docname, source):
    """Write the repository's address, and Colab's of it, where a page of the book asks for them."""
    if docname.startswith("book/"):
        url, branch = repository(app.srcdir)
        colab = f"https://colab.research.google.com/github{urlsplit(url).path}/blob/{branch}"
        source[0] = source[0].replace("@repository@", url).replace("@colab@", colab)


def on_page(app, pagename, templatename, context, doctree):
    """Leave out the theme's live-code scripts: they are unused here and name a remote host."""
    scripts = context.get("script_files", [])
    context["script_files"] = [
        s for s in scripts if "THEBE" not in (getattr(s, "attributes", {}).get("body") or "")
    ]


def on_build_finished(app, exception):
    """Copy the part of MathJax that the pages load into the site."""
    if exception or app.builder.format != "html":
        return
    for entry in files("sphinx-mathjax-offline"):
        _, _, name = entry.as_posix().partition("/static/mathjax/")
        if name and any(Path(name).match(pattern) for pattern in MATHJAX):
            target = Path(app.outdir, "_static", "mathjax", name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(entry.locate(), target)


def setup(app):
    """Register the extension with Sphinx."""
    app.connect("config-inited", on_config_inited, priority=100)
    app.connect("source-read", on_source)
    app.connect("html-page-context", on_page, priority=900)
    app.connect("build-finished", on_build_finished)
    return {"version": "1", "parallel_read_safe": True}
