"""Draw the pictures of the landing page, of the README and of the first screen of two chapters from the shipped models.

Usage: python studies/front.py

Run it again whenever a model under ddpm_nb/weights or ddpm_nb/pipelines is renewed: it writes the
fingerprints of the models and of the pictures to book/_static/front.json, and a test compares them.
No picture is chosen by eye: each is the first draw of its seed.
"""

import argparse
import hashlib

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import PICTURES, save_grey, write
from PIL import Image, ImageDraw
from torch.nn.functional import interpolate

from ddpm_nb.bound import optimal_denoiser
from ddpm_nb.files import replaced_file
from ddpm_nb.forward import predict_x_0, q_sample
from ddpm_nb.gaussian import GaussianMixture, randn, seeded
from ddpm_nb.hub import SHIPPED, load_pretrained
from ddpm_nb.latent import from_latents, to_latents
from ddpm_nb.pipeline import PIPELINES, TextToImage
from ddpm_nb.plots import new_figure, plot_curves, show_images, tile
from ddpm_nb.sampling import sample_ddim
from ddpm_nb.schedules import SCHEDULES, make_schedule
from ddpm_nb.scores import score

MODELS = {"digits": SHIPPED, "mnist": SHIPPED, "mnist pipeline": PIPELINES}
SENTENCE = "a large bold seven leaning right"
SENTENCES = (SENTENCE, "a thin small four", "an upright two")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "eight")
N_FRAMES = 20  # of each half of the walk on the landing page
STEPS = (400, 650, 900)  # of the rows that dissolve
NAMES = ("chapter-*.png", "landing-*.png", "part-*.png", "samples.png", "sentences.png", "apple-touch-icon.png")


def fingerprint(path):
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def model_fingerprints():
    """Return the SHA-256 of the weights of every model that the pictures come from."""
    files = {name: home / name.split()[0] / "model.safetensors" for name, home in MODELS.items()}
    return {name: fingerprint(path) for name, path in files.items()}


def draw(model, schedule, n, seed):
    """Draw n pictures of 28 x 28 pixels in 50 steps."""
    return sample_ddim(model, schedule, (n, 1, 28, 28), generator=seeded(seed))


def dissolve_and_return(model, schedule):
    """Return the frames of nine digits that turn to noise, and of those that the noise turns into."""
    x_0, eps = draw(model, schedule, 9, 0), randn((9, 1, 28, 28), generator=seeded(1))
    last = schedule.n_steps - 1
    steps = [round(last * i / N_FRAMES) for i in range(1, N_FRAMES + 1)]
    frames = [x_0] + [q_sample(schedule, x_0, t, eps) for t in steps]
    walked = []
    sample_ddim(
        model,
        schedule,
        x_0.shape,
        n_steps=5 * N_FRAMES,
        x_T=frames[-1],
        callback=lambda t, x, x_0_hat: walked.append(x),
    )
    return frames + walked[4::5]


def save_walk(model, schedule):
    """Write the frames of the landing page's walk below each other, and the first by itself."""
    sheets = [tile(x, 3) for x in dissolve_and_return(model, schedule)]
    save_grey(PICTURES / "landing-walk.png", np.concatenate(sheets))
    save_grey(PICTURES / "landing-still.png", sheets[0], 4)


def save_card(name, x):
    """Write eight pictures as the image of a part's card."""
    save_grey(PICTURES / f"part-{name}.png", tile(x, 4), 4 * 28 // x.shape[-1])


def save_start():
    """Write noise, and the digits that the small model makes of it."""
    model, schedule = load_pretrained("digits")
    noise = randn((4, 1, 8, 8), generator=seeded(2))
    digits = sample_ddim(model, schedule, noise.shape, x_T=noise)
    save_card("start", torch.cat([noise, digits]))


def save_noising(model, schedule):
    """Write two digits at four steps, and what the network says of them."""
    x_0 = draw(model, schedule, 2, 3)  # (2, 1, 28, 28)
    eps = randn(x_0.shape, generator=seeded(4))
    noisy = [x_0] + [q_sample(schedule, x_0, t, eps) for t in STEPS]
    save_card("foundations", torch.stack(noisy, 1).flatten(0, 1))
    t = torch.full((2,), STEPS[1])
    with torch.inference_mode():
        eps_hat = model(noisy[2], t)
    x_0_hat = predict_x_0(schedule, noisy[2], t, eps_hat)
    save_card("network", torch.stack([noisy[2], eps_hat, x_0_hat, x_0], 1).flatten(0, 1))


def save_learning(model, schedule):
    """Write a walk from noise: the pictures above, below them the guesses of where they lead."""
    states = []
    options = {"n_steps": 50, "generator": seeded(5)}
    options["callback"] = lambda t, x, x_0_hat: states.append((x, x_0_hat))
    sample_ddim(model, schedule, (1, 1, 28, 28), **options)
    chosen = [states[i] for i in (4, 24, 36, 49)]
    save_card("learning", torch.cat([x for x, _ in chosen] + [guess for _, guess in chosen]))


def save_sentences(pipeline):
    """Write what a sentence becomes, what three do, and a card of eight digits by their names."""
    pictures = pipeline.generate(list(SENTENCES), n=10, generator=seeded(0))
    save_grey(PICTURES / "landing-sentence.png", tile(pictures[:6], 6), 4)
    axes = show_images(pictures, n_cols=10, row_titles=SENTENCES, cell=0.7)
    axes.figure.savefig(PICTURES / "sentences.png", dpi=110, bbox_inches="tight")
    plt.close(axes.figure)
    words = [f"a bold {word} leaning right" for word in WORDS]
    save_card("stable-diffusion", pipeline.generate(words, n=1, guidance=4.0, generator=seeded(6)))


def save_dissolving(model, schedule):
    """Write two digits at ten steps, for the chapter on the forward process."""
    x_0 = draw(model, schedule, 2, 8)
    eps = randn(x_0.shape, generator=seeded(9))
    noisy = [x_0] + [q_sample(schedule, x_0, t, eps) for t in range(99, 1000, 100)]
    save_grey(PICTURES / "chapter-forward.png", tile(torch.stack(noisy, 1).flatten(0, 1), 11), 3)


def save_latents(model, schedule, pipeline):
    """Write a digit, its latents and what comes back of them, twice, for the chapter on latents."""
    x_0 = draw(model, schedule, 2, 10)
    codes = to_latents(pipeline.autoencoder, x_0)  # (2, 4, 8, 8)
    large = interpolate(codes / 3, (28, 28), mode="nearest").clamp(-1, 1)
    back = from_latents(pipeline.autoencoder, codes).clamp(-1, 1)
    rows = torch.cat([x_0, large, back], 1).reshape(-1, 1, 28, 28)
    save_grey(PICTURES / "chapter-latent.png", tile(rows, 6), 4)


def shape(kind, colour, size=28):
    """Draw a disc, a square, a ring or a cross in colour on black, (3, size, size) in [-1, 1]."""
    y, x = torch.meshgrid(*[torch.linspace(-1.4, 1.4, size)] * 2, indexing="ij")
    radius = torch.hypot(x, y)
    square = torch.maximum(x.abs(), y.abs())
    inside = {
        "disc": radius < 1,
        "square": square < 0.9,
        "ring": (radius < 1.1) & (radius > 0.6),
        "cross": (torch.minimum(x.abs(), y.abs()) < 0.3) & (square < 1.1),
    }[kind]
    return torch.where(inside, torch.tensor(colour)[:, None, None], -1.0)


def save_practice(schedule):
    """Write four pictures in colour that are drawn here, and the same with noise."""
    kinds = ("disc", "square", "ring", "cross")
    colours = ([0.9, 0.3, -0.8], [-0.9, 0.1, 0.7], [-0.9, 0.4, 0.0], [0.6, 0.0, 0.4])
    x_0 = torch.stack([shape(*pair) for pair in zip(kinds, colours, strict=True)])
    eps = randn(x_0.shape, generator=seeded(7))
    noisy = q_sample(schedule, x_0, STEPS[0], eps)
    sheet = Image.fromarray(tile(torch.cat([x_0, noisy]), 4))
    sheet = sheet.resize((4 * sheet.width, 4 * sheet.height), Image.Resampling.NEAREST)
    small = sheet.quantize(64)
    small.save(PICTURES / "part-practice.png", optimize=True)


def save_other_names():
    """Write the score of three groups in a plane, as arrows of one length."""
    means = torch.tensor([[-2.0, -0.4], [0.8, 0.6], [1.6, -0.8]])
    mixture = GaussianMixture(torch.ones(3) / 3, means, 0.1 * torch.eye(2).repeat(3, 1, 1))
    schedule = make_schedule("linear", 1000)
    x, y = torch.meshgrid(torch.linspace(-3.6, 3.2, 24), torch.linspace(-1.7, 1.5, 12), indexing="xy")
    points = torch.stack([x.flatten(), y.flatten()], 1)
    arrows = score(optimal_denoiser(mixture, schedule), schedule, points, 60)
    arrows = arrows / arrows.norm(dim=1, keepdim=True)
    _, ax = new_figure(size=(4.7, 2.4))
    ax.quiver(*points.T, *arrows.T, color="#0072b2", scale=26, width=0.005, pivot="mid")
    ax.scatter(*mixture.sample(150, generator=seeded(0)).T, s=6, color="#d55e00", zorder=3)
    ax.set(xticks=[], yticks=[])
    ax.figure.savefig(PICTURES / "part-other-names.png", dpi=100)
    plt.close(ax.figure)


def save_reference():
    """Write the share of signal under four schedules."""
    _, ax = new_figure(size=(4.7, 2.4))
    curves = {name: make_schedule(name, 1000).alpha_bars for name in SCHEDULES}
    plot_curves(range(1000), curves, ax=ax, x_label="", styles={name: {"lw": 3} for name in curves})
    ax.set(xticks=[], yticks=[])
    ax.figure.savefig(PICTURES / "part-reference.png", dpi=100)
    plt.close(ax.figure)


def save_icon(side=180):
    """Write the site's icon for a phone's first screen: the bell and the noise of favicon.svg, which stands on 32 x 32."""
    unit = 4 * side / 32  # drawn four times as large, for smooth edges
    icon = Image.new("RGB", (4 * side, 4 * side), "#0b4f71")
    pen, dots = ImageDraw.Draw(icon), [(8, 9, 1.6), (24, 10, 1.6), (27, 16, 1.2), (5, 15, 1.2), (16, 26, 1.4)]
    s = np.linspace(0, 1, 200)[:, None]
    weights = np.hstack([(1 - s) ** 3, 3 * s * (1 - s) ** 2, 3 * s**2 * (1 - s), s**3])  # of a Bezier curve
    left = np.array([[4, 24], [10, 24], [12, 8], [16, 8]])
    right = np.array([[16, 8], [20, 8], [22, 24], [28, 24]])
    for x, y in np.vstack([weights @ left, weights @ right]):
        pen.ellipse([unit * (x - 1.5), unit * (y - 1.5), unit * (x + 1.5), unit * (y + 1.5)], fill="white")
    for x, y, r in dots:
        pen.ellipse([unit * (x - r), unit * (y - r), unit * (x + r), unit * (y + r)], fill="#ffb454")
    with replaced_file(PICTURES / "apple-touch-icon.png") as file:
        icon.resize((side, side), Image.Resampling.LANCZOS).save(file, format="png", optimize=True)


def main():
    """Draw all pictures and note what they were drawn from."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    model, schedule = load_pretrained("mnist")
    save_walk(model, schedule)
    save_grey(PICTURES / "samples.png", tile(draw(model, schedule, 96, 0), 16), 2)
    save_start()
    save_noising(model, schedule)
    save_learning(model, schedule)
    pipeline = TextToImage.from_pretrained("mnist")
    save_sentences(pipeline)
    save_dissolving(model, schedule)
    save_latents(model, schedule, pipeline)
    save_practice(schedule)
    save_reference()
    save_other_names()
    save_icon()
    names = sorted(path.name for pattern in NAMES for path in PICTURES.glob(pattern))
    pictures = {name: fingerprint(PICTURES / name) for name in names}
    write(PICTURES / "front.json", {"models": model_fingerprints(), "pictures": pictures})


if __name__ == "__main__":
    main()
