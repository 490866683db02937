"""GAN: the game against its closed form, each player moved by its own loss alone, equal runs from equal seeds, bad input refused."""

import math

import pytest
import torch
import torch.nn.functional as F

import ddpm_nb.gan as gan
from conftest import refuses
from ddpm_nb.evaluation import classifier_report, load_classifier
from ddpm_nb.gan import (
    Discriminator,
    Generator,
    discriminator_loss,
    gan_step,
    generator_loss,
    optimal_discriminator,
    r1_penalty,
    sample_gan,
    train_gan,
)
from ddpm_nb.gaussian import seeded, seeded_init


def weights(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def players_of_digits(hidden=16, latent_dim=16):
    """Build both players for 8 x 8 images from one seed."""
    with seeded_init(0):
        return Generator(8, hidden=hidden, latent_dim=latent_dim), Discriminator(8, hidden=hidden)


def small(seed=0):
    """Build both players with an optimiser each; the generator's latent space has 4 dimensions."""
    torch.manual_seed(seed)
    players = Generator(4, latent_dim=4, hidden=16), Discriminator(4, hidden=16)
    return players, [torch.optim.Adam(player.parameters(), 1e-3) for player in players]


def test_optimal_discriminator_solves_a_discrete_game():
    """On eight points gradient ascent finds the logits, and the value of the game is that of the divergence."""
    p, q = (torch.randn(8, generator=seeded(seed)).double().softmax(0) for seed in (0, 1))
    best = optimal_discriminator(p.log(), q.log())
    logit = best.clone().requires_grad_()
    value = -(p * F.softplus(-logit) + q * F.softplus(logit)).sum()
    (slope,) = torch.autograd.grad(value, logit)
    assert slope.abs().max() < 1e-12
    found = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([found], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        search.zero_grad()
        loss = (p * F.softplus(-found) + q * F.softplus(found)).sum()
        loss.backward()
        return loss

    search.step(closure)
    assert torch.allclose(found, best, atol=1e-5)
    middle = (p + q) / 2
    divergence = 0.5 * (p * (p / middle).log()).sum() + 0.5 * (q * (q / middle).log()).sum()
    assert value.item() == pytest.approx(float(2 * divergence) - 2 * math.log(2), abs=1e-12)


def test_losses_are_those_of_a_classifier():
    real, fake = torch.randn(7, generator=seeded(0)), torch.randn(5, generator=seeded(1))
    d_loss, g_loss = discriminator_loss(real, fake), generator_loss(fake)
    by_torch = F.binary_cross_entropy_with_logits(real, torch.ones(7)) + F.binary_cross_entropy_with_logits(fake, torch.zeros(5))
    assert torch.allclose(d_loss, by_torch)
    assert torch.allclose(g_loss, F.binary_cross_entropy_with_logits(fake, torch.ones(5)))
    assert torch.allclose(generator_loss(fake, kind="minimax"), (1 - fake.sigmoid()).log().mean())


@pytest.mark.parametrize("kind", gan.GENERATOR_LOSSES)
def test_losses_stay_finite_for_a_sure_discriminator(kind):
    """The logarithm of a rounded probability would be infinite here."""
    sure = torch.tensor([-200.0, 200.0], requires_grad=True)
    losses = discriminator_loss(sure, sure), generator_loss(sure, kind=kind)
    (slope,) = torch.autograd.grad(sum(losses), sure)
    assert all(bool(x.isfinite().all()) for x in (*losses, slope))


def test_losses_are_level_at_the_equilibrium():
    blind = torch.zeros(9)
    assert [float(discriminator_loss(blind, blind)), float(generator_loss(blind))] == pytest.approx([2 * math.log(2), math.log(2)])
    assert float(generator_loss(blind, kind="minimax")) == pytest.approx(-math.log(2))


def test_r1_penalty_is_the_squared_slope_per_image():
    """For a quadratic logit the slope is 2 x; the mean is over images, not over pixels."""
    x = torch.rand(5, 2, 3, 3, generator=seeded(0)) - 0.5
    quadratic = lambda x: x.square().flatten(1).sum(1)
    assert torch.allclose(r1_penalty(quadratic, x, gamma=3.0), 0.5 * 3.0 * 4 * x.square().sum() / 5)
    assert r1_penalty(lambda x: 0 * x.flatten(1).sum(1) + 7.0, x) == 0


def test_r1_penalty_reaches_the_weights_and_not_the_images():
    judge = small()[0][1]
    x = (torch.rand(3, 1, 4, 4, generator=seeded(0)) - 0.5).requires_grad_()
    r1_penalty(judge, x).backward()
    assert x.grad is None
    assert judge.layers[0].weight.grad.abs().max() > 0


def test_networks_have_the_shapes_of_their_settings():
    torch.manual_seed(0)
    make, judge = Generator(6, in_channels=3, latent_dim=5, hidden=8), Discriminator(6, in_channels=3, hidden=8)
    images = make(1e3 * torch.randn(4, 5, generator=seeded(0)))
    assert images.shape == (4, 3, 6, 6) and images.abs().max() <= 1
    assert judge(images).shape == (4,)
    again = Generator(**make.config), Discriminator(**judge.config)
    assert again[0].config == make.config and again[1].config == judge.config
    again[0].load_state_dict(make.state_dict())
    noise = torch.randn(2, 5, generator=seeded(1))
    assert torch.equal(again[0](noise), make(noise))


def test_each_step_moves_its_own_player():
    """A rate of zero for one player freezes it; the other one moves. A detached generator would not move at all."""
    images = torch.rand(20, 1, 4, 4, generator=seeded(0)) * 2 - 1
    settings = {"gamma": 1.0}
    for still, moving in ((0, 1), (1, 0)):
        players, moves = small()
        moves[still].param_groups[0]["lr"] = 0.0
        before = [weights(player) for player in players]
        gan_step(*players, moves, images[:8], generator=seeded(1), **settings)
        assert torch.equal(weights(players[still]), before[still])
        assert not torch.equal(weights(players[moving]), before[moving])


def test_the_discriminator_forgets_the_slopes_of_the_generators_steps():
    """The generator's loss leaves gradients in the discriminator, which its own step must clear."""
    images = torch.rand(20, 1, 4, 4, generator=seeded(0)) * 2 - 1
    settings = {"gamma": 0.0}
    after = []
    for dirt in (None, 1e3):
        players, moves = small()
        for p in players[1].parameters():
            p.grad = None if dirt is None else torch.full_like(p, dirt)
        gan_step(*players, moves, images[:8], generator=seeded(1), **settings)
        after.append(weights(players[1]))
    assert torch.equal(*after)


def test_a_step_raises_the_generators_chances():
    """With the discriminator frozen, the generator's loss falls: its gradient points the right way."""
    images = torch.rand(20, 1, 4, 4, generator=seeded(0)) * 2 - 1
    noise = torch.randn(256, 4, generator=seeded(2))
    for kind in gan.GENERATOR_LOSSES:
        players, moves = small()
        moves[1].param_groups[0]["lr"] = 0.0
        before = players[1](players[0](noise)).mean()
        settings = {"gamma": 0.0, "kind": kind, "generator_steps": 30}
        gan_step(*players, moves, images[:8], generator=seeded(1), **settings)
        assert players[1](players[0](noise)).mean() > before


def test_training_repeats_itself_and_leaves_no_trace(digits):
    options = {"n_iterations": 3, "batch_size": 8}
    torch.manual_seed(5)
    untouched = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = (train_gan(*players_of_digits(), digits, seed=seed, **options) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), untouched), "torch's own random stream must not move"
    assert torch.equal(weights(first.generator), weights(second.generator)) and torch.equal(first.losses, second.losses)
    assert not torch.equal(first.losses, other.losses)


def test_training_returns_frozen_networks_and_a_history(digits):
    seen = []
    note = lambda i, model: seen.append((i, weights(model)))
    result = train_gan(*players_of_digits(latent_dim=3), digits, n_iterations=4, callback=note)
    assert [i for i, _ in seen] == [1, 2, 3, 4]
    assert result.losses.shape == (4, 2) and not result.losses.requires_grad
    for model in (result.generator, result.discriminator):
        assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert result.generator.config["latent_dim"] == 3
    assert not torch.equal(weights(result.generator), seen[-1][1]), "the result is averaged, the callback's generator is not"
    plain = train_gan(*players_of_digits(latent_dim=3), digits, n_iterations=4, ema_decay=0.0)
    assert torch.allclose(weights(plain.generator), seen[-1][1])


def test_the_callers_players_can_learn_again(digits):
    players = players_of_digits()
    first = train_gan(*players, digits, n_iterations=2)
    before = [weights(player) for player in (*players, first.discriminator)]
    train_gan(*players, digits, n_iterations=2)
    changed = [not torch.equal(weights(player), old) for player, old in zip((*players, first.discriminator), before, strict=True)]
    assert changed == [True, True, False]  # both players; not what the first training returned


def test_what_a_training_returned_can_learn_again(digits):
    first = train_gan(*players_of_digits(), digits, n_iterations=1)
    players = (first.generator, first.discriminator)
    before = [weights(player) for player in players]
    train_gan(*players, digits, n_iterations=1)
    assert not any(torch.equal(weights(player), old) for player, old in zip(players, before, strict=True))


def test_training_shows_progress(digits, monkeypatch):
    asked = []

    def note(items, text, shown, **options):
        asked.append((len(items), shown))
        return items

    monkeypatch.setattr(gan, "show_progress", note)
    shown, silent = (train_gan(*players_of_digits(), digits, n_iterations=3, batch_size=8, **o) for o in ({}, {"progress": False}))
    assert asked == [(3, True), (3, False)] and torch.equal(shown.losses, silent.losses)


def test_training_needs_no_square_of_a_power_of_two():
    images = torch.rand(9, 3, 5, 5, generator=seeded(0)) * 2 - 1
    players = Generator(5, in_channels=3, hidden=8), Discriminator(5, in_channels=3, hidden=8)
    result = train_gan(*players, images, n_iterations=1, batch_size=4)
    assert sample_gan(result.generator, 2, generator=seeded(0)).shape == (2, 3, 5, 5)


def test_samples_follow_the_generator_of_random_numbers():
    make = small()[0][0]
    a, b, c = (sample_gan(make, 5, generator=seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and not a.requires_grad


def test_a_slow_discriminator_lets_the_generator_collapse(digits):
    """The same number of steps of the discriminator: one image for all noise, and losses as if the game were won."""
    balanced = train_gan(*players_of_digits(hidden=256), digits, n_iterations=200)
    slow = train_gan(*players_of_digits(hidden=256), digits, n_iterations=200, generator_steps=10)
    fair, poor = (sample_gan(result.generator, 200, generator=seeded(1)) for result in (balanced, slow))
    assert poor.std(0).mean() < 0.5 * fair.std(0).mean()
    assert classifier_report(load_classifier("digits"), poor).imbalance > 0.5
    assert abs(float(slow.losses[-50:, 0].mean()) - 2 * math.log(2)) < 0.1
    assert abs(float(slow.losses[-50:, 1].mean()) - math.log(2)) < 0.1


def test_bad_arguments_are_refused(digits):
    make, judge = small()[0]
    logits, players = torch.zeros(3), players_of_digits()
    before = [weights(player) for player in players]
    train = lambda images=digits, **options: train_gan(*players, images, **options)
    whole = torch.zeros(2, dtype=torch.int64)
    refuses(lambda: optimal_discriminator(logits, torch.zeros(2)), "log_q must have the shape of log_p")
    refuses(lambda: optimal_discriminator(whole, logits[:2]), "log_p must have a floating-point dtype", error=TypeError)
    refuses(lambda: generator_loss(logits, kind="hinge"), "kind must be one of 'non-saturating', 'minimax'; got 'hinge'")
    refuses(lambda: discriminator_loss(logits.view(3, 1), logits), "real must have shape (B,)", "got (3, 1)")
    refuses(lambda: discriminator_loss(logits, torch.zeros(0)), "fake must have shape (B,) with B at least 1")
    refuses(lambda: discriminator_loss(logits / 0, logits), "real must be finite")
    refuses(lambda: r1_penalty(judge, torch.zeros(1, 1, 4, 4), gamma=-1.0), "gamma must be finite and in")
    still = {"gamma": 0.0, "kind": "minimax", "generator_steps": 0}
    refuses(lambda: gan_step(*players, (None, None), digits[:8], generator=seeded(1), **still), "generator_steps must be at least 1")
    refuses(lambda: Generator(0), "image_size must be at least 1; got 0")
    refuses(lambda: Discriminator(4, hidden=0), "hidden must be at least 1")
    refuses(lambda: make(torch.zeros(2, 5)), "z must be a tensor of shape (B, 4); got (2, 5)")
    refuses(lambda: judge(torch.zeros(2, 1, 4, 5)), "x must be a tensor of shape (B, 1, 4, 4); got (2, 1, 4, 5)")
    refuses(lambda: sample_gan(make, 0), "n must be at least 1")
    refuses(lambda: train(digits[:, :, :4]), "images must be square")
    refuses(lambda: train(digits[:0]), "images must be square and at least one")
    refuses(lambda: train(2 * digits), "images must be scaled to [-1, 1]")
    refuses(lambda: train(lr=0.0), "lr must be finite and in")
    refuses(lambda: train(gamma=-0.5), "gamma must be finite and in")
    refuses(lambda: train(ema_decay=1.0), "ema_decay must be finite and in")
    refuses(lambda: train(seed=-1), "seed must be at least 0")
    refuses(lambda: train(kind="wasserstein"), "kind must be one of")
    refuses(lambda: train(n_iterations=2.5), "n_iterations must be a whole number", error=TypeError)
    for name in ("n_iterations", "generator_steps", "batch_size"):
        refuses(lambda name=name: train(**{name: 0}), f"{name} must be at least 1")
    assert all(torch.equal(weights(player), kept) for player, kept in zip(players, before, strict=True))
