"""Latent diffusion: the autoencoder's loss and padding, the scale of latents and its round trip, traps, bad input refused."""

import math

import pytest
import torch
from torch.nn import functional as F

from conftest import refuses
from ddpm_nb.data import load_images
from ddpm_nb.gaussian import randn, seeded, seeded_init
from ddpm_nb.latent import (
    Autoencoder,
    PlainBlock,
    autoencoder_loss,
    fit_latent_scale,
    from_latents,
    psnr,
    to_latents,
    train_autoencoder,
)
from ddpm_nb.results import read_results
from ddpm_nb.sampling import sample_ddim, sample_ddpm
from ddpm_nb.schedules import make_schedule
from ddpm_nb.unet import Downsample, Upsample

SMALL = {"latent_channels": 2, "base_channels": 8, "n_downs": 1}


def build(*args, seed=0, wild=False, **options):
    """Build an autoencoder with known weights; `wild` also moves the layers that begin at zero."""
    with seeded_init(seed):
        model = Autoencoder(*args, **options)
        for p in model.parameters() if wild else ():
            p.data += 0.1 * torch.randn_like(p)
    return model.eval().requires_grad_(False)


def fresh():
    """Build a small autoencoder of the digits, ready to train."""
    return build(8, **SMALL).requires_grad_(True)


@pytest.fixture(scope="module")
def trained(digits):
    return train_autoencoder(fresh(), digits, n_iterations=120, lr=5e-3)


@pytest.mark.parametrize(
    ("channels", "c", "n_downs", "side", "padding"), [(1, 4, 2, 28, 2), (3, 2, 3, 16, 0), (2, 1, 0, 5, 0), (1, 3, 1, 6, 1)]
)
def test_shapes_and_config(channels, c, n_downs, side, padding):
    model = build(side, channels, c, base_channels=4, n_downs=n_downs, padding=padding)
    x, small = torch.zeros(2, channels, side, side), (side + 2 * padding) // 2**n_downs
    assert (side + 2 * padding) % 2**n_downs == 0
    mean, log_var = model.encode(x)
    assert model.latent_shape == (c, small, small) and mean.shape == log_var.shape == (2, c, small, small)
    assert model.decode(mean).shape == x.shape
    kinds = [type(m) for m in model.modules()]
    assert kinds.count(Downsample) == kinds.count(Upsample) == n_downs
    again = Autoencoder(**model.config)
    assert again.config == model.config and again.latent_shape == model.latent_shape


def test_the_scale_is_saved_with_the_weights(trained):
    assert {"latent_mean", "latent_std"} <= set(trained.state_dict())
    again = Autoencoder(**trained.config)
    again.load_state_dict(trained.state_dict())
    assert again.latent_std.shape == (1, 2, 1, 1) and again.latent_std.equal(trained.latent_std)


def test_padding_is_background_around_the_image():
    padded, plain = (build(size, base_channels=8, padding=p, wild=True) for size, p in ((28, 2), (32, 0)))
    plain.load_state_dict(padded.state_dict())
    x = torch.rand(2, 1, 28, 28, generator=seeded(0)) * 2 - 1
    frame = F.pad(x, [2] * 4, value=-1.0)
    for ours, theirs in zip(padded.encode(x), plain.encode(frame), strict=True):
        torch.testing.assert_close(ours, theirs)
    z = randn((2, 4, 8, 8), generator=seeded(1))
    torch.testing.assert_close(padded.decode(z), plain.decode(z)[:, :, 2:-2, 2:-2])


def test_a_plain_block_begins_as_the_identity_and_can_learn():
    block, x = PlainBlock(8, 8), randn((2, 8, 4, 4), generator=seeded(0))
    assert block(x).equal(x)
    block(x).square().sum().backward()
    assert block.conv_2.weight.grad.abs().sum() > 0


def test_the_loss_is_the_negative_bound_up_to_a_constant(digits):
    x, s = digits[:8].double(), 0.2
    losses, bounds = [], []
    for seed in (0, 1):
        model = build(8, seed=seed, wild=True, **SMALL).double()
        losses.append(autoencoder_loss(model, x, kl_weight=2 * s**2, generator=seeded(3))[0])
        mean, log_var = model.encode(x)
        z = mean + (0.5 * log_var).exp() * randn(mean.shape, generator=seeded(3), dtype=torch.float64)
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum((1, 2, 3))
        error = (model.decode(z) - x).square().sum((1, 2, 3))
        bounds.append((error / (2 * s**2) + 32 * math.log(2 * math.pi * s**2) + kl).mean())
    torch.testing.assert_close((losses[0] - losses[1]) * 64 / (2 * s**2), bounds[0] - bounds[1])


def test_parts_of_the_loss_are_without_weights(digits):
    model, x = build(8, wild=True, **SMALL), digits[:8]
    loss, parts = autoencoder_loss(model, x, kl_weight=0.5, generator=seeded(0))
    torch.testing.assert_close(loss, parts["mse"] + 0.5 * parts["kl"])
    plain, fewer = autoencoder_loss(model, x, kl_weight=0.0, generator=seeded(0))
    assert plain == fewer["mse"] == parts["mse"] and set(fewer) == {"mse", "kl"} and fewer["kl"] > 0


def test_the_latents_of_the_loss_are_drawn(digits):
    model = build(8, wild=True, **SMALL)
    losses = [autoencoder_loss(model, digits[:8], kl_weight=0.0, generator=seeded(seed))[0] for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_the_gradient_survives_outside_the_range(digits):
    model = build(8, **SMALL).requires_grad_(True)
    model.decoder[-1].bias.data.fill_(5.0)  # every pixel far above 1
    autoencoder_loss(model, digits[:4], kl_weight=0.0, generator=seeded(0))[0].backward()
    assert model.decoder[-1].bias.grad.item() > 1


def test_psnr_by_hand():
    x = torch.zeros(3, 1, 4, 4)
    y = x.clone()
    y[0], y[1, 0, 0, 0] = 0.2, 0.8
    assert psnr(x, y)[0] == pytest.approx(20, abs=1e-4) and psnr(x, y)[1] == pytest.approx(20, abs=1e-4)
    assert psnr(x, y)[2] == math.inf
    unit = [(z + 1) / 2 for z in (x, y)]  # the same images in [0, 1], whose range is 1
    torch.testing.assert_close(psnr(x, y), -10 * torch.log10((unit[0] - unit[1]).square().mean((1, 2, 3))))


def test_training_restores_better_than_the_mean_image(trained, digits):
    held_out = load_images("digits", split="test")
    mean = digits.mean(0, keepdim=True).expand_as(held_out)
    assert psnr(held_out, from_latents(trained, to_latents(trained, held_out))).mean() > psnr(held_out, mean).mean() + 4
    assert not trained.training and not any(p.requires_grad for p in trained.parameters())


def test_training_repeats_itself_and_leaves_the_global_stream(digits):
    before, seen = torch.get_rng_state(), []
    options = {"n_iterations": 3, "callback": lambda i, parts: seen.append((i, set(parts)))}
    first, second, other = (train_autoencoder(fresh(), digits, seed=seed, **options) for seed in (0, 0, 1))
    assert torch.get_rng_state().equal(before)
    assert seen == [(i, {"mse", "kl"}) for i in range(3)] * 3
    weights = [torch.cat([p.flatten() for p in m.parameters()]) for m in (first, second, other)]
    assert weights[0].equal(weights[1]) and not weights[0].allclose(weights[2])


def test_a_trained_autoencoder_is_trained_on(digits):
    model = train_autoencoder(fresh(), digits, n_iterations=1)
    before = model.encoder[0].weight.clone()
    assert not train_autoencoder(model, digits, n_iterations=1).encoder[0].weight.equal(before)


def test_scaled_latents_have_mean_0_and_variance_1(trained, digits):
    z = to_latents(trained, digits).double()
    assert z.mean((0, 2, 3)).abs().max() < 1e-4 and (z.var((0, 2, 3)) - 1).abs().max() < 1e-3
    parts = torch.cat([to_latents(trained, digits[:700], batch_size=300), to_latents(trained, digits[700:], batch_size=7)])
    torch.testing.assert_close(parts, z.float(), rtol=1e-4, atol=1e-5)


def test_latents_with_a_generator_for_each_image_do_not_depend_on_the_batch_size(digits):
    model, x = build(8, wild=True, **SMALL), digits[:5]
    own = lambda: [seeded(i) for i in range(5)]
    whole, parts = (to_latents(model, x, generator=own(), batch_size=size) for size in (5, 2))
    torch.testing.assert_close(whole, parts)
    assert not torch.allclose(whole, to_latents(model, x, generator=own()[::-1]))
    for call in (to_latents, fit_latent_scale):
        refuses(lambda call=call: call(model, x, generator=own()[:2], batch_size=2), "a list of 5, one an image; got 2 of type Generator", error=TypeError)



def test_the_round_trip_is_the_autoencoder(trained, digits):
    expected = trained.decode(trained.encode(digits[:50])[0]).clamp(-1, 1)
    torch.testing.assert_close(from_latents(trained, to_latents(trained, digits[:50]), batch_size=20), expected, rtol=1e-4, atol=1e-5)
    wild = from_latents(trained, 50 * randn((4, 2, 4, 4), generator=seeded(0)))
    assert wild.min() >= -1 and wild.max() <= 1 and wild.abs().max() == 1


def test_the_scale_is_of_means_or_of_draws(digits):
    model = build(8, wild=True, **SMALL)
    model.encoder[-1].bias.data[2:] = 1.0  # a wide posterior
    mean, log_var = model.encode(digits)
    fit_latent_scale(model, digits)
    draws = to_latents(model, digits, generator=seeded(0)).var((0, 2, 3))
    expected = 1 + log_var.exp().mean((0, 2, 3)) / mean.var((0, 2, 3))
    torch.testing.assert_close(draws, expected, rtol=0.05, atol=0)
    fit_latent_scale(model, digits, generator=seeded(1))
    assert (to_latents(model, digits, generator=seeded(2)).var((0, 2, 3)) - 1).abs().max() < 0.05
    assert (to_latents(model, digits).var((0, 2, 3)) < 0.5).all()


def test_a_constant_channel_gives_no_nan(digits):
    model = build(8, **SMALL)
    for p in model.encoder[-1].parameters():
        p.data.zero_()
    fit_latent_scale(model, digits[:10])
    assert to_latents(model, digits[:10]).isfinite().all()


@pytest.mark.parametrize("std", [0.5, 1.0, 5.0])
def test_the_exact_denoiser_of_each_scale_returns_it_and_clipping_does_not(std):
    schedule, v = make_schedule("linear", 1000, dtype=torch.float64), std**2
    bars = schedule.alpha_bars
    oracle = lambda x, t: ((1 - bars).sqrt() / (bars * v + 1 - bars))[t][:, None] * x
    options = {"n_steps": 200, "generator": seeded(0)}
    drawn = sample_ddpm(oracle, schedule, (20_000, 1), clip_x_0=False, **options)
    assert drawn.std() == pytest.approx(std, rel=0.05)
    if std >= 1:
        assert sample_ddim(oracle, schedule, (20_000, 1), clip_x_0=True, **options).std() < 0.95 * std


def test_the_measured_autoencoder_of_mnist_reaches_25_decibels():
    facts = read_results("mnist_latent")
    assert facts["autoencoder"]["psnr"] >= 25 and facts["autoencoder"]["test images"] == 10_000
    assert facts["autoencoder"]["latent shape"] == [4, 8, 8]
    assert facts["cost"]["latents"]["operations of a call"] < facts["cost"]["pixels"]["operations of a call"] / 4


def test_bad_configurations_are_refused():
    for change, message in [
        ({"image_size": 10}, "image_size + 2 * padding must be divisible by 2 ** n_downs = 4; got 10 + 2 * 0 = 10"),
        ({"image_size": 28, "padding": 1}, "got 28 + 2 * 1 = 30"),
        ({"base_channels": 6}, "base_channels must be a multiple of 4; got 6"),
        ({"latent_channels": 0}, "latent_channels must be at least 1; got 0"),
        ({"in_channels": 0}, "in_channels must be at least 1; got 0"),
        ({"padding": -1}, "padding must be at least 0; got -1"),
        ({"n_downs": -1}, "n_downs must be at least 0; got -1"),
    ]:
        refuses(lambda change=change: Autoencoder(**{"image_size": 8, **change}), message)


def test_bad_tensors_are_refused(trained, digits):
    refuses(lambda: trained.encode(torch.zeros(2, 1, 28, 28)), "x must be a tensor of shape (B, 1, 8, 8); got (2, 1, 28, 28)")
    refuses(lambda: trained.decode(torch.zeros(2, 4, 4)), "z must be a tensor of shape (B, 2, 4, 4); got (2, 4, 4)")
    refuses(lambda: from_latents(trained, digits[:1]), "z must be a tensor of shape (B, 2, 4, 4); got (1, 1, 8, 8)")
    refuses(lambda: to_latents(trained, 255 * digits[:2]), "x must be scaled to [-1, 1]")
    refuses(lambda: fit_latent_scale(trained, digits[:0]), "images must hold at least one image")
    refuses(lambda: psnr(digits[:2], digits[:1]), "y must have the shape of x")


def test_bad_settings_are_refused_before_any_work(digits):
    model = fresh()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    train = lambda images=digits, **options: train_autoencoder(model, images, **options)
    for name, value in {"kl_weight": -1.0, "n_iterations": 0, "batch_size": 1501, "lr": 0.0, "seed": -1}.items():
        refuses(lambda name=name, value=value: train(**{name: value}), f"{name} must be")
    refuses(lambda: train(digits / 2 + 2), "images must be scaled to [-1, 1]")
    refuses(lambda: train(digits[:, :, :4]), "images must be square")
    assert all(p.equal(before[name]) for name, p in model.state_dict().items())
