"""Pictures that one can touch: the script computes what the book's Python computes, and it answers keys, fingers and ears."""

import json
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import look
import nbformat
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ddpm_nb.bound import optimal_denoiser
from ddpm_nb.elbo import diffuse_mixture
from ddpm_nb.forward import NoiseSchedule, q_mean_variance, q_posterior, q_sample
from ddpm_nb.gaussian import GaussianMixture, normal_kl, reparameterize
from ddpm_nb.plots import HEAVIEST, frame_sheet, image_slider, new_figure, tile, touchable
from ddpm_nb.sampling import ddim_step
from ddpm_nb.schedules import make_schedule

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "book" / "_static" / "touch.js"
f64 = torch.float64
browser = pytest.mark.skipif(look.find_browser() is None, reason="needs Chromium")


@pytest.fixture
def compute(tmp_path):
    """Call a formula of the script, in Node or else in Chromium."""
    node = shutil.which("node")
    if node is None and look.find_browser() is None:
        pytest.skip("needs Node or Chromium to run the script")

    def call(name, *values):
        made = f"formulas.{name}(...{json.dumps(values)})"
        if node:
            code = f"const formulas = require({json.dumps(str(SCRIPT))});"
            code += f"process.stdout.write(JSON.stringify({made}));"
            done = subprocess.run([node, "-e", code], capture_output=True, check=True, timeout=60)
            return json.loads(done.stdout)
        page = f"<!doctype html><script>var module = {{}}</script><script>{SCRIPT.read_text('utf-8')}</script>"
        return look.run_script(tmp_path, page, f"const formulas = module.exports; return {made}")

    return call


def same(found, expected):
    """Compare numbers to a millionth."""
    expected = torch.as_tensor(expected, dtype=f64)
    found = torch.as_tensor(found, dtype=f64)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("t", [2, 3, 10])
def test_bells_are_those_of_the_posterior(compute, t):
    chain = NoiseSchedule(torch.linspace(0.02, 0.5, 10, dtype=f64), dtype=f64)
    clean, noisy = torch.tensor([0.7], dtype=f64), torch.tensor([-1.3], dtype=f64)
    state = {"t": t, "clean": 0.7, "noisy": -1.3}
    found = compute("bells", {"betas": chain.betas.tolist()}, state)
    mean, variance, _ = q_posterior(chain, clean, noisy, t - 1)
    same(found["posterior"]["mean"], mean.item())
    same(found["posterior"]["std"] ** 2, variance.item())
    mean, variance, _ = q_mean_variance(chain, clean, t - 2)
    same(
        [found["fromClean"]["mean"], found["fromClean"]["std"] ** 2], [mean.item(), variance.item()]
    )
    # the density of the step as a function of where it began: a maximum at x_t / sqrt(alpha)
    xs = torch.linspace(-3, 3, 7, dtype=f64)
    alpha, beta = chain.alphas[t - 1], chain.betas[t - 1]
    expected = torch.distributions.Normal(alpha.sqrt() * xs, beta.sqrt()).log_prob(noisy)
    given = (found["fromNoisy"][key] * torch.ones((), dtype=f64) for key in ("mean", "std"))
    given = torch.distributions.Normal(*given)
    same((given.log_prob(xs) - expected).diff().tolist(), torch.zeros(6))


@pytest.mark.parametrize("steps", [25, 300, 1000])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", {}),
        ("rescaled", {"rescale": True}),
        ("cosine", {"s": 0.04}),
        ("sigmoid", {"tau": 0.6}),
    ],
)
def test_schedules_are_those_of_the_package(compute, name, options, steps):
    state = {"steps": steps, "s": 0.04, "tau": 0.6}
    kind = "linear" if name == "rescaled" else name
    expected = make_schedule(kind, steps, dtype=f64, **options)
    found = compute("schedule", name, state)
    same(found["alphaBars"], expected.alpha_bars)
    same(found["logSnr"], expected.log_snr)
    same(compute("betasOf", name, state), expected.betas)


def test_noisy_image_is_that_of_the_package(compute):
    schedule = make_schedule("cosine", 50, dtype=f64)
    x_0, eps = torch.randn(2, 1, 9, dtype=f64)
    t = 20
    alpha_bar, noise = schedule.alpha_bars[t].item(), schedule.one_minus_alpha_bars[t].item()
    found = compute("noisy", x_0[0].tolist(), eps[0].tolist(), alpha_bar, noise)
    same([found], q_sample(schedule, x_0, t, eps))


def test_estimators_are_the_gradients(compute):
    eps = torch.randn(50, dtype=f64)
    mean = torch.full((50,), 1.2, dtype=f64, requires_grad=True)
    std = torch.tensor(0.3, dtype=f64)
    z = reparameterize(mean, std, eps)
    (pathwise,) = torch.autograd.grad(z.square().sum(), mean)
    log_prob = torch.distributions.Normal(mean, std).log_prob(z.detach())
    (score,) = torch.autograd.grad((log_prob * z.detach().square()).sum(), mean)
    found = compute("estimators", {"eps": eps.tolist()}, {"mean": 1.2, "std": 0.3})
    same(found["pathwise"], pathwise)
    same(found["score"], score)
    # the variances, exactly: polynomials of a standard normal variable
    nodes, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(20))
    weights = weights / weights.sum()
    at_nodes = compute("estimators", {"eps": nodes.tolist()}, {"mean": 1.2, "std": 0.3})
    for kind in ("pathwise", "score"):
        values = torch.tensor(at_nodes[kind], dtype=f64)
        middle = (weights * values).sum()
        same(middle, 2.4)
        same(found[f"{kind}Variance"], (weights * (values - middle).square()).sum())


def test_bound_and_gap_are_those_of_the_elbo(compute):
    x, m, s = 1.5, 0.4, 0.5
    data = {"x": x, "slope": 0.8, "variance": 0.36}
    found = compute("bound", data, {"mean": m, "std": s})
    one = torch.ones((), dtype=f64)
    evidence = torch.distributions.Normal(0 * one, one).log_prob(x * one)
    gap = normal_kl(m * one, 2 * (s * one).log(), 0.8 * x * one, (0.36 * one).log())
    same([found["truth"], found["gap"], found["bound"]], [evidence, gap, evidence - gap])
    same([found["posterior"]["mean"], found["posterior"]["variance"]], [1.2, 0.36])


@pytest.fixture
def plane():
    return GaussianMixture(
        torch.tensor([0.15, 0.5, 0.35], dtype=f64),
        torch.tensor([[-2.0, -0.4], [0.8, 1.0], [1.2, -1.1]], dtype=f64),
        torch.tensor(
            [[[0.06, 0], [0, 0.12]], [[0.16, 0.08], [0.08, 0.1]], [[0.05, -0.02], [-0.02, 0.1]]],
            dtype=f64,
        ),
    )


def numbers(mixture):
    names = ("weights", "means", "covariances")
    return {name: getattr(mixture, name).tolist() for name in names}


@pytest.mark.parametrize("t", [0, 300, 999])
def test_guess_in_the_mixture_is_the_best_denoiser(compute, plane, t):
    schedule = make_schedule("linear", 1000, dtype=f64)
    point = torch.tensor([[0.4, -0.9]], dtype=f64)
    alpha_bar = schedule.alpha_bars[t].item()
    found = compute("denoise", numbers(plane), point[0].tolist(), alpha_bar)
    same([found["eps"]], optimal_denoiser(plane, schedule)(point, t))
    expected = diffuse_mixture(plane, schedule, t).responsibilities(point)
    same([found["responsibilities"]], expected)


def test_particles_walk_as_ddim_does(compute, plane):
    schedule = make_schedule("linear", 1000, dtype=f64)
    levels = [999, 700, 400, 150, 20, 0]
    x = torch.randn(5, 2, dtype=f64)
    denoiser, path = optimal_denoiser(plane, schedule), [x]
    for t, t_prev in pairwise(levels):
        x, _ = ddim_step(schedule, x, t, t_prev, denoiser(x, t), clip_x_0=False)
        path.append(x)
    alpha_bars = schedule.alpha_bars[levels].tolist()
    same(compute("walk", numbers(plane), path[0].tolist(), alpha_bars), torch.stack(path))


@pytest.mark.parametrize("position", [0, 2])
def test_histogram_and_factors_are_those_of_the_forward_process(compute, position):
    schedule = make_schedule("cosine", 50, dtype=f64)
    ts = [5, 20, 45]
    x_t = q_sample(schedule, torch.rand(4, 1, 8, 8, dtype=f64) * 2 - 1, ts[position], torch.randn(4, 1, 8, 8, dtype=f64))
    counts = [[0] * 60] * position + [x_t.histc(60, -3, 3).int().tolist()]
    data = {"alpha_bars": schedule.alpha_bars[ts].tolist(), "counts": counts, "ends": [-3, 3]}
    found = compute("dissolve", data, {"position": position})
    factors = schedule.sqrt_alpha_bars[ts[position]], schedule.sqrt_one_minus_alpha_bars[ts[position]]
    same([found["signal"], found["noise"]], factors)
    same(found["density"], np.histogram(x_t.numpy(), 60, (-3, 3), density=True)[0])


@pytest.mark.parametrize("layers", [1, 4, 12])
def test_receptive_field_is_that_of_the_convolutions(compute, layers):
    image = torch.zeros(1, 1, 41, 41, dtype=f64, requires_grad=True)
    kernel, x = torch.ones(1, 1, 3, 3, dtype=f64), image
    for _ in range(layers):
        x = F.conv2d(x, kernel, padding=1)
    (grad,) = torch.autograd.grad(x[0, 0, 20, 20], image)
    rows, columns = grad[0, 0].nonzero().T
    side = compute("receptiveField", layers)["side"]
    assert [rows.max() - rows.min() + 1, columns.max() - columns.min() + 1] == [side, side]


# ------------------------------------------------------------------ the pages


def stored_pictures():
    """List notebook, figure options and markup of each picture that one can touch."""
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        for cell in nbformat.read(path, 4).cells:
            for output in cell.get("outputs", []):
                text = output.get("data", {}).get("text/html", "")
                if 'class="touch"' in text:
                    yield path.name, cell.metadata.get("mystnb", {}).get("figure", {}), text


def test_pictures_of_the_book_have_number_caption_and_weight():
    weights, script = {}, SCRIPT.read_text("utf-8")
    for page, figure, text in stored_pictures():
        name = re.search('data-picture="([^"]*)"', text)[1]
        assert re.search(rf"^    {name}: {{", script, re.M), f"{page}: touch.js has no {name}"
        assert figure.get("caption") and figure.get("name"), f"{page}: {name} has no caption"
        weights[page] = weights.get(page, 0) + len(text)
    assert weights and max(weights.values()) <= HEAVIEST, weights


def test_picture_that_is_too_heavy_is_refused():
    ax = new_figure()[1]
    with pytest.raises(ValueError, match="may add 150,000 bytes"):
        touchable("bells", {"betas": [0.5] * 50_000}, still=ax, alt="a", label="b")


def test_text_of_a_picture_cannot_leave_it():
    ax = new_figure()[1]
    page = touchable("bells", {"a": "</script><b>"}, still=ax, alt='"><b>', label="<i>").data
    assert "<b>" not in page and "<i>" not in page and page.count("</script>") == 1
    data = re.search(r"json\">(.*)</script>", page)[1]
    assert json.loads(data) == {"a": "</script><b>"}


DRIVER = """
  const box = document.querySelector(".touch"), told = [];
  const tell = () => told.push([...box.querySelectorAll("input[type=range]")].map(i => i.getAttribute("aria-valuetext")));
  tell();
  STEPS
  return [document.documentElement.outerHTML, told];
"""


def drive(picture, steps, tmp_path, *options, css=""):
    """Load a picture with its script, do something, and return the document and what the sliders said."""
    css = f"<style>{css or (SCRIPT.parent / 'book.css').read_text()}</style>"
    page = f"<!doctype html><html data-theme='light'><head>{css}<script>{SCRIPT.read_text('utf-8')}</script>"
    return look.run_script(tmp_path, f"{page}</head><body>{picture.data}", DRIVER.replace("STEPS", steps), *options)


@browser
def test_frames_are_the_images_of_the_package(tmp_path):
    frames = {name: torch.rand(3, 2, 1, 6, 6) * 2 - 1 for name in ("one", "other")}
    rows = {name: list(row) for name, row in frames.items()}
    picture = image_slider(rows, ["a", "b", "c"], alt="squares", n_cols=2, scale=3)
    steps = """
    const canvas = box.querySelector("canvas"), slider = box.querySelector("input[type=range]");
    const pen = canvas.getContext("2d");
    told.length = 0;
    for (const radio of box.querySelectorAll("input[type=radio]")) for (const i of [0, 1, 2]) {
      radio.checked = true; radio.dispatchEvent(new Event("change"));
      slider.value = i; slider.dispatchEvent(new Event("input"));
      const { data } = pen.getImageData(0, 0, canvas.width, canvas.height);
      told.push([canvas.width, canvas.height, Array.from(data).filter((_, j) => j % 4 === 0)]);
    }
    """
    _, told = drive(picture, steps, tmp_path)
    images = [frame for row in rows.values() for frame in row]
    for (width, height, red), frame in zip(told, images, strict=True):
        drawn, expected = np.reshape(red, (height, width)), tile(frame, 2).squeeze()
        left = (width - 3 * expected.shape[1]) // 2
        inner = drawn[1::3, left + 1 :: 3][: expected.shape[0], : expected.shape[1]]
        assert abs(inner - expected.astype(int)).max() <= 4  # middles of pixels; a sheet has few greys


@browser
def test_attention_is_told_as_python_counts_it(tmp_path):
    image = torch.randn(8, 8, dtype=f64)
    patches = F.unfold(image[None, None], 5, padding=2).mT
    patches = F.normalize(patches - patches.mean(2, keepdim=True), dim=2)
    weights = ((9 * patches) @ patches.mT / 5).softmax(-1)[0, 3 * 8 + 6]
    order = weights.argsort(descending=True)
    count = int((weights[order].cumsum(0) < 0.5).sum()) + 1
    far = max(max(abs(int(i) // 8 - 3), abs(int(i) % 8 - 6)) for i in order[:count])
    data = {"side": 8, "image": image.flatten().tolist(), "patch": 5, "sharpness": 9}
    picture = touchable("attention", data, still=new_figure()[1], alt="a digit", label="attention")
    steps = """
    const values = { row: 3, column: 6, layers: 5 };
    for (const slider of box.querySelectorAll("input[type=range]")) {
      slider.value = values[slider.id.split("-").at(-1)]; slider.dispatchEvent(new Event("input"));
    }
    tell();
    """
    words = drive(picture, steps, tmp_path)[1][-1][0]
    assert "The convolutions see 11 by 11 pixels." in words
    assert f"attention goes to {count} of 64 pixels, the farthest of them {far} away." in words


PLAY = """
    let now = 0, next = null;  // a clock by hand
    performance.now = () => now;
    window.requestAnimationFrame = call => { next = call; };
    box.querySelector("button").click();
    for (now = 0; now <= 1500; now += 50) next(now);
    told.push([matchMedia("(prefers-reduced-motion: reduce)").matches, box.querySelector("input[type=range]").value]);
"""


@browser
@pytest.mark.parametrize(("options", "reached"), [((), 6), (("--force-prefers-reduced-motion",), 1)])
def test_play_is_one_picture_a_second_where_less_motion_is_wished(tmp_path, options, reached):
    frames = [torch.full((1, 1, 4, 4), k / 20) for k in range(21)]
    picture = image_slider(frames, range(21), alt="squares")
    assert drive(picture, PLAY, tmp_path, *options)[1][-1] == [bool(options), str(reached)]


@browser
@pytest.mark.parametrize("medium", ["screen", "print"])
def test_still_picture_is_printed(tmp_path, medium):
    css = (SCRIPT.parent / "book.css").read_text()
    if medium == "print":  # what holds on paper is made to hold on the screen, in its place among the rules
        assert "@media print {" in css
        css = css.replace("@media print {", "@media screen {")
    ax = new_figure()[1]
    picture = touchable("bells", {"betas": [0.1, 0.2, 0.3]}, still=ax, alt="bells", label="bells")
    shown = "told.push([...box.children].filter(part => part.clientHeight).map(part => part.tagName))"
    tags = drive(picture, shown, tmp_path, css=css)[1][-1]
    assert tags == ["IMG"] if medium == "print" else {"CANVAS", "DIV"} <= set(tags) - {"IMG"}
    if medium == "screen":
        assert "IMG" not in tags


@browser
def test_slider_and_choice_speak(tmp_path):
    frames = {"one": [torch.ones(2, 1, 4, 4)] * 3, "other": [-torch.ones(2, 1, 4, 4)] * 3}
    picture = image_slider(frames, ["t = 9", "t = 5", "t = 0"], alt="squares", name="step")
    steps = """
    const slider = box.querySelector("input[type=range]");
    slider.value = 1; slider.dispatchEvent(new Event("input")); tell();
    const other = box.querySelectorAll("input[type=radio]")[1];
    other.checked = true; other.dispatchEvent(new Event("change")); tell();
    """
    text, told = drive(picture, steps, tmp_path)
    assert told == [["t = 9. one, t = 9"], ["t = 5. one, t = 5"], ["t = 5. other, t = 5"]]
    assert 'role="group"' in text and 'aria-label="squares"' in text
    label = re.search('<label for="([^"]*)">step</label>', text)[1]
    assert re.search(rf'<input type="range" id="{label}"', text)
    assert ">Play</button>" in text


@browser
def test_finger_on_the_canvas_moves_the_nearest_value(tmp_path):
    ax = new_figure()[1]
    picture = touchable("bells", {"betas": [0.1, 0.2, 0.3]}, still=ax, alt="bells", label="bells")
    steps = """
    const canvas = box.querySelector("canvas"), place = canvas.getBoundingClientRect();
    canvas.setPointerCapture = () => {};
    const at = x => ({clientX: place.left + 14 + (place.width - 28) * (x + 5) / 10, clientY: place.top + 100, buttons: 1});
    canvas.dispatchEvent(new PointerEvent("pointerdown", at(1.5))); tell();
    canvas.dispatchEvent(new PointerEvent("pointermove", at(-2))); tell();
    const finger = x => ({...at(x), pointerType: "touch"});
    canvas.dispatchEvent(new PointerEvent("pointerdown", finger(2)));
    canvas.dispatchEvent(new PointerEvent("pointercancel", finger(2))); tell();  // the page scrolled
    canvas.dispatchEvent(new PointerEvent("pointerdown", finger(2)));
    canvas.dispatchEvent(new PointerEvent("pointerup", finger(2))); tell();  // a tap
    const heights = [...box.querySelectorAll("input[type=range]")].map(i => i.getBoundingClientRect().height);
    told.push(heights);
    """
    _, (first, second, third, scrolled, tapped, heights) = drive(picture, steps, tmp_path)
    assert scrolled == third
    assert [words.split(". ")[0] for words in tapped] == ["3 of 3", "\u22122.00", "2.00"]
    assert [words.split(". ")[0] for words in first] == ["3 of 3", "1.00", "\u22121.00"]
    assert [words.split(". ")[0] for words in second] == ["3 of 3", "1.50", "\u22121.00"]
    assert [words.split(". ")[0] for words in third] == ["3 of 3", "\u22122.00", "\u22121.00"]
    assert min(heights) >= 24


def test_guided_points_are_those_of_the_sampler(compute, plane):
    schedule = make_schedule("linear", 1000, dtype=f64)
    levels = [999, 600, 300, 100, 0]
    given = GaussianMixture(torch.ones(1, dtype=f64), plane.means[1:2], plane.covariances[1:2])
    of_all, of_given = optimal_denoiser(plane, schedule), optimal_denoiser(given, schedule)
    start = x = torch.randn(5, 2, dtype=f64)
    for t, t_prev in pairwise(levels):
        eps_hat = of_all(x, t) + 2.5 * (of_given(x, t) - of_all(x, t))
        x, _ = ddim_step(schedule, x, t, t_prev, eps_hat, clip_x_0=False)
    data = {"all": numbers(plane), "given": numbers(given)}
    alpha_bars = schedule.alpha_bars[levels].tolist()
    same(compute("guidedWalk", data, start.tolist(), alpha_bars, 2.5), x)


@browser
def test_picture_of_guidance_counts_the_points_in_the_ring(tmp_path, plane):
    schedule = make_schedule("linear", 1000, dtype=f64)
    levels = [999, 600, 300, 100, 0]
    given = GaussianMixture(torch.ones(1, dtype=f64), plane.means[1:2], plane.covariances[1:2])
    of_all, of_given = optimal_denoiser(plane, schedule), optimal_denoiser(given, schedule)
    start, scales, radius, expected = torch.randn(40, 2, dtype=f64), [0, 1, 4], 0.7, []
    for s in scales:
        x = start
        for t, t_prev in pairwise(levels):
            eps_hat = of_all(x, t) + s * (of_given(x, t) - of_all(x, t))
            x, _ = ddim_step(schedule, x, t, t_prev, eps_hat, clip_x_0=False)
        share = ((x - plane.means[0]).norm(dim=1) < radius).double().mean()
        expected.append((f"{int(100 * share + 0.5)} %", f"{x.var(0, correction=0).mean().sqrt():.2f}"))
    data = {"all": numbers(plane), "given": numbers(given), "starts": start.tolist()}
    data |= {"alpha_bars": schedule.alpha_bars[levels].tolist(), "scales": scales}
    data |= {"sentence": "a six", "radius": radius}
    data |= frame_sheet([[torch.ones(4, 1, 8, 8) * s / 4 for s in scales]], n_cols=2)
    picture = touchable("guidance", data, still=new_figure()[1], alt="digits", label="scale")
    steps = """
    const slider = box.querySelector("input[type=range]");
    for (const i of [0, 1, 2]) { slider.value = i; slider.dispatchEvent(new Event("input")); tell(); }
    """
    _, told = drive(picture, steps, tmp_path)
    for (words,), (share, spread) in zip(told[1:], expected, strict=True):
        assert f"{share} of the points" in words and f"spread is {spread}." in words


def test_attention_is_that_of_the_patches(compute):
    image = torch.randn(1, 1, 8, 8, dtype=f64)
    patches = F.unfold(image, 5, padding=2).mT
    patches = F.normalize(patches - patches.mean(2, keepdim=True), dim=2)
    weights = ((30 * patches) @ patches.mT / 5).softmax(-1)[0, 3 * 8 + 6]
    data = {"side": 8, "image": image.flatten().tolist(), "patch": 5, "sharpness": 30}
    same(compute("attention", data, {"row": 3, "column": 6}), weights)
    flat = data | {"image": [-1.0] * 64}  # every patch is constant, but for the border
    same(sum(compute("attention", flat, {"row": 4, "column": 4})), 1.0)
