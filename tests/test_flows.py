"""Flow matching and EDM: losses and samplers by hand, translations that lose nothing, the papers' formulas by numbers."""

import math

import pytest
import torch
from torch.testing import assert_close

from conftest import refuses
from ddpm_nb.bound import optimal_denoiser
from ddpm_nb.elbo import OBJECTIVES, objective_target, predict_noise, simple_loss
from ddpm_nb.flows import (
    edm_denoiser,
    edm_preconditioning,
    eps_from_velocity,
    flow_matching_loss,
    flow_times,
    karras_sigmas,
    logit_normal_times,
    sample_flow,
    sample_heun,
    straightness,
    velocity_from_eps,
)
from ddpm_nb.forward import NoiseSchedule, predict_x_0, q_sample
from ddpm_nb.gaussian import GaussianMixture, seeded
from ddpm_nb.hub import load_pretrained
from ddpm_nb.sampling import respaced_steps, sample_ddim, sample_ddpm
from ddpm_nb.schedules import cosine_betas, linear_betas

exact = {"dtype": torch.float64}
COSINE, LINEAR = (NoiseSchedule(betas(1000), **exact) for betas in (cosine_betas, linear_betas))


def gaussian(s):
    """Build N(0, s^2) on a line."""
    one = torch.ones(1, **exact)
    return GaussianMixture(one, 0 * one[:, None], s**2 * one[:, None, None])


def mixture():
    means = torch.tensor([[-2.0, 0.0], [1.0, 1.0]], **exact)
    return GaussianMixture(torch.tensor([0.3, 0.7], **exact), means, torch.eye(2, **exact).expand(2, 2, 2) * 0.1)


# the loss


def test_loss_is_that_of_the_paper_by_hand():
    """Lipman et al. 2023, equation 23 with sigma_min = 0, time reversed: || v(x_t) - (eps - x_0) ||^2."""
    x_0, eps = torch.tensor([[1.0, -1.0], [0.5, 0.0]]), torch.tensor([[3.0, 1.0], [-0.5, 2.0]])
    t, seen = torch.tensor([0.25, 0.5]), {}

    def model(x, t):
        seen.update(x=x, t=t)
        return torch.ones_like(x)

    found = flow_matching_loss(model, x_0, t=t, eps=eps, reduction="none")
    assert_close(seen["x"], torch.tensor([[1.5, -0.5], [0.0, 1.0]]))
    assert torch.equal(seen["t"], t)
    assert_close(found, torch.tensor([(1 + 1) / 2, (4 + 1) / 2]))  # targets (2, 2) and (-1, 2)
    assert_close(flow_matching_loss(model, x_0, t=t, eps=eps), found.mean())


def test_loss_agrees_with_the_convention_of_the_reference_library():
    """In facebookresearch/flow_matching X_t = t X_1 + (1 - t) X_0 with data X_1, and the target is X_1 - X_0."""
    x_0, eps = torch.randn(8, 1, 4, 4, generator=seeded(0)), torch.randn(8, 1, 4, 4, generator=seeded(1))
    t = torch.rand(8, generator=seeded(2))
    theirs_t = 1 - t.view(-1, 1, 1, 1)
    path = theirs_t * x_0 + (1 - theirs_t) * eps
    theirs = (torch.sin(path) - (x_0 - eps)).square().mean()
    assert_close(flow_matching_loss(lambda x, t: -torch.sin(x), x_0, t=t, eps=eps), theirs)


def test_loss_draws_uniform_times_and_normal_noise_and_repeats_itself():
    x_0, seen = torch.zeros(20_000, 1, **exact), []

    def model(x, t):
        seen.append((x, t))
        return x

    first = flow_matching_loss(model, x_0, generator=seeded(3))
    assert first == flow_matching_loss(model, x_0, generator=seeded(3))
    x, t = seen[0]
    assert t.dtype == x.dtype == torch.float64 and t.shape == (20_000,)
    assert t.min() >= 0 and t.max() < 1
    assert abs(t.mean() - 0.5) < 4 * math.sqrt(1 / 12 / 20_000) and abs(t.var() - 1 / 12) < 0.002
    noise = x[:, 0] / t
    assert abs(noise.mean()) < 4 / math.sqrt(20_000) and abs(noise.var() - 1) < 0.05


def test_logit_normal_times_have_the_logit_that_is_asked_for():
    t = logit_normal_times(100_000, 1.0, 0.5, generator=seeded(0))
    assert ((t > 0) & (t < 1)).all()
    assert abs(t.logit().mean() - 1) < 4 * 0.5 / math.sqrt(1e5) and abs(t.logit().std() - 0.5) < 0.005
    assert torch.equal(t, logit_normal_times(100_000, 1.0, 0.5, generator=seeded(0)))


# translations


@pytest.mark.parametrize("schedule", [COSINE, LINEAR], ids=["cosine", "linear"])
def test_times_have_the_ratio_of_noise_to_signal(schedule):
    t = flow_times(schedule)
    assert_close(t / (1 - t), 1 / schedule.snr.sqrt())
    assert (t.diff() > 0).all()


@pytest.mark.parametrize("schedule", [COSINE, LINEAR], ids=["cosine", "linear"])
def test_velocity_is_the_conditional_mean_and_translates_back(schedule):
    s = 0.6
    denoiser = optimal_denoiser(gaussian(s), schedule)
    velocity, t = velocity_from_eps(denoiser, schedule), flow_times(schedule)
    for level in (0, 1, 400, 999):
        x = torch.linspace(-3, 3, 7, **exact)[:, None]
        time = t[level]
        variance = (1 - time) ** 2 * s**2 + time**2
        assert_close(velocity(x, time), x * (time - (1 - time) * s**2) / variance, rtol=1e-7, atol=1e-9)
        back = eps_from_velocity(velocity, schedule)
        assert_close(back(x, level), denoiser(x, torch.full((7,), level)), rtol=1e-6, atol=1e-8)
    levels = torch.tensor([0, 3, 50, 400, 700, 998, 999])
    assert_close(back(x, levels), denoiser(x, levels), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("schedule", [COSINE, LINEAR])
def test_chapter_threes_velocity_is_this_one_after_the_change_of_time(schedule):
    """A field read on the arc, by index, has the same loss for each pair and the same noise as on the chord."""
    field = lambda x, t: x.sin() * 3 + t[:, None]
    times, generator = flow_times(schedule), seeded(3)
    on_arc = lambda x_t, i: field(x_t / (schedule.sqrt_alpha_bars + schedule.sqrt_one_minus_alpha_bars)[i, None], times[i])
    x_0, eps = torch.randn(2, 200, 2, generator=generator, **exact)
    level = torch.randint(1000, (200,), generator=generator)
    pairs = {"eps": eps, "reduction": "none"}
    by_index = simple_loss(on_arc, schedule, x_0, t=level, objective="velocity", **pairs)
    assert_close(by_index, flow_matching_loss(field, x_0, t=times[level], **pairs))
    as_noise, x_t = predict_noise(on_arc, schedule, "velocity"), q_sample(schedule, x_0, level, eps)
    assert_close(as_noise(x_t, level), eps_from_velocity(field, schedule)(x_t, level))
    t = times[level]
    x = (1 - t[:, None]) * x_0 + t[:, None] * eps
    assert_close(velocity_from_eps(as_noise, schedule)(x, t), field(x, t), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_best_predictor_of_any_kind_draws_the_same_and_has_the_same_bound(objective):
    """E[target | x_t] of a mixture in each currency: same noise, same samples, same bound; the loss by its own weight."""
    data, schedule = mixture(), NoiseSchedule(cosine_betas(50), **exact)
    best = optimal_denoiser(data, schedule)

    def answer(x_t, t):  # linear in (x_0, eps), so the conditional mean of the target is the target of the means
        eps_hat = best(x_t, t)
        return objective_target(schedule, objective, predict_x_0(schedule, x_t, t, eps_hat), x_t, t, eps_hat)

    wrapped = predict_noise(answer, schedule, objective)
    x_0, options = data.sample(500, generator=seeded(0)), {"clip_x_0": False}
    for sampler in (sample_ddpm, sample_ddim):
        drawn = [sampler(model, schedule, (50, 2), generator=seeded(1), **options) for model in (best, wrapped)]
        assert_close(*drawn, rtol=1e-6, atol=1e-6)
    bounds = [
        simple_loss(model, schedule, x_0, objective=name, weighting="vlb", generator=seeded(2))
        for model, name in ((best, "eps"), (answer, objective))
    ]
    assert_close(*bounds)
    t, eps = torch.randint(50, (500,), generator=seeded(3)), torch.randn(500, 2, generator=seeded(4), **exact)
    pairs = {"t": t, "eps": eps, "reduction": "none"}
    root = schedule.snr[t].sqrt()
    of_noise = {"eps": 1, "x_0": 1 / root, "v": 1 / schedule.sqrt_alpha_bars[t], "velocity": 1 + 1 / root}
    of_noise["mu"] = schedule.betas[t] / (schedule.alphas * schedule.one_minus_alpha_bars)[t].sqrt()
    expected = simple_loss(best, schedule, x_0, **pairs) * of_noise[objective] ** 2
    assert_close(simple_loss(answer, schedule, x_0, objective=objective, **pairs), expected, rtol=1e-6, atol=1e-9)


def test_networks_are_asked_at_the_nearest_level_and_at_no_other():
    asked = []

    def model(x, t):
        asked.append(t)
        return torch.zeros_like(x)

    t, x = flow_times(LINEAR), torch.ones(3, 1, **exact)
    velocity, denoise = velocity_from_eps(model, LINEAR), edm_denoiser(model, LINEAR)
    log_sigma = -LINEAR.log_snr / 2
    between = 0.51 * log_sigma[501] + 0.49 * log_sigma[500]
    velocity(x, torch.stack([t[500], t[501], between.sigmoid()]))
    denoise(x, torch.stack([between.exp(), log_sigma[0].exp() / 9, log_sigma[-1].exp() * 9]))
    velocity(x, 1.0)
    assert [answer.tolist() for answer in asked] == [[500, 501, 501], [501, 0, 999], [999] * 3]


def test_one_network_has_equal_samples_under_translation(digits):
    """Within 1e-4, with the shipped network of the digits, in both directions."""
    model, schedule = load_pretrained("digits")
    kept = respaced_steps(1000, 5)
    times = torch.cat([flow_times(schedule)[kept], torch.zeros(1)])
    x_T = torch.randn(4, 1, 8, 8, generator=seeded(0))
    to_chord = (times[0] ** 2 + (1 - times[0]) ** 2).sqrt()
    velocity = velocity_from_eps(model, schedule, clip_x_0=True)
    by_ddim = sample_ddim(model, schedule, x_T.shape, n_steps=5, x_T=x_T)
    options = {"n_steps": 5, "method": "euler", "x_T": x_T * to_chord}
    by_flow = sample_flow(velocity, x_T.shape, times=times, **options)
    assert_close(by_flow, by_ddim, rtol=0, atol=1e-4)
    x_t = q_sample(schedule, digits[:4], 300, x_T)
    t = torch.full((4,), 300)
    eps_hat = model(x_t, t)
    bar = x_t / schedule.sqrt_alpha_bars[300]
    sigma = 1 / schedule.snr[300].sqrt()
    assert_close((bar - edm_denoiser(model, schedule)(bar, sigma)) / sigma, eps_hat, rtol=0, atol=1e-4)
    # back again in double precision: a signal of 5e-5 divides the rounding of a predicted noise
    double = NoiseSchedule(schedule.exact_betas, **exact)
    back = eps_from_velocity(velocity_from_eps(model.double(), double, clip_x_0=True), double)
    again = sample_ddim(back, double, x_T.shape, n_steps=5, x_T=x_T.double())
    assert_close(again, by_ddim.double(), rtol=0, atol=1e-4)


def test_clipping_is_of_the_guess_and_off_by_default():
    model = lambda x, t: -5 * torch.ones_like(x)
    x = torch.zeros(2, 1, **exact)
    t = flow_times(COSINE)[500]
    sigma = t / (1 - t)
    assert_close(velocity_from_eps(model, COSINE, clip_x_0=True)(x, t), (x - 1) / t)
    assert_close(velocity_from_eps(model, COSINE)(x, t), -5 - x - 5 * sigma)
    assert torch.equal(edm_denoiser(model, COSINE, clip_x_0=True)(x, sigma), torch.ones_like(x))
    assert_close(edm_denoiser(model, COSINE)(x, sigma), 5 * sigma * torch.ones_like(x))


# solvers


def test_euler_and_heun_by_hand():
    model = lambda x, t: (x * t[:, None])
    x_T = torch.tensor([[2.0], [-1.0]], **exact)
    euler = sample_flow(model, (2, 1), n_steps=2, method="euler", x_T=x_T)
    assert_close(euler, x_T * 0.5 * 0.75)
    heun = 1 - 0.5 * (1 + 0.5 * 0.5) / 2  # predictor 0.5, its slope 0.5 * 0.5
    assert_close(sample_flow(model, (2, 1), n_steps=2, x_T=x_T), x_T * heun * 0.75)


def test_heun_is_of_order_two_and_counts_its_calls():
    s, calls = 0.5, []

    def model(x, t):
        calls.append(float(t[0]))
        return x * ((t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2))[:, None]

    x_T, errors = torch.ones(1, 1, **exact), {}
    for method in ("euler", "heun"):
        ends = [sample_flow(model, (1, 1), n_steps=n, method=method, x_T=x_T) for n in (50, 100)]
        errors[method] = [abs(float(x) - s) for x in ends]
    assert 1.8 < errors["euler"][0] / errors["euler"][1] < 2.2
    assert 3.4 < errors["heun"][0] / errors["heun"][1] < 4.6
    calls.clear()
    sample_flow(model, (1, 1), n_steps=3, x_T=x_T)
    assert calls == pytest.approx([1, 2 / 3, 2 / 3, 1 / 3, 1 / 3])
    calls.clear()
    sample_flow(model, (1, 1), n_steps=2, times=torch.tensor([0.9, 0.4, 0.1]), x_T=x_T)
    assert calls == pytest.approx([0.9, 0.4, 0.4, 0.1])


def test_edm_coefficients_are_those_of_the_paper_by_numbers():
    """Table 1 of Karras et al. 2022 with sigma_data = 0.5, worked out at sigma = 2."""
    skip, out, scale, noise = edm_preconditioning(torch.tensor([2.0], **exact))
    assert_close(skip, torch.tensor([0.25 / 4.25], **exact))
    assert_close(out, torch.tensor([1 / math.sqrt(4.25)], **exact))
    assert_close(scale, torch.tensor([1 / math.sqrt(4.25)], **exact))
    assert_close(noise, torch.tensor([0.17328679513998632], **exact))
    sigma = torch.logspace(-2, 2, 9, **exact)
    skip, out, *_ = edm_preconditioning(sigma, 0.3)
    other = skip * 1.01  # any other c_skip needs a larger c_out
    assert (((1 - other) ** 2 * 0.09 + other**2 * sigma**2).sqrt() > out).all()
    assert_close(((1 - skip) ** 2 * 0.09 + skip**2 * sigma**2).sqrt(), out)


def test_karras_levels_are_those_of_the_paper_by_numbers():
    """Equation 5 with the defaults and 18 steps; the second and the ninth level worked out by hand."""
    sigmas = karras_sigmas(18)
    assert sigmas.shape == (19,) and sigmas[0] == pytest.approx(80) and sigmas[17] == pytest.approx(0.002) and sigmas[18] == 0
    top, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
    assert float(sigmas[1]) == pytest.approx((top + (low - top) / 17) ** 7)
    assert float(sigmas[1]) == pytest.approx(57.586, abs=1e-3)
    assert float(sigmas[8]) == pytest.approx((top + 8 * (low - top) / 17) ** 7)
    assert_close(karras_sigmas(5, sigma_min=2, sigma_max=10, rho=1)[:-1], torch.tensor([10.0, 8, 6, 4, 2], **exact))
    assert_close(karras_sigmas(3, sigma_min=4, sigma_max=16, rho=2)[:-1], torch.tensor([16.0, 9, 4], **exact))
    assert karras_sigmas(1).tolist() == pytest.approx([80, 0])


def test_edm_sampler_is_algorithm_one_by_hand():
    """Algorithm 1 of Karras et al. with D(x, sigma) = x / (1 + sigma^2): the best for data N(0, 1)."""
    D = lambda x, sigma: x / (1 + sigma[:, None] ** 2)
    x = torch.tensor([[0.7]], **exact)
    sigmas = torch.tensor([3.0, 1.0, 0.0], **exact)
    by_hand = 3 * x
    d = (by_hand - by_hand / 10) / 3
    euler = by_hand - 2 * d
    d_2 = (euler - euler / 2) / 1
    by_hand = by_hand - 2 * (d + d_2) / 2
    by_hand = by_hand - (by_hand - by_hand / 2)  # the last step is Euler's
    assert_close(sample_heun(D, (1, 1), n_steps=2, sigmas=sigmas, x_T=x), by_hand)
    exact_end = 80 * x / math.sqrt(1 + 80**2)  # the flow of N(0, 1): x / sqrt(1 + sigma^2) is constant
    errors = [abs(float(sample_heun(D, (1, 1), n_steps=n, x_T=x) - exact_end)) for n in (40, 80)]
    assert errors[1] < errors[0] / 3.4 and errors[1] < 2e-3


def test_both_samplers_return_the_data():
    data = mixture()
    fine = NoiseSchedule(cosine_betas(5000), **exact)
    denoiser = optimal_denoiser(data, fine)
    x_T = torch.randn(4000, 2, generator=seeded(0), **exact)
    by_flow = sample_flow(velocity_from_eps(denoiser, fine), (4000, 2), n_steps=60, x_T=x_T)
    by_edm = sample_heun(edm_denoiser(denoiser, fine), (4000, 2), n_steps=40, x_T=x_T)
    for x in (by_flow, by_edm):
        assert abs((x[:, 0] < -0.5).double().mean() - 0.3) < 4 * math.sqrt(0.21 / 4000)
        right = x[x[:, 0] > -0.5]
        assert_close(right.mean(0), torch.ones(2, **exact), rtol=0, atol=0.03)
        assert_close(right.var(0), torch.full((2,), 0.1, **exact), rtol=0.1, atol=0)
    assert (by_flow - by_edm).norm(dim=1).median() < 0.01


def test_noise_comes_from_the_generator_and_x_T_is_left_alone():
    model, D = lambda x, t: torch.tanh(x), lambda x, sigma: torch.tanh(x)
    for sampler, predict in ((sample_flow, model), (sample_heun, D)):
        x_T = torch.randn(3, 2, generator=seeded(4))
        kept = x_T.clone()
        drawn = sampler(predict, (3, 2), n_steps=3, generator=seeded(4))
        assert torch.equal(drawn, sampler(predict, (3, 2), n_steps=3, x_T=x_T)) and torch.equal(x_T, kept)
    weight = torch.ones(1, requires_grad=True)
    assert not sample_flow(lambda x, t: weight * x, (1, 1), n_steps=2).requires_grad


def test_straightness_is_zero_for_straight_paths_and_by_hand_for_a_bend():
    x_T = torch.randn(50, 1, 2, 2, generator=seeded(0), **exact)
    assert straightness(lambda x, t: torch.ones_like(x), x_T) < 1e-20
    # speeds 1, then 3 in each of four values: their mean 2 is missed by 1
    bend = lambda x, t: torch.where(t.view(-1, 1, 1, 1) > 0.5, 1.0, 3.0).to(x).expand_as(x)
    assert straightness(bend, x_T, n_steps=2) == pytest.approx(4)


def test_times_of_another_type_do_not_change_that_of_the_images():
    seen, x = [], torch.zeros(2, 3)
    model = lambda x_t, t: seen.append((x_t.dtype, t.dtype)) or x_t
    losses = [flow_matching_loss(model, x, t=torch.tensor([0.25, 0.5], dtype=dtype), generator=seeded(0)) for dtype in (torch.float64, torch.float32)]
    assert seen == [(torch.float32, torch.float32)] * 2 and losses[0] == losses[1]


@pytest.mark.parametrize(
    "call",
    [
        lambda model, x: velocity_from_eps(model, COSINE)(x, 1.0),
        lambda model, x: eps_from_velocity(model, COSINE)(x, 3),
        lambda model, x: sample_flow(model, (4, 1), n_steps=2, x_T=x),
        lambda model, x: straightness(model, x, n_steps=2),
        lambda model, x: edm_denoiser(model, COSINE)(x, 1.0),
        lambda model, x: sample_heun(model, (4, 1), n_steps=2, x_T=x),
    ],
)
def test_output_of_another_shape_is_refused_and_not_broadcast(call):
    for model in (lambda x, t: x[:, 0], lambda x, t: torch.cat([x, x], 1)):
        words = "the model's output must have the shape of its input, (4, 1); got"
        refuses(lambda model=model: call(model, torch.ones(4, 1, **exact)), words)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n_steps", [1000, 4000])
def test_the_flow_begins_at_the_signal_of_the_last_level(dtype, n_steps):
    """At t = 1 the signal is a thousandth or less: 1 - t has few digits in single precision, and none in 16 bits."""
    betas, x = cosine_betas(n_steps), torch.ones(2, 1)
    zero = lambda x, t: torch.zeros_like(x)
    found = velocity_from_eps(zero, NoiseSchedule(betas, dtype=dtype))(x, 1.0)
    wanted = velocity_from_eps(zero, NoiseSchedule(betas, **exact))(x.double(), 1.0)
    assert_close(found.double(), wanted, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=0)


def test_bad_arguments_are_refused_before_the_model_is_asked():
    x, t = torch.zeros(2, 3), torch.tensor([0.1, 0.9])
    velocity, denoise = velocity_from_eps(abs, COSINE), edm_denoiser(abs, COSINE)
    for call, words, error in [
        (lambda: flow_matching_loss(abs, x[:0]), ("x_0", "at least one"), ValueError),
        (lambda: flow_matching_loss(abs, x.long()), ("x_0", "floating"), TypeError),
        (lambda: flow_matching_loss(abs, x, t=t[:1]), ("t must have shape (2,)",), ValueError),
        (lambda: flow_matching_loss(abs, x, t=t + 0.2), ("t must", "[0, 1]"), ValueError),
        (lambda: flow_matching_loss(abs, x, t=t - 0.2), ("t must", "[0, 1]"), ValueError),
        (lambda: flow_matching_loss(abs, x, t=torch.tensor([3, 4])), ("t must", "floating"), TypeError),
        (lambda: flow_matching_loss(abs, x, eps=x[:1]), ("eps", "(2, 3)", "(1, 3)"), ValueError),
        (lambda: flow_matching_loss(abs, x, reduction="sum"), ("reduction", "'none'"), ValueError),
        (lambda: flow_matching_loss(abs, x, generator=3), ("generator",), TypeError),
        (lambda: flow_matching_loss(lambda x, t: x[:, :1], x), ("the model's output", "(2, 3)"), ValueError),
        (lambda: logit_normal_times(0), ("n must be at least 1",), ValueError),
        (lambda: logit_normal_times(4, std=0), ("std", "(0"), ValueError),
        (lambda: logit_normal_times(4, math.nan), ("mean", "finite"), ValueError),
        (lambda: velocity(x, 0.0), ("t must", "(0, 1]"), ValueError),
        (lambda: velocity(x, 1.1), ("t must", "(0, 1]"), ValueError),
        (lambda: velocity(x, torch.ones(3)), ("t must", "(2,)"), ValueError),
        (lambda: eps_from_velocity(abs, COSINE)(x, -1), ("t must be in 0..999; got -1",), ValueError),
        (lambda: eps_from_velocity(abs, COSINE)(x, torch.tensor([3])), ("t must have shape (2,)",), ValueError),
        (lambda: denoise(x, -1.0), ("sigma must", "(0, inf)"), ValueError),
        (lambda: denoise(x, math.nan), ("sigma must", "(0, inf)"), ValueError),
        (lambda: edm_preconditioning(torch.zeros(2)), ("sigma must be above 0",), ValueError),
        (lambda: edm_preconditioning(torch.ones(2), 0), ("sigma_data", "(0"), ValueError),
        (lambda: karras_sigmas(0), ("n_steps", "at least 1"), ValueError),
        (lambda: karras_sigmas(4, sigma_min=90), ("sigma_max", "(90"), ValueError),
        (lambda: karras_sigmas(4, rho=0.5), ("rho", "[1"), ValueError),
        (lambda: sample_flow(abs, (2, 3), n_steps=0), ("n_steps", "at least 1"), ValueError),
        (lambda: sample_flow(abs, (2, 3), n_steps=2, method="rk4"), ("method", "'heun', 'euler'"), ValueError),
        (lambda: sample_flow(abs, (2, 3), n_steps=2, times=torch.tensor([1.0, 0.0])), ("times", "3 falling"), ValueError),
        (lambda: sample_flow(abs, (2, 3), n_steps=1, times=torch.tensor([0.2, 0.4])), ("times", "falling"), ValueError),
        (lambda: sample_flow(abs, (2, 3), n_steps=1, times=torch.tensor([0.4, 0.4])), ("times", "falling"), ValueError),
        (lambda: sample_flow(abs, (2, 3), n_steps=1, times=torch.tensor([1.5, 0.4])), ("times", "at most 1"), ValueError),
        (lambda: sample_flow(abs, (2, 3), n_steps=1, times=torch.tensor([0.5, -0.4])), ("times", "at least 0"), ValueError),
        (lambda: sample_flow(abs, 7, n_steps=1), ("shape",), TypeError),
        (lambda: sample_flow(abs, (2, 0), n_steps=1), ("shape", "at least 1"), ValueError),
        (lambda: sample_flow(abs, (2, 3), n_steps=1, x_T=x[:1]), ("x_T", "(2, 3)", "(1, 3)"), ValueError),
        (lambda: sample_flow(abs, (2, 3), n_steps=1, generator=1), ("generator",), TypeError),
        (lambda: sample_heun(abs, (2, 3), n_steps=0), ("n_steps", "at least 1"), ValueError),
        (lambda: sample_heun(abs, (2, 3), n_steps=2, sigmas=torch.tensor([3.0, 0.0])), ("sigmas", "3 falling"), ValueError),
        (lambda: sample_heun(abs, (2, 3), n_steps=1, x_T=x.long()), ("x_T", "floating"), TypeError),
        (lambda: straightness(abs, x.long()), ("x_T", "floating"), TypeError),
        (lambda: straightness(abs, x, n_steps=0), ("n_steps", "at least 1"), ValueError),
    ]:
        refuses(call, *words, error=error)
