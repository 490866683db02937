"""Scores: Langevin and SDE steps with known results, the flow and its likelihood against closed forms, refusals."""

import math

import pytest
import torch
from torch.testing import assert_close

import ddpm_nb
from conftest import refuses
from ddpm_nb.bound import optimal_denoiser
from ddpm_nb.elbo import diffuse_mixture
from ddpm_nb.forward import NoiseSchedule, q_sample
from ddpm_nb.gaussian import GaussianMixture, seeded
from ddpm_nb.hub import load_pretrained
from ddpm_nb.sampling import ddpm_step
from ddpm_nb.schedules import betas_from_alpha_bars, cosine_betas, linear_betas
from ddpm_nb.scores import flow_log_likelihood, flow_velocity, langevin, sample_sde, score

exact = {"dtype": torch.float64}
LINEAR = NoiseSchedule(linear_betas(1000), **exact)


def even_schedule(n_steps, first=10, last=-20):
    curve = torch.sigmoid(torch.linspace(first, last, n_steps, **exact))
    return NoiseSchedule(betas_from_alpha_bars(torch.cat([torch.ones(1, **exact), curve])), **exact)


def mixture(d=2, k=3, seed=0):
    generator = seeded(seed)
    roots = 0.3 * torch.randn(k, d, d, generator=generator, **exact)
    covariances = roots @ roots.mT + 0.05 * torch.eye(d, **exact)
    weights = torch.rand(k, generator=generator, **exact) + 0.2
    return GaussianMixture(weights / weights.sum(), torch.randn(k, d, generator=generator, **exact), covariances)


def gaussian(variance):
    return GaussianMixture(torch.ones(1, **exact), torch.zeros(1, 1, **exact), torch.full((1, 1, 1), variance, **exact))


def test_score_takes_an_index_and_a_batch_of_indices_and_images():
    assert ddpm_nb.sample_sde is sample_sde and ddpm_nb.score is score
    t = torch.tensor([0, 500, 999])
    x = torch.randn(3, 1, 2, 2, generator=seeded(0), **exact)
    model = lambda x_t, t: x_t * (t.view(-1, 1, 1, 1) + 1)
    s = score(model, LINEAR, x, t)
    for i in range(3):
        expected = -x[i] * (int(t[i]) + 1) / (1 - LINEAR.alpha_bars[t[i]]).sqrt()
        assert_close(s[i], expected)
        assert_close(score(model, LINEAR, x, int(t[i]))[i], expected)
        rest = 1 - LINEAR.alpha_bars[t[i]]
        assert_close(flow_velocity(model, LINEAR, x, t)[i], rest * (x[i] + expected))


def test_velocity_is_the_derivative_of_ddim_in_half_the_log_snr():
    """A step of DDIM between two close levels moves like the velocity."""
    close = even_schedule(40_001, 1, 0)
    data = mixture()
    denoiser = optimal_denoiser(data, close)
    x = torch.randn(6, 2, generator=seeded(1), **exact)
    eps_hat = denoiser(x, 20_000)
    here, after = 20_000, 20_001
    x_0_hat = (x - close.sqrt_one_minus_alpha_bars[here] * eps_hat) / close.sqrt_alpha_bars[here]
    moved = close.sqrt_alpha_bars[after] * x_0_hat + close.sqrt_one_minus_alpha_bars[after] * eps_hat
    slope = (moved - x) / (0.5 * (close.log_snr[after] - close.log_snr[here]))
    assert_close(slope, flow_velocity(denoiser, close, x, here), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("t", "step"), [(0, 0.3), (400, 0.1), (999, 0.5)])
def test_langevin_settles_at_the_known_variance_of_every_level(t, step):
    """The length of a step is a share of the level's own variance; a wrong unit fails at one of the levels."""
    variance = 1e-4
    data = gaussian(variance)
    v = float(LINEAR.alpha_bars[t] * variance + 1 - LINEAR.alpha_bars[t])
    h = step * float(1 - LINEAR.alpha_bars[t])
    x = langevin(optimal_denoiser(data, LINEAR), LINEAR, torch.zeros(40_000, 1, **exact), t, n_steps=60, step=step, generator=seeded(0))
    settled = v / (1 - h / (2 * v))
    assert abs(float(x.var()) / settled - 1) < 4 * math.sqrt(2 / 40_000)


def test_one_step_of_the_reverse_sde_is_ddpm_up_to_the_square_of_beta():
    ratios = []
    for factor in (1, 0.1, 0.01):
        chain = NoiseSchedule([0.3, 0.3 * factor], **exact)
        x = torch.ones(1, 1, **exact)
        eps_hat = torch.full_like(x, 0.7)
        theirs, _ = ddpm_step(chain, x, 1, eps_hat, variance="beta", clip_x_0=False, generator=seeded(0))
        z = torch.randn(1, 1, generator=seeded(0), **exact)
        beta = chain.betas[1]
        ours = x + beta / 2 * x - beta * eps_hat / chain.sqrt_one_minus_alpha_bars[1] + beta.sqrt() * z
        ratios.append(float((ours - theirs).abs() / beta**2))
    assert max(ratios) < 2 * min(ratios)


@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0, 1.5])
def test_every_member_of_the_family_returns_the_variance_of_normal_data(gamma):
    data = gaussian(0.25)
    x = sample_sde(optimal_denoiser(data, LINEAR), LINEAR, (20_000, 1), noise=gamma, generator=seeded(0))
    assert abs(float(x.var()) / 0.25 - 1) < 5 * math.sqrt(2 / 20_000)


def test_the_last_step_of_the_sde_adds_no_noise():
    x_T, chain = torch.ones(2, 3, **exact), NoiseSchedule([0.3], **exact)
    first, second = (sample_sde(tilted, chain, (2, 3), x_T=x_T, generator=seeded(i)) for i in range(2))
    assert torch.equal(first, second)


def test_a_clean_image_is_carried_to_a_first_level_of_much_noise():
    """Where no noise is predicted the flow only shrinks the image, by a known factor."""
    chain, x_0 = even_schedule(400, 0, -1), torch.full((1, 2), 1.5, **exact)
    found = flow_log_likelihood(lambda x, t: 0 * x, chain, x_0, n_steps=399)
    left = chain.alpha_bars[-1]
    assert_close(found[0], left.log() - 0.5 * left * x_0.square().sum() - math.log(2 * math.pi), rtol=0, atol=1e-3)


def test_sde_uses_the_given_noise_and_repeats_itself():
    short = NoiseSchedule(linear_betas(10), **exact)
    model = lambda x_t, t: torch.tanh(x_t)
    x_T = torch.randn(3, 2, generator=seeded(0), **exact)
    first = sample_sde(model, short, (3, 2), x_T=x_T, generator=seeded(1))
    assert torch.equal(first, sample_sde(model, short, (3, 2), x_T=x_T, generator=seeded(1)))
    generator = seeded(0)
    drawn = torch.randn(3, 2, generator=generator, **exact)
    assert torch.equal(sample_sde(model, short, (3, 2), noise=0, generator=seeded(0)), sample_sde(model, short, (3, 2), x_T=drawn, noise=0))


@pytest.mark.parametrize("d", [1, 2, 5])
def test_likelihood_is_that_of_the_mixture(d):
    """The issue's promise: within 1e-3 nats of the closed form, at the clean image and on the way."""
    data, chain = mixture(d, seed=d), even_schedule(1000)
    denoiser = optimal_denoiser(data, chain)
    x_0 = data.sample(20, generator=seeded(0))
    assert_close(flow_log_likelihood(denoiser, chain, x_0, n_steps=999), data.log_prob(x_0), rtol=0, atol=1e-3)
    for t in (200, 600, 998):
        x_t = q_sample(chain, x_0, t, generator=seeded(1))
        found = flow_log_likelihood(denoiser, chain, x_t, n_steps=999 - t, t=t)
        assert_close(found, diffuse_mixture(data, chain, t).log_prob(x_t), rtol=0, atol=1e-3)


def test_likelihood_is_of_second_order_in_the_number_of_steps():
    data, chain = mixture(seed=7), even_schedule(961)
    denoiser, x_0 = optimal_denoiser(data, chain), data.sample(200, generator=seeded(0))
    best = flow_log_likelihood(denoiser, chain, x_0, n_steps=960)
    errors = [float((flow_log_likelihood(denoiser, chain, x_0, n_steps=n) - best).abs().median()) for n in (60, 120, 240)]
    assert 3 < errors[0] / errors[1] < 6 and 3 < errors[1] / errors[2] < 6


def test_images_and_flat_points_have_one_likelihood():
    data, chain = mixture(4), even_schedule(60)
    denoiser, x_0 = optimal_denoiser(data, chain), data.sample(3, generator=seeded(0))
    flat = flow_log_likelihood(denoiser, chain, x_0, n_steps=59)
    assert_close(flow_log_likelihood(denoiser, chain, x_0.view(3, 1, 2, 2), n_steps=59), flat)
    assert flat.dtype == torch.float64 and flat.shape == (3,)


def test_likelihood_uses_any_levels_of_a_schedule():
    data, chain = mixture(), NoiseSchedule(cosine_betas(1000), **exact)
    denoiser, x_0 = optimal_denoiser(data, chain), data.sample(50, generator=seeded(0))
    for n_steps, bound in ((999, 4e-3), (150, 0.02)):
        error = flow_log_likelihood(denoiser, chain, x_0, n_steps=n_steps) - data.log_prob(x_0)
        assert error.abs().max() < bound


def test_probes_are_unbiased_and_enough_of_them_are_the_trace():
    data, chain = mixture(3), even_schedule(40)
    denoiser, x_0 = optimal_denoiser(data, chain), data.sample(4, generator=seeded(0))
    traced = flow_log_likelihood(denoiser, chain, x_0, n_steps=39)
    one = flow_log_likelihood(denoiser, chain, x_0.repeat(500, 1), n_steps=39, n_probes=1, generator=seeded(1)).view(500, 4)
    error = one.std(0) / math.sqrt(500)
    assert error.min() > 0
    assert ((one.mean(0) - traced).abs() < 4.5 * error + 1e-9).all()
    several = flow_log_likelihood(denoiser, chain, x_0.repeat(500, 1), n_steps=39, n_probes=8, generator=seeded(1)).view(500, 4)
    assert (several.std(0) < 0.5 * one.std(0)).all()
    again = flow_log_likelihood(denoiser, chain, x_0, n_steps=39, n_probes=2, generator=seeded(3))
    assert torch.equal(again, flow_log_likelihood(denoiser, chain, x_0, n_steps=39, n_probes=2, generator=seeded(3)))


def test_probes_are_unbiased_where_coordinates_pull_at_each_other():
    """A Jacobian whose entries lie off the diagonal: signs that are not even would show."""
    chain, swap = even_schedule(4), lambda x_t, t: 0.5 * x_t.flip(1)
    x_0 = torch.ones(4000, 2, **exact)
    traced = flow_log_likelihood(swap, chain, x_0[:1], n_steps=3)
    probed = flow_log_likelihood(swap, chain, x_0, n_steps=3, n_probes=1, generator=seeded(0))
    assert abs(float(probed.mean() - traced)) < 4.5 * float(probed.std()) / math.sqrt(4000)
    assert probed.std() > 0.5


def test_probes_agree_with_the_trace_for_the_shipped_network(digits):
    model, schedule = load_pretrained("digits")
    for p in model.parameters():
        p.requires_grad_(False)
    x = digits[:2]
    with torch.inference_mode(False):
        traced = flow_log_likelihood(model, schedule, x, n_steps=3, t=300)
        probed = flow_log_likelihood(model, schedule, x.repeat(30, 1, 1, 1), n_steps=3, t=300, n_probes=2, generator=seeded(0))
    probed = probed.view(30, 2)
    assert ((probed.mean(0) - traced).abs() < 4.5 * probed.std(0) / math.sqrt(30)).all()


def test_likelihood_leaves_its_input_alone():
    data, chain = mixture(), even_schedule(20)
    x_0 = data.sample(3, generator=seeded(0))
    kept = x_0.clone()
    with torch.no_grad():
        found = flow_log_likelihood(optimal_denoiser(data, chain), chain, x_0, n_steps=19)
    assert torch.equal(x_0, kept) and not x_0.requires_grad and not found.requires_grad


@pytest.mark.parametrize("n_probes", [None, 2])
def test_likelihood_works_where_no_gradient_is_recorded(n_probes):
    """In `inference_mode`, and of images that were made in it."""
    chain, x = even_schedule(5), torch.randn(3, 2, generator=seeded(0), **exact)
    likelihood = lambda x: flow_log_likelihood(tilted, chain, x, n_steps=4, n_probes=n_probes, generator=seeded(1))
    wanted = likelihood(x)
    with torch.inference_mode():
        made = x + 0
        assert torch.equal(likelihood(x), wanted)
    assert torch.equal(likelihood(made), wanted)


def test_the_sde_records_no_graph():
    assert not sample_sde(tilted, SHORT, (2, 3), x_T=torch.ones(2, 3, **exact).requires_grad_()).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n_steps", "t"), [(5, None), (40, None), (999, None), (30, 400)])
def test_likelihood_visits_the_nearest_levels_of_the_exact_schedule(dtype, n_steps, t):
    """Whatever the type of the buffers: in 16 bits neighbouring levels are equal."""
    asked, x = [], torch.zeros(1, 2, dtype=torch.float32)
    chain = NoiseSchedule(linear_betas(1000), dtype=dtype)
    flow_log_likelihood(lambda x, t: (asked.append(int(t[0])), x)[1], chain, x, n_steps=n_steps, t=t, n_probes=1)
    clock, first = LINEAR.log_snr, t or 0
    wanted = torch.linspace(float(clock[first]), float(clock[-1]), n_steps + 1, **exact)
    nearest = (clock[first:] - wanted[:, None]).abs().argmin(1).unique() + first
    assert sorted(set(asked)) == nearest.tolist()


@pytest.mark.parametrize(
    "call",
    [
        lambda model: score(model, SHORT, torch.ones(4, 1), 2),
        lambda model: sample_sde(model, SHORT, (4, 1)),
        lambda model: langevin(model, SHORT, torch.ones(4, 1), 2, n_steps=1),
    ],
)
def test_output_of_another_shape_is_refused_and_not_broadcast(call):
    for model in (lambda x, t: x[:, 0], lambda x, t: torch.cat([x, x], 1)):
        refuses(lambda model=model: call(model), "the model's output must have the shape of its input, (4, 1); got")


def test_bad_arguments_are_refused_before_the_model_is_asked():
    x = torch.zeros(2, 3)
    short = NoiseSchedule([0.1, 0.2, 0.3])
    for call, words, error in [
        (lambda: score(abs, short, x, 3), ("t must be in 0..2",), ValueError),
        (lambda: score(abs, short, x.long(), 1), ("x_t", "floating"), TypeError),
        (lambda: flow_velocity(abs, short, x, 5), ("t must be in 0..2",), ValueError),
        (lambda: langevin(abs, short, x, 1, n_steps=0), ("n_steps", "at least 1"), ValueError),
        (lambda: langevin(abs, short, x, 7, n_steps=1), ("t must be in 0..2",), ValueError),
        (lambda: langevin(abs, short, x, 1, n_steps=1, step=0), ("step", "(0"), ValueError),
        (lambda: langevin(abs, short, x, 1, n_steps=1, generator=3), ("generator",), TypeError),
        (lambda: sample_sde(abs, short, (2, 3), noise=-1), ("noise", "[0"), ValueError),
        (lambda: sample_sde(abs, short, (2, 0)), ("shape", "at least 1"), ValueError),
        (lambda: sample_sde(abs, short, (2, 3), x_T=x[:1]), ("x_T", "(2, 3)", "(1, 3)"), ValueError),
        (lambda: sample_sde(abs, short, (2, 3), generator=1), ("generator",), TypeError),
        (lambda: flow_log_likelihood(abs, short, x, n_steps=3), ("n_steps must be in 1..2",), ValueError),
        (lambda: flow_log_likelihood(abs, short, x, n_steps=2, t=1), ("n_steps must be in 1..1",), ValueError),
        (lambda: flow_log_likelihood(abs, short, x, n_steps=1, t=2), ("t must be in 0..1",), ValueError),
        (lambda: flow_log_likelihood(abs, short, x, n_steps=1, n_probes=0), ("n_probes", "at least 1"), ValueError),
        (lambda: flow_log_likelihood(abs, short, x[:0], n_steps=1), ("at least one image",), ValueError),
        (lambda: flow_log_likelihood(abs, short, x.long(), n_steps=1), ("x_0", "floating"), TypeError),
        (lambda: flow_log_likelihood(abs, short, x, n_steps=1, generator=5), ("generator",), TypeError),
    ]:
        refuses(call, *words, error=error)


BY_IMAGE = {
    "langevin": lambda x, own: langevin(tilted, LINEAR, x, 300, n_steps=3, generator=own),
    "sample_sde": lambda x, own: sample_sde(tilted, SHORT, tuple(x.shape), generator=own),
    "sample_sde from x_T": lambda x, own: sample_sde(tilted, SHORT, tuple(x.shape), x_T=x, noise=0.5, generator=own),
    "likelihood": lambda x, own: flow_log_likelihood(tilted, LINEAR, x, n_steps=5, n_probes=3, generator=own),
}
SHORT = NoiseSchedule(linear_betas(6), **exact)


def tilted(x, t):
    return 0.9 * x + 0.1 * x.square() * x.flip(-1)  # the same rounding in every batch


@pytest.mark.parametrize("name", BY_IMAGE)
def test_with_a_generator_for_each_image_no_batch_changes_a_result(name):
    x = torch.linspace(-1, 1, 12, **exact).view(3, 1, 2, 2)
    own = lambda: [seeded(i) for i in range(3)]
    together = BY_IMAGE[name](x, own())
    apart = [BY_IMAGE[name](x[i : i + 1], own()[i : i + 1]) for i in range(3)]
    assert torch.equal(torch.cat(apart), together)
    assert torch.equal(BY_IMAGE[name](x[:1], seeded(0)), together[:1])
    assert not torch.equal(BY_IMAGE[name](x, own()[::-1]), together)
    for wrong in (own()[:2], [*own(), seeded(3)], [0, 1, 2]):
        refuses(lambda wrong=wrong: BY_IMAGE[name](x, wrong), "generator must be one, or a list of 3, one an image; got", error=TypeError)
