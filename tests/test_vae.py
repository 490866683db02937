"""The VAE: its bound against exact answers and DDPM's bound, training that repeats itself, samples with the promised distribution."""

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from conftest import refuses
from ddpm_nb.bound import vlb_terms
from ddpm_nb.data import load_dataset
from ddpm_nb.elbo import decoder_log_likelihood
from ddpm_nb.forward import NoiseSchedule, predict_x_0, q_mean_variance
from ddpm_nb.gaussian import discretized_gaussian_log_likelihood, seeded, seeded_init
from ddpm_nb.vae import (
    VAE,
    VAEBound,
    aggregate_log_prob,
    latent_rates,
    sample_vae,
    train_vae,
    vae_bound,
)

LN2 = math.log(2)


def make_vae(seed=0, **config):
    with seeded_init(seed):
        return VAE(**{"image_size": 4, "hidden": 16, "latent_dim": 3, **config}).requires_grad_(False)


def grey(n, n_levels, *shape, seed=0):
    return torch.randint(n_levels, (n, *shape), generator=seeded(seed)) * (2 / (n_levels - 1)) - 1


class OneStep:
    """A chain of one step, as a VAE with a fixed encoder."""

    def __init__(self, model, schedule, shape):
        self.model, self.schedule, self.shape = model, schedule, shape
        self.log_scale = 0.5 * schedule.posterior_log_variance[0]

    def encode(self, x_0):
        mean, _, log_variance = q_mean_variance(self.schedule, x_0, 0)
        return mean.flatten(1), log_variance.expand_as(mean).flatten(1)

    def decode(self, z):
        x_1, t = z.view(-1, *self.shape), torch.zeros(len(z), dtype=torch.long)
        return predict_x_0(self.schedule, x_1, t, self.model(x_1, t)).clamp(-1, 1)


@pytest.mark.parametrize(("beta", "shape", "n_levels"), [(0.02, (1, 4, 4), 17), (0.6, (3, 2, 2), 256), (0.99, (1, 6, 6), 2)])
def test_bound_of_a_one_step_chain_is_that_of_ddpm(beta, shape, n_levels):
    schedule, images = NoiseSchedule([beta]), grey(5, n_levels, *shape)
    model = lambda x_t, t: torch.tanh(x_t) + 0.1
    chain = vlb_terms(model, schedule, images, n_levels=n_levels, generator=seeded(1))
    ours = vae_bound(OneStep(model, schedule, shape), images, n_levels=n_levels, generator=seeded(1))
    torch.testing.assert_close(ours.kl, chain.prior)
    torch.testing.assert_close(ours.decoder, chain.decoder)
    torch.testing.assert_close(ours.total, chain.total)


def test_gap_of_the_bound_is_the_divergence_from_the_true_posterior():
    """With one hidden number and four pixels, -log p(x_0) and the posterior are integrals over a line."""
    vae = make_vae(image_size=2, latent_dim=1)
    vae.decoder[-1].weight.mul_(4)  # so that z matters
    vae.encoder[-1].bias[1:].sub_(2.0)  # a proposal narrower than the prior
    image, grid = grey(1, 17, 1, 2, 2, seed=3), torch.linspace(-9, 9, 3001)[:, None]
    log_mass = discretized_gaussian_log_likelihood(image, vae.decode(grid), vae.log_scale, n_levels=17).flatten(1).sum(1)
    log_joint = log_mass.double() + Normal(0, 1).log_prob(grid[:, 0].double())
    evidence = log_joint.logsumexp(0) + math.log(18 / 3000)
    mean, log_var = (v.double() for v in vae.encode(image))
    log_q = Normal(mean[0], (0.5 * log_var[0]).exp()).log_prob(grid[:, 0].double())
    gap = (log_q.exp() * (log_q - log_joint + evidence)).sum() * 18 / 3000
    draws = vae_bound(vae, image.expand(20_000, -1, -1, -1), n_levels=17, generator=seeded(4)).total.double() * 4 * LN2
    assert gap > 0.05
    assert abs(draws.mean() + evidence - gap) < 5 * draws.std() / math.sqrt(len(draws))


@pytest.mark.parametrize("latent_dim", [1, 3, 40])
def test_rate_sums_over_entries_and_is_divided_by_the_pixels(latent_dim):
    """A rate that is averaged over entries, or not divided by the pixels, fails for some of these sizes."""
    vae, images = make_vae(latent_dim=latent_dim), grey(6, 17, 1, 4, 4)
    mean, log_var = vae.encode(images)
    nats = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1)
    bound = vae_bound(vae, images, n_levels=17, generator=seeded(0))
    torch.testing.assert_close(bound.kl, nats / (16 * LN2))
    torch.testing.assert_close(latent_rates(vae, images).sum(), nats.mean())
    assert latent_rates(vae, images).shape == (latent_dim,)


def test_decoder_term_is_that_of_ddpms_last_step():
    vae, images = make_vae(in_channels=3), grey(6, 256, 3, 4, 4)
    mean, log_var = vae.encode(images)
    z = mean + (0.5 * log_var).exp() * torch.randn(6, 3, generator=seeded(2))
    log_mass = decoder_log_likelihood(images, vae.decode(z), 2 * vae.log_scale, 256)
    bound = vae_bound(vae, images, n_levels=256, generator=seeded(2))
    torch.testing.assert_close(bound.decoder, -log_mass.flatten(1).sum(1) / (48 * LN2))


def test_bound_of_a_decoder_without_knowledge_is_at_least_the_uniform_guess():
    """A very wide decoder gives nearly all mass to the two outer levels; none of the inner ones costs less than log2(n)."""
    vae, images = make_vae(), grey(8, 17, 1, 4, 4).clamp(-0.8, 0.8).mul(8).round().div(8)
    vae.log_scale.fill_(3.0)
    assert vae_bound(vae, images, n_levels=17, generator=seeded(0)).decoder.min() > math.log2(17)


def test_parts_add_up():
    bound = VAEBound(torch.tensor([0.25, 1.0]), torch.tensor([2.0, 0.5]))
    assert bound.total.tolist() == [2.25, 1.5]


def test_gradient_of_the_decoder_term_reaches_the_encoder():
    vae, images = make_vae().requires_grad_(True), grey(6, 17, 1, 4, 4)
    vae_bound(vae, images, n_levels=17, generator=seeded(0)).decoder.mean().backward()
    mean_rows, variance_rows = vae.encoder[-1].weight.grad.chunk(2)
    assert mean_rows.abs().max() > 0 and variance_rows.abs().max() > 0 and vae.log_scale.grad != 0


def test_pixels_are_drawn_from_the_decoders_distribution():
    """All pixels share one mean, between two levels and near the edge, so that their frequencies are known."""
    vae = make_vae()
    for parameter in vae.decoder[-1].parameters():
        parameter.zero_()
    vae.decoder[-1].bias.fill_(math.atanh(-0.7))
    vae.log_scale.fill_(math.log(0.3))
    drawn = sample_vae(vae, 2000, n_levels=5, generator=seeded(5)).flatten()
    levels = torch.linspace(-1, 1, 5)
    mass = discretized_gaussian_log_likelihood(levels, torch.tensor(-0.7), vae.log_scale, n_levels=5).exp()
    share = (drawn[:, None] == levels).float().mean(0)
    assert abs(share.sum() - 1) < 1e-6, "every pixel lies on a level"
    assert ((share - mass).abs() < 5 * (mass * (1 - mass) / len(drawn)).sqrt() + 1e-6).all()
    torch.testing.assert_close(sample_vae(vae, 3), torch.full((3, 1, 4, 4), -0.7))


def test_samples_repeat_with_the_seed_and_share_their_hidden_vectors():
    vae = make_vae()
    means, again = (sample_vae(vae, 4, generator=seeded(6)) for _ in range(2))
    assert means.equal(again) and not means.equal(sample_vae(vae, 4, generator=seeded(7)))
    vae.log_scale.fill_(-12.0)  # with hardly any noise a draw is the mean, rounded
    drawn = sample_vae(vae, 4, n_levels=256, generator=seeded(6))
    assert (drawn - means).abs().max() < 1.01 / 255


def test_training_repeats_itself_and_leaves_the_global_stream_alone():
    images, options = grey(40, 17, 1, 4, 4), {"n_levels": 17, "n_iterations": 5, "batch_size": 8}
    new = lambda: make_vae(hidden=8, latent_dim=2).requires_grad_(True)
    before, calls = torch.get_rng_state(), []
    first = train_vae(new(), images, callback=lambda i, vae: calls.append((i, vae.training)), **options)
    second, other = train_vae(new(), images, **options), train_vae(new(), images, seed=1, **options)
    assert torch.get_rng_state().equal(before)
    assert calls == [(i, True) for i in range(1, 6)]
    assert not first.training and not any(p.requires_grad for p in first.parameters())
    assert all(a.equal(b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    assert not first.encoder[0].weight.equal(other.encoder[0].weight)


def test_a_trained_vae_is_trained_on():
    images, options = grey(40, 17, 1, 4, 4), {"n_levels": 17, "n_iterations": 2, "batch_size": 8}
    vae = train_vae(make_vae(hidden=8, latent_dim=2), images, **options)
    before = vae.encoder[0].weight.clone()
    assert not train_vae(vae, images, **options).encoder[0].weight.equal(before)


def test_training_lowers_the_bound_on_images_it_has_not_seen():
    train, test = load_dataset("digits").images(), load_dataset("digits", split="test").images()
    with seeded_init(0):
        vae = VAE(8)
    train_vae(vae, train, n_levels=17, n_iterations=150, batch_size=64, lr=5e-3)
    bound = vae_bound(vae, test, n_levels=17, generator=seeded(0)).total.mean()
    assert bound < 2.9 < math.log2(17)
    assert vae.log_scale != -1, "the scale of the pixels is learned"


def test_weight_of_the_rate_changes_the_first_step_as_the_loss_says():
    """Without the rate, the last encoder layer's step follows the decoder's gradient alone; a huge weight turns it around somewhere."""
    images, options = grey(40, 17, 1, 4, 4), {"n_levels": 17, "n_iterations": 1, "batch_size": 40}
    new = lambda: make_vae(hidden=8, latent_dim=2).requires_grad_(True)
    started = new().encoder[-1].bias.detach()
    free, dear = (train_vae(new(), images, kl_weight=w, **options).encoder[-1].bias for w in (0.0, 1e6))
    vae = make_vae(hidden=8, latent_dim=2).requires_grad_(True)
    chosen, g = images, seeded(0)
    index = torch.randint(40, (40,), generator=g)
    bound = vae_bound(vae, chosen[index], n_levels=17, generator=g)
    for loss, found in ((bound.decoder, free), (bound.kl, dear)):
        (gradient,) = torch.autograd.grad(loss.mean(), vae.encoder[-1].bias, retain_graph=True)
        assert (found - started).sign().equal(-gradient.sign())  # Adam's first step


def test_aggregate_is_the_mixture_of_the_posteriors():
    vae, images = make_vae(), grey(7, 17, 1, 4, 4)
    mean, log_var = vae.encode(images)
    parts = Independent(Normal(mean, (0.5 * log_var).exp()), 1)
    z = torch.randn(600, 3, generator=seeded(8))  # more than one part of 256
    mixture = MixtureSameFamily(Categorical(torch.ones(7)), parts)
    torch.testing.assert_close(aggregate_log_prob(vae, images, z), mixture.log_prob(z))
    alone = Normal(mean[0], (0.5 * log_var[0]).exp()).log_prob(z[:2]).sum(1)
    torch.testing.assert_close(aggregate_log_prob(vae, images[:1], z[:2]), alone)


@pytest.mark.parametrize("config", [{"image_size": 8}, {"image_size": 28, "latent_dim": 16}, {"image_size": 5, "in_channels": 3}])
def test_shapes_and_rebuilding_from_the_config(config):
    vae = make_vae(**config)
    images = grey(2, 17, vae.config["in_channels"], config["image_size"], config["image_size"])
    mean, log_var = vae.encode(images)
    assert mean.shape == log_var.shape == (2, vae.config["latent_dim"])
    assert vae.decode(mean).shape == images.shape and vae.decode(100 * mean).abs().max() <= 1
    again = VAE(**vae.config)
    again.load_state_dict(vae.state_dict())
    assert again.encode(images)[0].equal(mean)


def test_bad_arguments_are_named():
    v, x = make_vae().requires_grad_(True), grey(2, 17, 1, 4, 4)
    before = {name: p.clone() for name, p in v.state_dict().items()}
    refuses(lambda: VAE(0), "image_size must be at least 1; got 0")
    refuses(lambda: VAE(4, latent_dim=2.0), "latent_dim must be a whole number; got 2.0", error=TypeError)
    refuses(lambda: v.encode(x[:, :, :3]), "x_0 must be a tensor of shape (B, 1, 4, 4); got (2, 1, 3, 4)")
    refuses(lambda: v.decode(torch.zeros(2, 4)), "z must be a tensor of shape (B, 3); got (2, 4)")
    refuses(lambda: v.decode(torch.zeros(3)), "z must be a tensor of shape (B, 3); got (3,)")
    refuses(lambda: vae_bound(v, 2 * x, n_levels=17), "x_0 must be scaled to [-1, 1]")
    refuses(lambda: vae_bound(v, x[:0], n_levels=17), "x_0 must hold at least one image")
    refuses(lambda: vae_bound(v, x, n_levels=16), "must lie on the grid of n_levels=16")
    refuses(lambda: vae_bound(v, x, n_levels=1), "n_levels must be at least 2; got 1")
    refuses(lambda: sample_vae(v, 0), "n must be at least 1; got 0")
    refuses(lambda: sample_vae(v, 1, n_levels=1), "n_levels must be at least 2; got 1")
    refuses(lambda: aggregate_log_prob(v, x, torch.zeros(2, 2)), "z must be a tensor of shape (B, 3); got (2, 2)")
    refuses(lambda: latent_rates(v, x + 1.5), "images must be scaled to [-1, 1]")
    refuses(lambda: train_vae(v, x[:, :, :3], n_levels=17), "images must be square and at least one")
    refuses(lambda: train_vae(v, x, n_levels=16), "must lie on the grid of n_levels=16")
    for name, value, allowed in [
        ("n_iterations", 0, "at least 1; got 0"),
        ("batch_size", 0, "at least 1; got 0"),
        ("lr", 0, "finite and in (0, inf); got 0"),
        ("kl_weight", -1, "finite and in [0, inf)"),
        ("seed", -1, "at least 0; got -1"),
    ]:
        refuses(lambda name=name, value=value: train_vae(v, x, n_levels=17, **{name: value}), f"{name} must be {allowed}")
    assert all(p.equal(before[name]) for name, p in v.state_dict().items())
