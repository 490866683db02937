"""The landing page and the README show what the shipped models draw, at sizes that suit them."""

import importlib.util
import re
import sys
from pathlib import Path

import torch
import yaml
from PIL import Image

from ddpm_nb.files import read_json
from ddpm_nb.hub import load_pretrained

ROOT = Path(__file__).resolve().parent.parent
STATIC, PAGE = ROOT / "book" / "_static", (ROOT / "book" / "intro.md").read_text()
sys.path.insert(0, str(ROOT / "studies"))
import front  # noqa: E402

NOTED = read_json(STATIC / "front.json")
PICTURES = sorted(NOTED["pictures"])


def extension(name):
    """Load a Sphinx extension of the book."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "book" / "_ext" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_are_those_of_the_shipped_models():
    renewed = "a model was renewed: run python studies/front.py"
    assert NOTED["models"] == front.model_fingerprints(), renewed
    assert NOTED["pictures"] == {name: front.fingerprint(STATIC / name) for name in PICTURES}
    assert {p.name for p in STATIC.glob("part-*")} | {
        p.name for p in STATIC.glob("landing-*.png")
    } <= set(PICTURES)


def test_the_landing_page_is_light():
    used = set(re.findall(r"_static/([\w.-]+)", PAGE))
    assert {"landing-walk.png", "landing-still.png", "landing.js"} <= used
    assert sum((STATIC / name).stat().st_size for name in used) <= 300_000


def test_pictures_of_the_readme_are_wide():
    names = re.findall(
        r"!\[[^\]]{40,}\]\(book/_static/([\w-]+\.png)\)", (ROOT / "README.md").read_text()
    )
    assert names == ["samples.png", "sentences.png"]
    for name in names:
        with Image.open(STATIC / name) as picture:
            assert 600 <= picture.width <= 1200


def test_every_part_of_the_book_has_a_card_with_a_picture():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    cards = re.findall(
        r":::\{grid-item-card\} (.+)\n:img-top: (\S+)\n:img-alt: (.+)\n:link: (\S+)\n", PAGE
    )
    assert [card[0] for card in cards] == [part["caption"] for part in toc["parts"]]
    for (_, picture, alt, link), part in zip(cards, toc["parts"], strict=True):
        pages = [chapter["file"] for chapter in part["chapters"]]
        assert (ROOT / "book" / link).resolve().relative_to(ROOT).as_posix() in pages
        assert len(alt) > 30
        with Image.open(ROOT / "book" / picture) as image:
            assert image.width >= 400


def test_the_first_screen_has_a_picture_that_needs_no_script_and_buttons():
    hero = PAGE.partition("```{raw} html")[2].partition("```")[0]
    assert PAGE.index("{raw} html") < PAGE.index("## ")
    assert re.findall(r'class="btn [^"]+" href="([^"]+)"', hero)[0] == "../nbs/00_start.html"
    assert '<img src="../_static/landing-still.png"' in hero and re.search(r'alt="[^"]{40,}"', hero)


def test_addresses_of_the_landing_page_come_from_the_settings(tmp_path):
    settings = "[DEFAULT]\nuser = someone\nrepo = something\nbranch = trunk\n"
    (tmp_path / "settings.ini").write_text(settings)
    app, source = type("App", (), {"srcdir": tmp_path}), [PAGE]
    extension("site_settings").on_source(app, "book/intro", source)
    colab = (
        "https://colab.research.google.com/github/someone/something/blob/trunk/nbs/00_start.ipynb"
    )
    assert (
        f'href="{colab}"' in source[0]
        and "pip install git+https://github.com/someone/something" in source[0]
    )
    assert "@repository@" not in source[0] and "@colab@" not in source[0]
    other = ["@colab@"]
    extension("site_settings").on_source(app, "nbs/00_start", other)
    assert other == ["@colab@"]


def test_the_walk_begins_with_digits_and_meets_noise_half_way():
    _, schedule = load_pretrained("mnist")
    untrained = lambda x, t: torch.zeros_like(x)
    frames = front.dissolve_and_return(untrained, schedule)
    assert len(frames) == 2 * front.N_FRAMES + 1
    with Image.open(STATIC / "landing-walk.png") as strip:
        assert strip.height == len(frames) * strip.width
        first = strip.convert("L").crop((0, 0, strip.width, strip.width))
        with Image.open(STATIC / "landing-still.png") as still:
            assert (
                first.resize(still.size, Image.Resampling.NEAREST).tobytes()
                == still.convert("L").tobytes()
            )
    assert abs(frames[front.N_FRAMES].std() - 1) < 0.05
