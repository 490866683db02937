"""Samplers: equal to the reference, right on exact data, quiet about global state, and clear about bad input."""

import math
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from ddpm_nb.gaussian import randn
from ddpm_nb.sampling import ddim_step, p_sample, respaced_steps, sample_ddim, sample_ddpm
from ddpm_nb.schedules import make_schedule

SHAPE = (3, 1, 4, 4)
NAMES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def network(x, t):
    """Stand in for a network: smooth, different at every step, and no steeper than a trained one."""
    return 0.8 * x + 0.1 * torch.sin(2 * x + 0.01 * t.reshape(-1, 1, 1, 1))


def noise(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


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
    mine = sample_ddpm(network, schedule, SHAPE, x_T=noise(0), variance=variance, clip_x_0=clip, generator=torch.Generator().manual_seed(1))
    g, x = torch.Generator().manual_seed(1), noise(0)
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
        fresh = torch.Generator().manual_seed(i)
        theirs = reference.step(eps_hat, t, x, eta=eta, use_clipped_model_output=True, generator=fresh).prev_sample
        mine, _ = ddim_step(schedule, x, t, t_prev, eps_hat, eta=eta, generator=torch.Generator().manual_seed(i))
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
        x = mine


@pytest.mark.parametrize("n_steps", [2, 3, 10, 37, 1000])
def test_respaced_steps_are_distinct_and_keep_both_ends(n_steps):
    for n_kept in {1, 2, n_steps // 2 or 1, n_steps - 1, n_steps}:
        kept = respaced_steps(n_steps, n_kept)
        assert len(set(kept)) == n_kept and kept[0] == n_steps - 1 and (n_kept == 1 or kept[-1] == 0)


@pytest.mark.parametrize("sampler", [sample_ddpm, partial(sample_ddim, n_steps=200, eta=1.0), partial(sample_ddim, n_steps=200)])
def test_the_optimal_denoiser_gives_back_the_normal_data(sampler):
    schedule, std, mean, n = make_schedule("cosine", 400), 0.4, 0.3, 20_000

    def optimal(x, t):
        a, v = schedule.alpha_bars[t][:, None], schedule.one_minus_alpha_bars[t][:, None]
        return v.sqrt() / (a * std**2 + v) * (x - a.sqrt() * mean)

    x = sampler(optimal, schedule, (n, 1), clip_x_0=False, generator=torch.Generator().manual_seed(0))
    assert abs(x.mean() - mean) < 5 * std / math.sqrt(n)
    assert abs(x.std() - std) < 5 * std / math.sqrt(2 * n) + 0.012  # the second part: finitely many steps


def test_the_last_step_adds_no_noise():
    """A sampler that adds sigma z at the last step, as widely copied code does, depends on the seed there; ours does not."""
    schedule, x = make_schedule("linear", 10), noise(0)
    same = [p_sample(network, schedule, x, 0, variance="beta", generator=torch.Generator().manual_seed(s))[0] for s in (1, 2)]
    assert same[0].equal(same[1])
    moving = [p_sample(network, schedule, x, 1, variance="beta", generator=torch.Generator().manual_seed(s))[0] for s in (1, 2)]
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
    first, second = (sampler(network, schedule, SHAPE, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.equal(second) and torch.get_rng_state().equal(before)
    assert first.requires_grad is False and (first * torch.ones(1, requires_grad=True)).sum().backward() is None


def test_noise_is_one_draw_a_step_in_the_order_of_the_contract():
    schedule, g = make_schedule("linear", 5), torch.Generator().manual_seed(4)
    mine = sample_ddpm(network, schedule, SHAPE, generator=torch.Generator().manual_seed(4))
    x = torch.randn(SHAPE, generator=g)
    for t in range(4, -1, -1):
        z = torch.randn(SHAPE, generator=g) if t else torch.zeros(SHAPE)
        mean, _ = p_sample(network, schedule, x, t, generator=torch.Generator().manual_seed(0))
        mean = mean - (schedule.posterior_variance[t].sqrt() * randn(SHAPE, generator=torch.Generator().manual_seed(0)) if t else 0)
        x = mean + schedule.posterior_variance[t].sqrt() * z
    torch.testing.assert_close(mine, x, rtol=1e-4, atol=1e-5)


def test_callback_sees_every_step():
    seen = []
    record = lambda t, x, x_0_hat: seen.append((t, x.shape, x_0_hat.shape))
    sample_ddim(network, make_schedule("cosine", 60), SHAPE, n_steps=4, callback=record)
    assert [t for t, *_ in seen] == respaced_steps(60, 4) and all(a == b == SHAPE for _, a, b in seen)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shape": (0, 1, 4, 4)}, ValueError, "shape must be at least 1; got 0"),
        ({"x_T": torch.zeros(2, 1, 4, 4)}, ValueError, r"x_T must have the given shape \(3, 1, 4, 4\); got \(2, 1, 4, 4\)"),
        ({"x_T": torch.zeros(SHAPE, dtype=torch.int64)}, TypeError, "x_T must have a floating-point dtype"),
        ({"n_steps": 0}, ValueError, r"n_steps must be in 1\.\.60; got 0"),
        ({"n_steps": 61}, ValueError, r"n_steps must be in 1\.\.60; got 61"),
        ({"eta": 1.5}, ValueError, "eta must be finite and in"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        sample_ddim(network, make_schedule("cosine", 60), **{"shape": SHAPE, **options})


def test_bad_variance_is_refused_before_any_step():
    calls = []
    with pytest.raises(ValueError, match="variance must be one of 'posterior', 'beta'; got 'learned'"):
        sample_ddpm(lambda x, t: calls.append(t), make_schedule("cosine", 60), SHAPE, variance="learned")
    assert calls == []
