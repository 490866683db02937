"""Samplers: equal to the reference, right on exact data, quiet about global state, and clear about bad input."""

import gc
import math
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from conftest import refuses
from ddpm_nb.bound import optimal_denoiser
from ddpm_nb.forward import predict_x_0, q_posterior
from ddpm_nb.gaussian import GaussianMixture, randn, seeded
from ddpm_nb.sampling import (
    ddim_invert,
    ddim_step,
    ddpm_step,
    inpaint,
    p_sample,
    respace,
    respaced_steps,
    sample_ddim,
    sample_ddpm,
    sample_dpm_solver,
    slerp,
    walk,
)
from ddpm_nb.schedules import make_schedule

SHAPE = (3, 1, 4, 4)
NAMES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def network(x, t):
    """Stand in for a network: smooth, different at every step, and no steeper than a trained one."""
    return 0.8 * x + 0.1 * torch.sin(2 * x + 0.01 * t.reshape(-1, 1, 1, 1))


def noise(seed):
    return torch.randn(SHAPE, generator=seeded(seed))


def in_double(scheduler):
    """Recompute the reference's coefficients from its own betas in float64.

    Its float32 running product loses up to 3e-4 of a cosine trajectory of 1,000 steps; with float64 the walks agree to 1e-4.
    """
    scheduler.alphas = 1 - scheduler.betas.double()
    scheduler.betas, scheduler.alphas_cumprod = scheduler.betas.double(), scheduler.alphas.cumprod(0)
    return scheduler


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("n_steps", [10, 100, 1000])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(("variance", "theirs"), [("posterior", "fixed_small"), ("beta", "fixed_large")])
def test_ddpm_walks_as_diffusers_does(name, n_steps, clip, variance, theirs):
    schedule = make_schedule(name, n_steps)
    reference = in_double(DDPMScheduler(n_steps, beta_schedule=NAMES[name], variance_type=theirs, clip_sample=clip))
    mine = sample_ddpm(network, schedule, SHAPE, x_T=noise(0), variance=variance, clip_x_0=clip, generator=seeded(1))
    g, x = seeded(1), noise(0)
    for t in range(n_steps - 1, -1, -1):
        x = reference.step(network(x, torch.full((3,), t)), t, x, generator=g).prev_sample.float()
    torch.testing.assert_close(mine, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("n_kept", [1000, 50, 7])
def test_ddim_steps_as_diffusers_does(name, eta, n_kept):
    """Compare step by step over our own kept indices; the reference looks up t minus a stride, so it gets even strides only."""
    schedule = make_schedule(name, 1000)
    reference = DDIMScheduler(1000, beta_schedule=NAMES[name], clip_sample=True, set_alpha_to_one=True)
    kept = respaced_steps(1000, n_kept)
    x = noise(2)
    for i, (t, t_prev) in enumerate(zip(kept, [*kept[1:], -1], strict=True)):
        if i % max(1, n_kept // 20):
            continue
        reference.num_inference_steps, reference.config.num_train_timesteps = 1, t - t_prev  # what step() subtracts from t
        eps_hat = network(x, torch.full((3,), t))
        fresh = seeded(i)
        theirs = reference.step(eps_hat, t, x, eta=eta, use_clipped_model_output=True, generator=fresh).prev_sample
        mine, _ = ddim_step(schedule, x, t, t_prev, eps_hat, eta=eta, generator=seeded(i))
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
        x = mine


@pytest.mark.parametrize("n_steps", [2, 3, 10, 37, 1000])
def test_respaced_steps_are_distinct_and_keep_both_ends(n_steps):
    for n_kept in {1, 2, n_steps // 2 or 1, n_steps - 1, n_steps}:
        kept = respaced_steps(n_steps, n_kept)
        assert len(set(kept)) == n_kept and kept[0] == n_steps - 1 and (n_kept == 1 or kept[-1] == 0)


def test_the_last_step_adds_no_noise():
    """A sampler that adds sigma z at the last step, as widely copied code does, depends on the seed there; ours does not."""
    schedule, x = make_schedule("linear", 10), noise(0)
    same = [p_sample(network, schedule, x, 0, variance="beta", generator=seeded(s))[0] for s in (1, 2)]
    assert same[0].equal(same[1])
    moving = [p_sample(network, schedule, x, 1, variance="beta", generator=seeded(s))[0] for s in (1, 2)]
    assert not moving[0].equal(moving[1])


def test_clipping_recomputes_the_noise():
    """After clipping, x_prev must be the mix of the clipped image and the noise that leads from it to x_t."""
    schedule, x = make_schedule("linear", 1000), 3 * noise(0)
    out, x_0_hat = ddim_step(schedule, x, 900, 450, torch.zeros(SHAPE))
    assert x_0_hat.abs().max() == 1  # the guess was outside and was clipped
    a, b = schedule.alpha_bars[900], schedule.alpha_bars[450]
    eps = (x - a.sqrt() * x_0_hat) / (1 - a).sqrt()
    torch.testing.assert_close(out, b.sqrt() * x_0_hat + (1 - b).sqrt() * eps, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out, b.sqrt() * x_0_hat)  # the stale noise, zero here, would give this


@pytest.mark.parametrize("sampler", [sample_ddpm, sample_ddim])
def test_samplers_draw_from_their_generator_only(sampler):
    schedule = make_schedule("cosine", 60)
    before = torch.get_rng_state()
    first, second = (sampler(network, schedule, SHAPE, generator=seeded(3)) for _ in range(2))
    assert first.equal(second) and torch.get_rng_state().equal(before)
    assert first.requires_grad is False and (first * torch.ones(1, requires_grad=True)).sum().backward() is None


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_noise_is_one_draw_a_step_in_the_order_of_the_contract(variance):
    """One torch.randn(shape) before the walk, one a step from t = T-1 down to 1, none at t = 0."""
    schedule, g = make_schedule("linear", 5), seeded(4)
    own = seeded(4)
    mine = sample_ddpm(network, schedule, SHAPE, variance=variance, generator=own)
    variances = schedule.posterior_variance if variance == "posterior" else schedule.betas
    x = torch.randn(SHAPE, generator=g)
    for t in range(4, -1, -1):
        x_0_hat = predict_x_0(schedule, x, t, network(x, torch.full((3,), t))).clamp(-1, 1)
        x = q_posterior(schedule, x_0_hat, x, t)[0]
        if t:
            x = x + variances[t].sqrt() * torch.randn(SHAPE, generator=g)
    torch.testing.assert_close(mine, x, rtol=1e-4, atol=1e-5)
    assert own.get_state().equal(g.get_state())


# (sum, sum of squares) of what the samplers of the first edition drew with these seeds, in float64
STORED = {
    "ddpm": [
        ({"n_steps": 20}, -2.2277693938484977, 12.645694510198975),
        ({"n_steps": 7, "variance": "beta", "spacing": "trailing"}, 8.945487226572736, 19.743549441329765),
        ({"n_steps": 20, "clip_x_0": False}, -0.7291522942331736, 15.4672302206218),
        ({"n_steps": 1}, 8.009252692726536, 47.981580226869625),
        ({}, 1.7232594503375198, 10.327771540663234),
    ],
    "ddim": [
        ({}, -4.928831996808835, 25.951636128417608),
        ({"n_steps": 7, "eta": 1.0}, -8.915121241223233, 13.644617481074594),
        ({"n_steps": 20, "eta": 0.5, "spacing": "trailing"}, -7.20520511016036, 17.081068529274262),
        ({"n_steps": 20, "clip_x_0": False}, -10.304839764437688, 167.21227811840797),
    ],
    "dpm": [
        ({}, -5.584075096842902, 20.481714419099376),
        ({"n_steps": 7, "spacing": "trailing"}, -5.794491535444496, 19.919451203799177),
        ({"n_steps": 10, "clip_x_0": False}, -8.859536698470302, 94.8176342054673),
        ({"n_steps": 2}, -2.057683863489678, 47.61146792483309),
    ],
    "invert": [
        ({}, -2.5858681772778276, 16.935658918565558),
        ({"n_steps": 7, "spacing": "trailing"}, -2.4816215431830617, 15.755809162293309),
        ({"n_steps": 10, "clip_x_0": False}, -0.6214383993446232, 8.529057607773103),
        ({"n_steps": 1}, -2.789950067547079, 12.84417536188695),
    ],
    "inpaint": [
        ({"n_steps": 20}, 1.3387140148860217, 6.531247848082799),
        (
            {"n_steps": 7, "n_repeats": 3, "spacing": "trailing", "variance": "beta"},
            6.125319714459092,
            16.10837680462961,
        ),
        ({"n_steps": 10, "clip_x_0": False, "n_repeats": 1}, -1.3176989330105973, 20.342298491935548),
    ],
}


@pytest.mark.parametrize("name", STORED)
def test_equal_seeds_give_the_pictures_of_the_first_edition(name):
    """The sums agree to the last bit on one machine; 1e-7 is for other machines' sine and logarithm. The next test is exact on any."""
    schedule = make_schedule("linear", 1000, dtype=torch.float64)
    x_0 = torch.rand(SHAPE, generator=seeded(4), dtype=torch.float64) * 2 - 1
    mask = torch.rand(4, 4, generator=seeded(5)) < 0.5
    draw = {
        "ddpm": lambda **o: sample_ddpm(network, schedule, SHAPE, generator=seeded(1), **o),
        "ddim": lambda **o: sample_ddim(network, schedule, SHAPE, generator=seeded(2), **o),
        "dpm": lambda **o: sample_dpm_solver(network, schedule, SHAPE, generator=seeded(3), **o),
        "invert": lambda **o: ddim_invert(network, schedule, x_0, **o),
        "inpaint": lambda **o: inpaint(network, schedule, x_0, mask, generator=seeded(6), **o),
    }[name]
    for options, total, squares in STORED[name]:
        x = draw(**options)
        assert x.sum().item() == pytest.approx(total, rel=1e-7), options
        assert x.square().sum().item() == pytest.approx(squares, rel=1e-7), options


def test_the_flat_loop_is_the_sampler():
    """To the last bit. Algorithm 2 runs along a short chain, whose step i is t for the network; DDIM along the long one."""
    schedule, kept = make_schedule("cosine", 60), respaced_steps(60, 7)
    short, g = respace(schedule, kept), seeded(1)
    x = torch.randn(SHAPE, generator=g)
    for i, t in zip(reversed(range(7)), kept, strict=True):
        before = x
        x, _ = ddpm_step(short, x, i, network(x, torch.full((3,), t)), generator=g)
    assert x.equal(sample_ddpm(network, schedule, SHAPE, n_steps=7, generator=seeded(1)))
    asked = lambda x, i: network(x, torch.tensor(kept[::-1])[i])  # the chain's own names
    assert p_sample(asked, short, before, 0)[0].equal(x)
    x = torch.randn(SHAPE, generator=seeded(2))
    for t, t_prev in zip(kept, [*kept[1:], -1], strict=True):
        x, _ = ddim_step(schedule, x, t, t_prev, network(x, torch.full((3,), t)))
    assert x.equal(sample_ddim(network, schedule, SHAPE, n_steps=7, generator=seeded(2)))


def test_the_walk_counts_down_and_reports():
    asked, told, counts = [], [], []
    model = lambda x, t: asked.append((t.tolist(), t.dtype, x.requires_grad)) or x + 1

    def step(x, i, eps_hat):
        counts.append(i)
        return x + eps_hat, eps_hat

    note = lambda t, x, x_0_hat: told.append((t, x.flatten().tolist(), x_0_hat.flatten().tolist()))
    x = walk(model, torch.zeros(2, 1), [9, 4, 0], step, callback=note)
    assert counts == [2, 1, 0] and [t for t, _, _ in told] == [9, 4, 0]
    assert asked == [([t, t], torch.int64, False) for t in (9, 4, 0)]
    assert told == [(9, [1, 1], [1, 1]), (4, [3, 3], [2, 2]), (0, [7, 7], [4, 4])]
    assert x.flatten().tolist() == [7, 7] and not x.is_inference()


def test_callbacks_see_every_step():
    schedule, seen = make_schedule("cosine", 60), []
    record = lambda t, x, x_0_hat: seen.append((t, x, x_0_hat))
    kept, known, mask = respaced_steps(60, 4), noise(5).clamp(-1, 1), torch.arange(4) < 2
    last = sample_ddim(network, schedule, SHAPE, n_steps=4, generator=seeded(0), callback=record)
    inpaint(network, schedule, known, mask, n_steps=4, n_repeats=3, generator=seeded(0), callback=record)
    x_T = ddim_invert(network, schedule, known, n_steps=4, callback=record)
    assert [t for t, *_ in seen] == [*kept, *kept, *kept[::-1]]  # once a step; upwards, where it led
    assert all(x.shape == x_0_hat.shape == SHAPE for _, x, x_0_hat in seen)
    assert seen[3][1].equal(last) and seen[11][1].equal(x_T)
    assert seen[7][1][..., :2].equal(known[..., :2])


MASK = torch.ones(4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"shape": (0, 1, 4, 4)}, ValueError, "shape must be at least 1; got 0"),
        ({"x_T": torch.zeros(2, 1, 4, 4)}, ValueError, "x_T must have the given shape (3, 1, 4, 4); got (2, 1, 4, 4)"),
        ({"x_T": torch.zeros(SHAPE, dtype=torch.int64)}, TypeError, "x_T must have a floating-point dtype"),
        ({"n_steps": 0}, ValueError, "n_steps must be in 1..60; got 0"),
        ({"n_steps": 61}, ValueError, "n_steps must be in 1..60; got 61"),
        ({"spacing": "leading"}, ValueError, "spacing must be one of 'linspace', 'trailing'; got 'leading'"),
        ({"generator": 0}, TypeError, "generator must be a torch.Generator, such as"),
        ({"generator": 0, "x_T": torch.zeros(SHAPE)}, TypeError, "got 0 of type int"),
        ({"generator": [seeded(0)]}, TypeError, "or a list of 3, one an image; got 1 of type Generator"),
        ({"eta": 1.5}, ValueError, "eta must be finite and in"),
        ({"variance": "wide"}, ValueError, "variance must be one of 'posterior', 'beta', 'learned'; got 'wide'"),
        ({"n_repeats": 0}, ValueError, "n_repeats must be at least 1; got 0"),
        ({"mask": torch.ones(4)}, TypeError, "mask must be a tensor of dtype torch.bool; got torch.float32"),
        ({"mask": [True]}, TypeError, "mask must be a tensor of dtype torch.bool; got list"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, ValueError, "mask must broadcast to the shape of known, (3, 1, 4, 4); got (5,)"),
        ({"known": torch.zeros(SHAPE).long()}, TypeError, "known must have a floating-point dtype"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_before_any_step(options, error, words):
    """Each sampler that takes the option refuses it."""
    calls, schedule, refused = [], make_schedule("cosine", 60), 0
    model = lambda x, t: calls.append(t) or network(x, t)
    own = {"n_repeats", "known", "mask"} & set(options)
    takes = {
        sample_ddpm: not own and "eta" not in options,
        sample_ddim: not own and "variance" not in options,
        sample_dpm_solver: not own and not {"eta", "variance"} & set(options),
        inpaint: "eta" not in options and "shape" not in options,
    }
    for sampler in [sampler for sampler, able in takes.items() if able]:
        filled = {"known": torch.zeros(SHAPE), "mask": MASK} if sampler is inpaint else {"shape": SHAPE}
        filled = {"n_steps": 4} | filled | options
        refuses(lambda: sampler(model, schedule, **filled), words, error=error)  # noqa: B023
        refused += 1
    assert refused and calls == []


def test_bad_steps_are_refused():
    schedule, x = make_schedule("cosine", 60), noise(0)
    refuses(lambda: respace(schedule, [60]), "kept must be in 0..59; got 60")
    refuses(lambda: ddpm_step(schedule, x, 60, x), "t must be in 0..59; got 60")
    refuses(lambda: ddpm_step(schedule, x, 1, x, variance="wide"), "variance must be one of")
    refuses(lambda: ddpm_step(schedule, x, 1, x[:2]), "eps_hat must have the shape of x_t")
    refuses(lambda: ddim_step(schedule, x, 5, -2, x), "t_prev must be in -1..59; got -2")
    refuses(lambda: p_sample(network, schedule, x, torch.tensor([1, 2, 3])), "t must be a whole number", error=TypeError)
    refuses(lambda: p_sample(network, schedule, x, 3, generator=7), "generator must be", error=TypeError)
    assert p_sample(network, schedule, x, torch.tensor(0))[0].equal(p_sample(network, schedule, x, 0)[0])


@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize(("n_kept", "spacing"), [(250, "linspace"), (37, "linspace"), (10, "trailing"), (7, "trailing"), (1, "linspace")])
def test_respaced_ddpm_walks_as_diffusers_does(name, n_kept, spacing, variance):
    """The reference accepts any list of steps: those of counts that do not divide T, too."""
    schedule, kept = make_schedule(name, 1000), respaced_steps(1000, n_kept, spacing=spacing)
    kind = {"posterior": "fixed_small", "beta": "fixed_large"}[variance]
    reference = in_double(DDPMScheduler(1000, beta_schedule=NAMES[name], variance_type=kind))
    reference.set_timesteps(timesteps=kept)
    g, x = seeded(1), noise(0)
    for t in kept:
        x = reference.step(network(x, torch.full((3,), t)), t, x, generator=g).prev_sample.float()
    options = {"n_steps": n_kept, "spacing": spacing, "variance": variance, "x_T": noise(0)}
    mine = sample_ddpm(network, schedule, SHAPE, generator=seeded(1), **options)
    if variance == "beta" and kept[-1] > 0:  # the reference adds noise at a last step that is not called 0; ours does not
        short = respace(schedule, kept)
        g = seeded(1)
        last = [torch.randn(SHAPE, generator=g) for _ in kept][-1]
        assert (mine - x).abs().max() > 0.05
        x = x - short.betas[0].sqrt() * last
    torch.testing.assert_close(mine, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("n_kept", [1000, 50, 8])
def test_trailing_ddim_is_that_of_diffusers(name, eta, n_kept):
    """Where the stride divides T, its trailing spacing is right from end to end."""
    reference = in_double(DDIMScheduler(1000, beta_schedule=NAMES[name], timestep_spacing="trailing"))
    reference.set_timesteps(n_kept)
    assert reference.timesteps.tolist() == respaced_steps(1000, n_kept, spacing="trailing")
    g, x = seeded(1), noise(0)
    for t in reference.timesteps:
        eps_hat = network(x, torch.full((3,), int(t)))
        x = reference.step(eps_hat, t, x, eta=eta, use_clipped_model_output=True, generator=g).prev_sample.float()
    options = {"n_steps": n_kept, "eta": eta, "spacing": "trailing", "x_T": noise(0)}
    mine = sample_ddim(network, make_schedule(name, 1000), SHAPE, generator=seeded(1), **options)
    torch.testing.assert_close(mine, x, rtol=1e-4, atol=1e-4)


def test_a_stride_that_does_not_divide_is_a_trap():
    """The reference subtracts T // S from each of its evenly spaced steps, and so jumps to steps that it does not visit; ours does not."""
    reference = DDIMScheduler(1000, timestep_spacing="linspace")
    reference.set_timesteps(7)
    kept = respaced_steps(1000, 7)
    assert reference.timesteps.tolist() == kept
    theirs, partners = [t - 1000 // 7 for t in kept], [*kept[1:], -1]
    assert all(a != b for a, b in zip(theirs, partners, strict=True))
    schedule, x, targets = make_schedule("linear", 1000), noise(0), []
    sample_ddim(network, schedule, SHAPE, n_steps=7, x_T=x, callback=lambda t, x, x_0_hat: targets.append(x.clone()))
    eps_hat = network(targets[3], torch.full((3,), kept[4]))
    torch.testing.assert_close(targets[4], ddim_step(schedule, targets[3], kept[4], partners[4], eps_hat)[0])
    assert not torch.allclose(targets[4], ddim_step(schedule, targets[3], kept[4], theirs[4], eps_hat)[0], atol=1e-2)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("n_kept", [2, 7, 20, 50])
def test_dpm_solver_walks_as_diffusers_does(name, n_kept):
    reference = DPMSolverMultistepScheduler(1000, beta_schedule=NAMES[name], solver_order=2, euler_at_final=True)
    in_double(reference)
    a = reference.alphas_cumprod
    reference.alpha_t, reference.sigma_t = a.sqrt(), (1 - a).sqrt()
    reference.set_timesteps(timesteps=(kept := respaced_steps(1000, n_kept)))
    reference.sigmas = torch.cat([((1 - a) / a).sqrt()[kept], torch.zeros(1)])
    x = noise(0).double()
    for t in reference.timesteps:
        x = reference.step(network(x, torch.full((3,), int(t))), t, x).prev_sample
    schedule = make_schedule(name, 1000, dtype=torch.float64)
    mine = sample_dpm_solver(network, schedule, SHAPE, n_steps=n_kept, x_T=noise(0).double(), clip_x_0=False)
    torch.testing.assert_close(mine, x, rtol=1e-4, atol=1e-4)


MIXTURE = GaussianMixture(
    torch.tensor([0.5, 0.3, 0.2]),
    torch.tensor([[-0.9, -0.6], [0.9, -0.6], [0.0, 0.9]]),
    torch.tensor([[[0.04, 0.02], [0.02, 0.03]], [[0.02, 0.0], [0.0, 0.05]], [[0.03, -0.02], [-0.02, 0.03]]]),
)
SAMPLERS = {
    "ddpm": partial(sample_ddpm),
    "ddpm, beta": partial(sample_ddpm, variance="beta"),
    "ddpm, 500": partial(sample_ddpm, n_steps=500, variance="beta"),
    "ddim": partial(sample_ddim, n_steps=1000),
    "ddim, eta 0.5": partial(sample_ddim, n_steps=1000, eta=0.5),
    "solver": partial(sample_dpm_solver, n_steps=100),
    "inpaint": lambda model, schedule, shape, **options: inpaint(
        model, schedule, torch.zeros(shape), torch.zeros(shape, dtype=torch.bool), n_repeats=1, n_steps=None, **options
    ),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_optimal_denoiser_gives_back_the_mixture(name):
    """Weights, means and covariances within 5 standard errors, known beforehand, and 3 % of the covariance for finitely many steps."""
    schedule, n = make_schedule("cosine", 1000), 4000
    g = seeded(0)
    x = SAMPLERS[name](optimal_denoiser(MIXTURE, schedule), schedule, (n, 2), clip_x_0=False, generator=g)
    own = MIXTURE.responsibilities(x).argmax(1)
    for k, (weight, mean, cov) in enumerate(zip(MIXTURE.weights, MIXTURE.means, MIXTURE.covariances, strict=True)):
        cloud, m = x[own == k], n * weight
        assert abs(len(cloud) / n - weight) < 5 * (weight * (1 - weight) / n).sqrt()
        assert ((cloud.mean(0) - mean).abs() < 5 * (cov.diagonal() / m).sqrt()).all()
        scale = torch.outer(cov.diagonal(), cov.diagonal())
        assert ((cloud.T.cov() - cov).abs() < 5 * ((scale + cov**2) / m).sqrt() + 0.03 * scale.sqrt()).all()


@pytest.mark.parametrize(("sampler", "order"), [(sample_ddim, 1), (sample_dpm_solver, 2)])
@pytest.mark.parametrize("std", [0.3, 0.7])
def test_order_of_convergence_to_the_exact_flow(sampler, order, std):
    schedule, errors = make_schedule("linear", 1025, dtype=torch.float64), []
    v, m = schedule.alpha_bars * std**2 + schedule.one_minus_alpha_bars, 0.4 * schedule.sqrt_alpha_bars
    optimal = lambda x, t: (schedule.sqrt_one_minus_alpha_bars / v)[t][:, None] * (x - m[t][:, None])
    for n_steps in (129, 257):
        ends = []
        note = lambda t, x, x_0_hat, ends=ends: ends.append(x.item())
        x_T = (m + 1.3 * v.sqrt())[-1:, None]
        sampler(optimal, schedule, (1, 1), n_steps=n_steps, x_T=x_T, clip_x_0=False, callback=note)
        errors.append(abs(ends[-2] - (m[0] + 1.3 * v[0].sqrt()).item()))
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_second_order_works_with_a_schedule_in_half_precision(dtype):
    """Neighbouring steps have one log-SNR in bfloat16: a quotient of their differences would be infinite."""
    exact, half = (make_schedule("cosine", 1000, dtype=kind) for kind in (torch.float64, dtype))
    model, x_T = (lambda x, t: 0.1 * x), randn((2, 1, 4, 4), generator=seeded(0))
    for n_steps in (20, 1000):
        x, wanted = (sample_dpm_solver(model, s, x_T.shape, n_steps=n_steps, x_T=x_T.to(s.betas)) for s in (half, exact))
        assert x.isfinite().all() and (x.double() - wanted).abs().mean() < 0.1


def test_inversion_is_undone_to_first_order():
    schedule = make_schedule("linear", 1025, dtype=torch.float64)
    v = schedule.alpha_bars * 0.25 + schedule.one_minus_alpha_bars
    optimal = lambda x, t: (schedule.sqrt_one_minus_alpha_bars / v)[t][:, None] * x
    x_0, errors = torch.full((1, 1), 0.6, dtype=torch.float64), []
    for n_steps in (129, 257):
        x_T = ddim_invert(optimal, schedule, x_0, n_steps=n_steps)
        back = sample_ddim(optimal, schedule, (1, 1), n_steps=n_steps, x_T=x_T, clip_x_0=False)
        errors.append(abs(back - x_0).item())
    assert errors[1] < 0.02 and errors[0] / errors[1] > 1.6
    torch.testing.assert_close(x_T, 0.6 / 0.5 * v[-1:, None].sqrt(), rtol=0.05, atol=0)  # as many deviations from the mean as x_0


def test_inpainting_keeps_what_is_known_and_repeats_each_step():
    schedule, known, calls = make_schedule("cosine", 60), noise(5).clamp(-1, 1), []
    mask = torch.arange(4) < 2
    counting = lambda x, t: calls.append(int(t[0])) or network(x, t)
    x = inpaint(counting, schedule, known, mask, n_steps=4, n_repeats=3, generator=seeded(0))
    assert x[..., :2].equal(known[..., :2]) and not torch.allclose(x[..., 2:], known[..., 2:], atol=0.1)
    kept = respaced_steps(60, 4)
    assert calls == [t for t in kept for _ in range(3 if t else 1)]


def test_known_pixels_are_as_noisy_as_the_step_that_comes_next():
    """After the step from t the known pixels have the noise of the index that is visited next, and none at the end."""
    schedule, known = make_schedule("cosine", 100), torch.zeros(4, 1, 32, 32)
    mask, seen = torch.ones(known.shape, dtype=torch.bool), []
    inpaint(
        lambda x, t: 0 * x,
        schedule,
        known,
        mask,
        n_repeats=2,
        n_steps=4,
        generator=seeded(0),
        callback=lambda t, x, x_0_hat: seen.append((t, float(x.std()))),
    )
    kept = [t for t, _ in seen]
    for (_, std), after in zip(seen, kept[1:], strict=False):
        assert abs(std / math.sqrt(1 - float(schedule.alpha_bars[after])) - 1) < 0.05
    assert seen[-1][1] == 0


def test_repeating_mends_inpainting():
    """One value of a correlated pair is known; the mean of the other is known exactly, 0.8."""
    pair = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.tensor([[[1.0, 0.8], [0.8, 1.0]]]))
    schedule, n = make_schedule("cosine", 1000), 2000
    options = {"n_steps": 50, "clip_x_0": False, "variance": "beta"}
    means = [
        inpaint(
            optimal_denoiser(pair, schedule), schedule, torch.ones(n, 2), torch.tensor([True, False]),
            n_repeats=repeats, generator=seeded(0), **options,
        )[:, 1].mean()
        for repeats in (1, 20)
    ]  # fmt: skip
    assert abs(means[0] - 0.8) > 0.15 and abs(means[1] - 0.8) < 5 * 0.6 / math.sqrt(n) + 0.01


@pytest.mark.parametrize("sampler", [sample_ddpm, partial(sample_ddim, eta=1.0), sample_dpm_solver])
def test_memory_does_not_grow_and_nothing_is_recorded(sampler):
    schedule, alive, recorded = make_schedule("cosine", 60), [], []
    weight = torch.ones((), requires_grad=True)

    def watch(t, x, x_0_hat):
        gc.collect()
        alive.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
        recorded.append(x.requires_grad or not x.is_inference())

    sampler(lambda x, t: weight * network(x, t), schedule, SHAPE, n_steps=12, callback=watch)
    assert alive[-2] <= alive[2] + 1 and not any(recorded)


def test_slerp_ends_where_it_should():
    a, b = noise(0), noise(1)
    torch.testing.assert_close(slerp(a, b, 0.0), a, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(slerp(a, b, torch.ones(3)), b, rtol=1e-4, atol=1e-5)
    each = slerp(a, b, torch.tensor([0.0, 0.5, 1.0]))
    assert torch.allclose(each[0], a[0], atol=1e-5) and torch.allclose(each[2], b[2], atol=1e-5)
    assert each[1].norm() > 1.2 * ((a + b) / 2)[1].norm()


def test_respacing_under_a_default_device():
    schedule = make_schedule("cosine", 60)
    with torch.device("meta"):
        assert torch.equal(respace(schedule, [3, 50]).betas, respace(schedule, [50, 3]).betas)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda s, x: ddim_step(s, x, 5, 3, x, eta=3), ValueError, "eta must be finite and in [0, 1]; got 3"),
        (lambda s, x: slerp(x, x, 1.5), ValueError, "share must be one number or (3,), in [0, 1]; got"),
        (lambda s, x: slerp(x, x, torch.tensor([0.5, math.nan, 1])), ValueError, "share must be one number or (3,)"),
        (lambda s, x: slerp(x[:1], x[:1], torch.ones(3)), ValueError, "share must be one number or (1,)"),
        (lambda s, x: respaced_steps(0), ValueError, "n_steps must be at least 1; got 0"),
        (lambda s, x: respaced_steps(10.5, 3), TypeError, "n_steps must be a whole number; got 10.5"),
    ],
)
def test_steps_and_shares_out_of_range_are_refused(call, error, words):
    refuses(lambda: call(make_schedule("cosine", 60), noise(0)), words, error=error)


def test_respacing_keeps_the_marginals():
    schedule = make_schedule("cosine", 1000)
    assert respace(schedule, range(1000)) is schedule
    for kept in ([999], [0, 999], respaced_steps(1000, 37)):
        short = respace(schedule, kept)
        torch.testing.assert_close(short.alpha_bars, schedule.alpha_bars[sorted(kept)], rtol=1e-6, atol=0)


DRAWS = {
    "ddpm": lambda model, schedule, n, own: sample_ddpm(model, schedule, (n, 1, 8, 8), n_steps=4, generator=own),
    "ddim, eta 1": lambda model, schedule, n, own: sample_ddim(model, schedule, (n, 1, 8, 8), n_steps=4, eta=1.0, generator=own),
    "dpm": lambda model, schedule, n, own: sample_dpm_solver(model, schedule, (n, 1, 8, 8), n_steps=4, generator=own),
    "inpaint": lambda model, schedule, n, own: inpaint(model, schedule, torch.zeros(n, 1, 8, 8), torch.eye(8).bool(), n_steps=4, generator=own),
}


@pytest.mark.parametrize("name", DRAWS)
def test_with_a_generator_for_each_image_no_batch_changes_a_picture(name):
    model, schedule = lambda x, t: 0.9 * x, make_schedule("cosine", 1000)  # the same rounding in every batch
    own = lambda places: [seeded(i) for i in places]
    together = DRAWS[name](model, schedule, 3, own(range(3)))
    apart = [DRAWS[name](model, schedule, 1, own([i])) for i in range(3)]
    assert torch.equal(torch.cat(apart), together) and not torch.equal(together[0], together[1])
