"""Learned variances, weights and the end of the chain: equal to the reference, exact on known data, clear about bad input."""

import math
from functools import partial

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence
from training_helpers import tiny_unet

from conftest import refuses
from ddpm_nb.bound import optimal_denoiser, vlb_terms
from ddpm_nb.elbo import OBJECTIVES, predict_noise, reverse_mean_variance, simple_loss, split_output
from ddpm_nb.forward import NoiseSchedule, q_posterior, q_sample
from ddpm_nb.gaussian import GaussianMixture, seeded
from ddpm_nb.hub import describe_model, load_pretrained, save_pretrained
from ddpm_nb.improved import (
    LOSS_WEIGHTS,
    LossHistory,
    hybrid_loss,
    learns_variance,
    loss_weights,
    optimal_variances,
    respaced_model,
    step_bits,
    weighted_loss,
    zero_terminal_snr,
)
from ddpm_nb.sampling import ddpm_step, respace, respaced_steps, sample_ddim, sample_ddpm
from ddpm_nb.schedules import make_schedule
from ddpm_nb.training import TrainConfig, fit

EXACT = {"dtype": torch.float64}
SHAPE = (6, 1, 4, 4)


def network(x, t):
    """Stand in for a network with two output channels."""
    time = t.reshape(-1, 1, 1, 1)
    return torch.cat([0.8 * x + 0.1 * torch.sin(2 * x + 0.01 * time), torch.tanh(x - 0.01 * time)], 1)


def noise(seed, shape=SHAPE):
    return torch.randn(shape, generator=seeded(seed), **EXACT)


@pytest.mark.parametrize("t", [1, 7, 50, 99])
def test_step_and_loss_are_those_of_diffusers(t):
    schedule = make_schedule("linear", 100, **EXACT)
    theirs = DDPMScheduler(100, beta_schedule="linear", variance_type="learned_range", clip_sample=False)
    theirs.betas = schedule.betas
    theirs.alphas = 1 - theirs.betas
    theirs.alphas_cumprod = theirs.alphas.cumprod(0)
    x_0, eps, steps = noise(0).clamp(-1, 1), noise(1), torch.full((6,), t)
    x_t = q_sample(schedule, x_0, steps, eps)
    output = network(x_t, steps)
    ours, _ = ddpm_step(schedule, x_t, t, output, variance="learned", clip_x_0=False, generator=seeded(2))
    expected = theirs.step(output, t, x_t, generator=seeded(2)).prev_sample
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    log_variance = theirs._get_variance(t, predicted_variance=output[:, 1:])
    z = torch.randn(SHAPE, generator=seeded(2), **EXACT)
    mean = expected - (0.5 * log_variance).exp() * z
    true_mean, true_variance, _ = q_posterior(schedule, x_0, x_t, steps)
    divergence = kl_divergence(Normal(true_mean, true_variance.sqrt()), Normal(mean, (0.5 * log_variance).exp()))
    bits = divergence.flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(step_bits(schedule, x_0, x_t, steps, output, n_levels=None), bits, rtol=1e-5, atol=1e-5)
    hybrid = hybrid_loss(network, schedule, x_0, t=steps, eps=eps, n_levels=None, reduction="none")
    simple = (output[:, :1] - eps).square().flatten(1).mean(1)
    torch.testing.assert_close(hybrid, simple + 0.001 * 100 * bits, rtol=1e-5, atol=1e-5)


def test_step_bits_are_the_terms_of_the_bound():
    schedule = make_schedule("cosine", 12, **EXACT)
    x_0 = torch.randint(0, 17, SHAPE, generator=seeded(0)).double() / 8 - 1
    eps = noise(1, (12, *SHAPE))
    terms = vlb_terms(network, schedule, x_0, n_levels=17, clip_x_0=False, variance="learned", eps=eps)
    for i in range(12):
        t = torch.full((6,), i)
        x_t = q_sample(schedule, x_0, t, eps[i])
        bits = step_bits(schedule, x_0, x_t, t, network(x_t, t), n_levels=17)
        torch.testing.assert_close(bits, terms.decoder if i == 0 else terms.kl[:, i - 1])


def test_the_bound_moves_v_alone_and_the_simple_loss_the_noise_alone():
    schedule = make_schedule("cosine", 12)
    t, x_0, eps = torch.arange(6) * 2, noise(0).float().clamp(-1, 1), noise(1).float()
    output = network(q_sample(schedule, x_0, t, eps), t).requires_grad_()
    gradients = {}
    for share in (0.0, 1.0, 2.0):
        loss = hybrid_loss(lambda *_: output, schedule, x_0, t=t, eps=eps, share=share, n_levels=None)
        (gradients[share],) = torch.autograd.grad(loss, output)
    assert torch.equal(gradients[0.0][:, :1], gradients[1.0][:, :1])
    assert not gradients[0.0][:, 1:].any() and gradients[1.0][:, 1:].all() and gradients[1.0].isfinite().all()
    torch.testing.assert_close(2 * gradients[1.0][:, 1:], gradients[2.0][:, 1:])


def test_hybrid_loss_draws_its_steps_evenly():
    schedule, x_0, seen = make_schedule("cosine", 10), noise(0, (10_000, 1)).float(), []

    def model(x, t):
        seen.append(t)
        return torch.cat([x, x], 1)

    first = hybrid_loss(model, schedule, x_0, n_levels=None, generator=seeded(3))
    assert torch.equal(first, hybrid_loss(model, schedule, x_0, n_levels=None, generator=seeded(3)))
    counts = seen[0].bincount(minlength=10)
    assert len(counts) == 10 and (counts - 1000).abs().max() < 5 * 30


def plane():
    means = torch.tensor([[-1.0, 0.0], [0.8, 0.8]], **EXACT)
    covariances = torch.tensor([[[0.02, 0.0], [0.0, 0.3]], [[0.15, 0.1], [0.1, 0.12]]], **EXACT)
    return GaussianMixture(torch.tensor([0.6, 0.4], **EXACT), means, covariances)


def test_the_exact_variance_is_where_the_loss_is_flat():
    data, schedule, n = plane(), make_schedule("cosine", 8, **EXACT), 200_000
    x_0, eps, t = data.sample(n, generator=seeded(0)), noise(1, (n, 2)), torch.arange(n) % 8
    x_t = q_sample(schedule, x_0, t, eps)
    output = optimal_variances(data, schedule)(x_t, t)
    torch.testing.assert_close(output[:, :2], optimal_denoiser(data, schedule)(x_t, t))
    output.requires_grad_()
    loss = hybrid_loss(lambda *_: output, schedule, x_0, t=t, eps=eps, n_levels=None, reduction="none").sum()
    (gradient,) = torch.autograd.grad(loss, output)
    for coordinate in (2, 3):
        for shape in (torch.ones(n), x_t[:, 0].sin(), (t == 5).double()):
            slope = gradient[:, coordinate] * shape
            assert slope.mean().abs() < 5 * slope.std() / math.sqrt(n)


def test_exact_variances_survive_single_precision_and_the_samplers():
    """Var(x_{t-1} | x_t) of normal data in closed form, where 1 - noise * slope is lost in single precision."""
    spread, schedule = torch.tensor([0.3, 0.02]), make_schedule("cosine", 1000)
    one = torch.ones(1)
    model = optimal_variances(GaussianMixture(one, torch.zeros(1, 2), spread.diag()[None]), schedule)
    double = make_schedule("cosine", 1000, **EXACT)
    for t in (0, 1, 500, 998, 999):
        with torch.inference_mode():
            output = model(noise(0, (5, 2)).float(), t)
        found = split_output(double, noise(0, (5, 2)), t, output, "learned")[1]
        of_x_0 = 1 / (1 / spread.double() + double.snr[t])
        expected = double.posterior_variance[t] + double.posterior_coef_x_0[t] ** 2 * of_x_0
        assert output.dtype == torch.float32 and not model(noise(0, (5, 2)), t).requires_grad
        torch.testing.assert_close(found, expected.log().expand(5, 2), rtol=0, atol=1e-5)
    drawn = sample_ddpm(model, schedule, (4000, 2), n_steps=40, variance="learned", clip_x_0=False, generator=seeded(1))
    torch.testing.assert_close(drawn.var(0), spread, rtol=0.15, atol=0)


def test_sampling_from_a_respaced_chain_by_hand():
    schedule, kept = make_schedule("cosine", 100), respaced_steps(100, 7)
    short, told, generator = respace(schedule, kept), respaced_model(network, kept), seeded(3)
    x = torch.randn(SHAPE, generator=generator)
    for i in reversed(range(7)):
        output = told(x, torch.full((6,), i))
        mean, log_variance, _ = reverse_mean_variance(
            lambda *_, output=output: output, short, x, torch.full((6,), i), variance="learned"
        )
        x = mean + (0.5 * log_variance).exp() * torch.randn(SHAPE, generator=generator) if i else mean
    ours = sample_ddpm(network, schedule, SHAPE, n_steps=7, variance="learned", generator=seeded(3))
    torch.testing.assert_close(ours, x)


def test_repeated_steps_are_kept_once_by_model_and_schedule():
    schedule, kept = make_schedule("cosine", 10), [0, 5, 5, 9]
    told = respaced_model(lambda x_t, t: t, kept)(torch.zeros(3, 1), torch.arange(3, dtype=torch.uint8))
    assert respace(schedule, kept).n_steps == 3 and told.tolist() == [0, 5, 9]


@pytest.mark.parametrize("schedule", [make_schedule("linear", 4000, rescale=True), NoiseSchedule([0.3])], ids=["long", "one step"])
def test_the_best_v_is_finite_where_both_choices_are_one_number(schedule):
    data = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None] * 0.3)
    model = optimal_variances(data, schedule)
    for t in (0, schedule.n_steps - 1):
        assert model(noise(0, (5, 2)), torch.full((5,), t)).isfinite().all()


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_fixed_variances_are_drawn_as_before(variance):
    schedule, generator = make_schedule("cosine", 20), seeded(4)
    model = predict_noise(network, schedule, "eps")
    logs = {"posterior": schedule.posterior_log_variance, "beta": schedule.betas.log()}[variance]
    x = torch.randn(SHAPE, generator=generator)
    for t in reversed(range(20)):  # the lines of chapter 10 before a variance could be learned
        x_0_hat = (x - schedule.sqrt_one_minus_alpha_bars[t] * model(x, torch.full((6,), t))) / schedule.sqrt_alpha_bars[t]
        mean, _, _ = q_posterior(schedule, x_0_hat.clamp(-1, 1), x, t)
        x = mean + (0.5 * logs[t]).exp() * torch.randn(SHAPE, generator=generator) if t else mean
    ours = sample_ddpm(model, schedule, SHAPE, variance=variance, generator=seeded(4))
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)


def test_history_draws_by_the_root_mean_square_of_the_last_losses():
    history = LossHistory(3, n_kept=2, uniform=0.1)
    history.update(torch.tensor([0, 0, 1, 1, 2]), torch.tensor([9.0, 1.0, 2.0, 2.0, 32**0.5]))
    assert (history.probabilities() == 1 / 3).all()  # the last step has one loss
    history.update(torch.tensor([2, 0]), torch.tensor([0.0, 1.0]))  # the 9 is forgotten
    expected = 0.9 * torch.tensor([1.0, 2.0, 4.0], **EXACT) / 7 + 0.1 / 3
    torch.testing.assert_close(history.probabilities(), expected)
    t, weight = history.draw(50_000, generator=seeded(0))
    torch.testing.assert_close(weight, (1 / (3 * expected[t])).float())
    assert abs(weight.mean() - 1) < 5 * weight.std() / math.sqrt(50_000)


@pytest.mark.parametrize("name", LOSS_WEIGHTS)
def test_weights_in_every_currency(name):
    schedule = make_schedule("cosine", 30, **EXACT)
    weights, snr = loss_weights(schedule, name), schedule.snr
    of_image = {"simple": snr, "x_0": snr / snr, "v": 1 + snr, "truncated_snr": snr.clamp(min=1), "min_snr": snr.clamp(max=5)}
    of_image["velocity"] = (1 + snr.sqrt()) ** 2
    if name == "vlb":
        options = {"t": torch.arange(6), "eps": noise(1), "weighting": "vlb"}
        model = predict_noise(network, schedule, "eps")
        plain = weighted_loss(model, schedule, noise(0), t=options["t"], eps=options["eps"], weights=weights)
        torch.testing.assert_close(plain, simple_loss(model, schedule, noise(0), **options))
    else:
        torch.testing.assert_close(weights * snr, of_image[name], rtol=1e-6, atol=1e-9)
    if name in OBJECTIVES:  # a loss in this currency is the plain one
        options = {"t": torch.arange(6), "eps": noise(1), "objective": name}
        weighted = weighted_loss(network_of_half, schedule, noise(0), weights=weights, **options)
        torch.testing.assert_close(weighted, simple_loss(network_of_half, schedule, noise(0), **options))


def test_the_cap_of_min_snr_is_the_one_that_is_asked_for():
    schedule = make_schedule("cosine", 30, **EXACT)
    weights = loss_weights(schedule, "min_snr", gamma=2.0)
    torch.testing.assert_close(weights * schedule.snr, schedule.snr.clamp(max=2))


def network_of_half(x_t, t):
    """Answer something."""
    return x_t / 2


def test_the_end_of_the_chain_is_pure_noise():
    alpha_bars = zero_terminal_snr(make_schedule("linear", 1000))
    assert alpha_bars[-1] == 0 and (alpha_bars.diff() < 0).all()
    torch.testing.assert_close(alpha_bars[0].item(), 1 - 1e-4, rtol=1e-12, atol=0)


def test_fit_save_load_and_sample_a_network_that_learns_its_variance(digits, tmp_path):
    unet, schedule = tiny_unet(out_channels=2), make_schedule("cosine", 20)
    config = TrainConfig(n_iterations=4, batch_size=8, precision="float32", variance="learned")
    refuses(lambda: fit(unet, schedule, digits, config), "needs loss=hybrid_loss")
    trained = fit(unet, schedule, digits, config, loss=partial(hybrid_loss, n_levels=17)).ema
    assert learns_variance(trained) and not learns_variance(tiny_unet())
    save_pretrained(tmp_path / "m", trained, schedule, variance="learned", n_levels=17)
    model, _ = load_pretrained(tmp_path / "m")
    save_pretrained(tmp_path / "again", model, schedule)
    assert describe_model(tmp_path / "again")["facts"]["variance"] == "learned"
    refuses(lambda: save_pretrained(tmp_path / "x", tiny_unet(), schedule, variance="learned"), "twice the output")
    ours = sample_ddim(model, schedule, (2, 1, 8, 8), n_steps=3, generator=seeded(0))
    noise_of = predict_noise(trained, schedule, "eps")
    assert torch.equal(ours, sample_ddim(noise_of, schedule, (2, 1, 8, 8), n_steps=3, generator=seeded(0)))
    options = {"variance": "learned", "n_steps": 3}
    known = sample_ddpm(model.network, schedule, (2, 1, 8, 8), generator=seeded(0), **options)
    assert torch.equal(known, sample_ddpm(trained, schedule, (2, 1, 8, 8), generator=seeded(0), **options))


def test_refusals():
    schedule, x = make_schedule("cosine", 20), noise(0).float()
    one = predict_noise(network, schedule, "eps")
    refuses(lambda: sample_ddpm(one, schedule, SHAPE, variance="learned"), "needs a model that returns (6, 2, 4, 4)")
    refuses(lambda: hybrid_loss(one, schedule, x, n_levels=None), "needs a model that returns")
    refuses(lambda: hybrid_loss(network, schedule, x, share=-1.0), "share must be")
    for n_levels, words in ((1, "n_levels must be at least 2"), (17, "x_0 must lie on the grid of n_levels=17")):
        refuses(lambda n=n_levels: hybrid_loss(abs, schedule, x.clamp(-1, 1), n_levels=n), words)
    for objective in OBJECTIVES[1:]:
        refuses(lambda o=objective: TrainConfig(variance="learned", objective=o), "needs objective='eps'")
    refuses(lambda: TrainConfig(variance="wide"), "variance must be one of")
    refuses(lambda: zero_terminal_snr(make_schedule("linear", 1)), "schedule.n_steps must be at least 2; got 1")
    refuses(lambda: loss_weights(schedule, "p2"), "name must be one of")
    refuses(lambda: loss_weights(schedule, "min_snr", gamma=0.0), "gamma must be")
    refuses(lambda: LossHistory(10, uniform=2.0), "uniform must be")
    refuses(lambda: LossHistory(10).draw(0), "n must be at least 1; got 0")
    refuses(lambda: LossHistory(10).draw(3, 0), "generator must be a torch.Generator", error=TypeError)
    options = {"t": torch.arange(6), "eps": x, "weights": torch.ones(3)}
    refuses(lambda: weighted_loss(one, schedule, x, **options), "weights must have shape (20,)")
