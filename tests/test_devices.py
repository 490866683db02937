"""Devices without a device: whatever takes tensors works where they lie, on a CUDA device that is pretended."""

import copy
import importlib
import inspect
import math
import re
from dataclasses import fields, is_dataclass
from functools import partial

import pytest
import torch
from pretend_cuda import Pretended, PretendedGenerator, pretended_cuda
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

import rules
from conftest import refuses
from ddpm_nb import bound, captions, checks, clip, conditioning, data, elbo, embeddings, evaluation, fast, forward, gan
from ddpm_nb import gaussian, hub, improved, latent, pictures, pipeline, plots, results, runs, sampling, schedules, score
from ddpm_nb import training, unet, vae
from ddpm_nb.gaussian import seeded, seeded_init

SIZE, T = 8, 12
QUIET = {"progress": False}


class Place:
    """Build what a walk needs, on one device, with generators of one device."""

    def __init__(self, device, source):
        self.device, self.source = torch.device(device), torch.device(source)
        self.schedule = schedules.make_schedule("linear", T, rescale=False).to(device)
        with seeded_init(1):
            self.net = unet.make_unet("digits", base_channels=16, norm_groups=4).to(device)
            for p in self.net.parameters():
                nn.init.normal_(p, std=0.05)
        levels = torch.randint(17, (4, 1, SIZE, SIZE), generator=seeded(2))
        self.x = data.scale_levels(levels, 17).to(device)
        self.t = torch.tensor([0, 3, 7, 11]).to(device)
        self.eps = torch.randn(self.x.shape, generator=seeded(3)).to(device)
        self.levels, self.labels = levels.to(device), torch.tensor([0, 1, 2, 1]).to(device)

    @property
    def g(self):
        """Make a generator from the same seed each time."""
        return seeded(5, self.source)

    @property
    def shape(self):
        """Give the shape of the images."""
        return tuple(self.x.shape)

    def make(self, cls, *args, **options):
        """Build a network whose weights do not depend on the device."""
        with seeded_init(4):
            network = cls(*args, **options)
            for p in network.parameters():
                nn.init.normal_(p, std=0.1) if p.ndim else None
        return network.to(self.device)

    @property
    def learned(self):
        """Build a network that also returns v."""
        return self.make(unet.make_unet, "digits", base_channels=16, norm_groups=4, out_channels=2)

    @property
    def mixture(self):
        """Build a mixture of Gaussians in the plane."""
        parts = torch.tensor([0.25, 0.75]), torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), torch.eye(2).expand(2, 2, 2)
        return gaussian.GaussianMixture(*(part.clone().to(self.device) for part in parts))

    @property
    def points(self):
        """Give points of the plane."""
        return torch.linspace(-1, 1, 8).view(4, 2).to(self.device)

    @property
    def text(self):
        """Build a tokenizer, tokens and the encoder of sentences."""
        sentences = ["a thin zero", "a bold one leaning left", "a two", "an upright one"]
        words = captions.fit_tokenizer(sentences, 6)
        encoder = self.make(clip.TextEncoder, len(words), 6, dim=16, n_layers=1)
        return words, words.encode(sentences).to(self.device), encoder

    @property
    def hearing(self):
        """Build a U-Net that hears words."""
        options = {"base_channels": 16, "norm_groups": 4}
        return self.make(conditioning.TextUNet, SIZE, 1, 16, **options)

    @property
    def autoencoder(self):
        """Build an autoencoder."""
        return self.make(latent.Autoencoder, SIZE, 1, 2, 8, 1)

    def config(self, **changes):
        """Give the settings of a short run."""
        return training.TrainConfig(2, 2, warmup=0, precision="float32", log_every=1, **changes)

    def pipeline(self, latents):
        """Build a whole text-to-image pipeline."""
        words, _, encoder = self.text
        if not latents:
            return pipeline.TextToImage(words, encoder, self.hearing, self.schedule)
        options = {"base_channels": 16, "norm_groups": 4, "attn_resolutions": (4,)}
        heard = self.make(conditioning.TextUNet, 4, 2, 16, **options)
        return pipeline.TextToImage(words, encoder, heard, self.schedule, self.autoencoder)

    def bits(self):
        """Compute the bound."""
        return bound.vlb_terms(self.net, self.schedule, self.x, n_levels=17, generator=self.g, chunk_size=8)

    def features(self, seed):
        """Draw features."""
        return torch.randn(30, 4, generator=seeded(seed)).to(self.device)

    def rows(self):
        """Give word numbers of three columns."""
        return torch.tensor([[0, 1, 2], [1, 0, 0], [2, 2, 1], [1, 1, 1]]).to(self.device)

    def digits(self):
        """Give thirty images with labels, and the rule that captions them."""
        x = data.load_digits().images()[:120].to(self.device)
        labels = data.load_digits().labels[:120].to(self.device)
        return x, labels, captions.fit_caption_rule(x, labels, with_size=True)


def weights_of(module):
    """Give the weights of a network, to be compared."""
    return dict(module.state_dict())


def train_step(p, **options):
    """Train for two iterations and return what is left."""
    result = training.fit(copy.deepcopy(p.net), p.schedule, p.x, p.config(), **QUIET, **options)
    return result.losses, weights_of(result.ema)


def flow_step(p, **options):
    """Walk the flow of chapter 14."""
    return score.flow_log_likelihood(p.net, p.schedule, p.x, n_steps=3, **options)


def gan_parts(p):
    """Build two players and their optimisers."""
    players = p.make(gan.Generator, SIZE, hidden=8), p.make(gan.Discriminator, SIZE, hidden=8)
    return players, [torch.optim.Adam(player.parameters()) for player in players]


def clip_model(p):
    """Build a small CLIP."""
    words, tokens, _ = p.text
    image = {"image_size": SIZE, "channels": 8, "dim": 16}
    text = {"n_words": len(words), "length": 6, "dim": 16, "n_layers": 1}
    return p.make(clip.make_clip, image, text, 16), words, tokens


def clip_run(p):
    """Train a small CLIP on sentences written anew."""
    model, _, _ = clip_model(p)
    words = captions.Tokenizer(tuple("abcdefgh"), 12)  # most words are unknown to it
    model.text_encoder = p.make(clip.TextEncoder, len(words), 12, dim=16, n_layers=1)
    return weights_of(clip.train_clip(model, p.x, p.rows(), words, p.config()))


def resumed(p):
    """Put a run back where another was."""
    make = lambda: training.Trainer(copy.deepcopy(p.net), p.schedule, p.config())
    first, second = make(), make()
    first.step(p.x[:2])
    runs.load_trainer_state(second, *runs.trainer_state(first))
    return second.step(p.x[2:]), weights_of(second.network)


def conditional_run(p):
    """Train a network that hears words."""
    _, tokens, encoder = p.text
    return weights_of(conditioning.train_conditional(p.hearing, p.schedule, p.x, tokens[:, None], encoder, p.config()))


def yardstick(p):
    """Build what chapter 12 measures with."""
    classifier = p.make(evaluation.DigitClassifier, SIZE)
    return results.Yardstick(p.x, 17, classifier, evaluation.classifier_features(classifier, p.x.repeat(3, 1, 1, 1)))


def loss_history(p):
    """Fill the memory of losses and draw from it."""
    history = improved.LossHistory(T, n_kept=1)
    history.update(torch.arange(T).to(p.device), torch.arange(1.0, T + 1).to(p.device))
    return history.draw(5, seeded(1))


# What is walked, with the networks, the schedule and the data on one device and the generator on the same or on another.
WALKS = {
    "gaussian.randn": lambda p: gaussian.randn((2, 3), generator=p.g, device=p.device),
    "gaussian.randn, a generator each": lambda p: gaussian.randn((2, 3), generator=[p.g, p.g], device=p.device),
    "gaussian.reparameterize": lambda p: gaussian.reparameterize(p.x, p.x.abs(), generator=p.g),
    "gaussian.gaussian_log_prob": lambda p: gaussian.gaussian_log_prob(p.points, p.mixture.means, p.mixture.covariances),
    "gaussian.normal_kl": lambda p: gaussian.normal_kl(p.x, p.eps, p.eps, p.x),
    "gaussian.log_normal_mass": lambda p: gaussian.log_normal_mass(p.x - 1, p.x + 1),
    "gaussian.discretized_gaussian_log_likelihood": lambda p: gaussian.discretized_gaussian_log_likelihood(
        p.x, p.eps, p.eps, n_levels=17
    ),
    "gaussian.GaussianMixture": lambda p: [
        p.mixture.log_prob(p.points),
        p.mixture.responsibilities(p.points),
        p.mixture.mean(),
        p.mixture.covariance(),
        p.mixture.sample(5, generator=p.g),
    ],
    "forward.schedule_coefficients": lambda p: {k: v.to(p.device) for k, v in forward.schedule_coefficients(p.schedule.betas).items()},
    "forward.NoiseSchedule": lambda p: weights_of(forward.NoiseSchedule(p.schedule.betas).to(p.device)),
    "forward.extract": lambda p: forward.extract(p.schedule.betas, p.t, 4),
    "forward.q_step": lambda p: forward.q_step(p.schedule, p.x, p.t, generator=p.g),
    "forward.q_sample": lambda p: forward.q_sample(p.schedule, p.x, p.t, generator=p.g),
    "forward.q_sample, one step": lambda p: forward.q_sample(p.schedule, p.x, 3, generator=p.g),
    "forward.q_sample, steps on the CPU": lambda p: forward.q_sample(p.schedule, p.x, p.t.cpu(), generator=p.g),
    "forward.q_mean_variance": lambda p: forward.q_mean_variance(p.schedule, p.x, p.t),
    "forward.q_posterior": lambda p: forward.q_posterior(p.schedule, p.x, p.eps, p.t),
    "forward.predict_x_0": lambda p: forward.predict_x_0(p.schedule, p.x, p.t, p.eps),
    "forward.predict_eps": lambda p: forward.predict_eps(p.schedule, p.x, p.t, p.eps),
    "elbo.diffuse_mixture": lambda p: elbo.diffuse_mixture(p.mixture, p.schedule, 3).covariances,
    "elbo.prior_divergence": lambda p: elbo.prior_divergence(p.schedule, p.x),
    "elbo.reverse_log_variance": lambda p: [elbo.reverse_log_variance(p.schedule, v) for v in elbo.VARIANCES],
    "elbo.vlb_weights": lambda p: elbo.vlb_weights(p.schedule),
    "elbo.split_output": lambda p: elbo.split_output(p.schedule, p.x, p.t, torch.cat([p.eps, p.x], 1), "learned"),
    "elbo.drop_variance": lambda p: elbo.drop_variance(p.x, torch.cat([p.eps, p.x], 1)),
    "elbo.reverse_mean_variance": lambda p: elbo.reverse_mean_variance(p.net, p.schedule, p.x, p.t),
    "elbo.decoder_log_likelihood": lambda p: [elbo.decoder_log_likelihood(p.x, p.eps, p.eps, n) for n in (17, None)],
    "elbo.objective_target": lambda p: [elbo.objective_target(p.schedule, o, p.x, p.eps, p.t, p.eps) for o in elbo.OBJECTIVES],
    "elbo.output_to_eps": lambda p: [elbo.output_to_eps(p.schedule, o, p.x, p.t, p.eps) for o in elbo.OBJECTIVES],
    "elbo.predict_noise": lambda p: [elbo.predict_noise(p.net, p.schedule, o)(p.x, p.t) for o in elbo.OBJECTIVES],
    "elbo.simple_loss": lambda p: [
        elbo.simple_loss(p.net, p.schedule, p.x, objective=o, weighting=w, generator=p.g)
        for o in elbo.OBJECTIVES
        for w in elbo.WEIGHTINGS
    ],
    "elbo.check_clean_batch": lambda p: elbo.check_clean_batch(p.x),
    "schedules.betas_from_alpha_bars": lambda p: schedules.betas_from_alpha_bars(p.schedule.alpha_bars).to(p.device),
    "bound.vlb_terms": lambda p: p.bits(),
    "bound.vlb_terms, learned, noise given": lambda p: bound.vlb_terms(
        p.learned, p.schedule, p.x, n_levels=17, variance="learned", eps=p.eps.expand(T, *p.shape)
    ),
    "bound.VLBTerms": lambda p: p.bits().total,
    "bound.optimal_denoiser": lambda p: bound.optimal_denoiser(p.mixture, p.schedule)(p.points, p.t),
    "bound.rate_distortion": lambda p: bound.rate_distortion(p.bits()),
    "embeddings.wave_frequencies": lambda p: embeddings.wave_frequencies(8, device=p.device),
    "embeddings.sinusoidal_embedding": lambda p: [embeddings.sinusoidal_embedding(p.t, 8, layout=la) for la in embeddings.LAYOUTS],
    "embeddings.TimeEmbedding": lambda p: p.make(embeddings.TimeEmbedding, 8, 8)(p.t),
    "unet.UNet": lambda p: p.net(p.x, p.t),
    "unet.UNet, transposed, heads, checkpoints": lambda p: p.make(
        unet.make_unet, "digits", base_channels=16, norm_groups=4, n_heads=2, upsampling="transposed", checkpointing=True
    )(p.x, p.t),
    "unet.unet_shapes": lambda p: [row[2:] for row in unet.unet_shapes(p.net)],
    "unet.ResNetBaseline": lambda p: p.make(unet.ResNetBaseline, 1, 4, 1)(p.x, p.t),
    "unet.join_weights": lambda p: unet.join_weights(p.make(unet.Upsample, 4).conv.weight),
    "unet.upsample_joined": lambda p: unet.upsample_joined(p.make(unet.Upsample, 1), p.x),
    "unet.attend_columns": lambda p: unet.attend_columns(p.x, p.eps, p.x),
    "unet.attend_by_products": lambda p: unet.attend_by_products(p.make(unet.SelfAttention, 1, norm_groups=1), p.x),
    "unet.attend_joined": lambda p: unet.attend_joined(p.make(unet.SelfAttention, 1, norm_groups=1), p.x),
    "data.scale_levels": lambda p: data.scale_levels(p.levels, 17),
    "data.ImageDataset": lambda p: [
        data.ImageDataset(p.levels, p.labels, n_levels=17, classes="012").images(),
        data.ImageDataset(p.levels, p.labels, n_levels=17, classes="012").resized(4).levels,
    ],
    "data.check_data": lambda p: data.check_data(p.x),
    "data.mirror": lambda p: data.mirror(p.x, p.labels > 1),
    "data.train_batches": lambda p: [
        next(data.train_batches(where, 2, flip=True, device=p.device))
        for where in (p.x, p.x.cpu(), data.ImageDataset(p.levels.cpu(), n_levels=17), [(x, 0) for x in p.x.cpu()])
    ],
    "data.batch_order": lambda p: next(data.batch_order(4, 2, device=p.device)),
    "training.fit": train_step,
    "training.fit, two parts": lambda p: weights_of(
        training.fit(copy.deepcopy(p.net), p.schedule.cpu(), p.x.cpu(), p.config(n_accumulate=2), **QUIET).ema
    ),
    "training.fit, hybrid": lambda p: training.fit(
        p.learned, p.schedule, p.x, p.config(variance="learned"), loss=partial(improved.hybrid_loss, n_levels=17), **QUIET
    ).losses,
    "training.Trainer": resumed,
    "training.EMA": lambda p: weights_of(training.EMA(p.net, 0.9).model),
    "training.descend": lambda p: [
        loss for _, loss in training.descend(copy.deepcopy(p.net), p.config(), lambda i: elbo.simple_loss(p.net, p.schedule, p.x, t=p.t, eps=p.eps))
    ],
    "sampling.ddpm_step": lambda p: sampling.ddpm_step(p.schedule, p.x, 3, p.eps, generator=p.g),
    "sampling.p_sample": lambda p: sampling.p_sample(p.net, p.schedule, p.x, torch.tensor(3).to(p.device), generator=p.g),
    "sampling.respace": lambda p: weights_of(sampling.respace(p.schedule, [0, 5, 11])),
    "sampling.walk": lambda p: sampling.walk(p.net, p.x, [3, 0], lambda x, i, eps_hat: (x - eps_hat, x)),
    "sampling.sample_ddpm": lambda p: sampling.sample_ddpm(p.net, p.schedule, p.shape, n_steps=4, generator=p.g),
    "sampling.sample_ddpm, learned": lambda p: sampling.sample_ddpm(p.learned, p.schedule, p.shape, variance="learned", generator=p.g),
    "sampling.sample_ddpm, a generator each": lambda p: sampling.sample_ddpm(p.net, p.schedule, p.shape, generator=[p.g] * 4),
    "sampling.ddim_step": lambda p: sampling.ddim_step(p.schedule, p.x, 5, 2, p.eps, eta=1.0, generator=p.g),
    "sampling.sample_ddim": lambda p: sampling.sample_ddim(p.net, p.schedule, p.shape, n_steps=4, eta=0.5, generator=p.g),
    "sampling.sample_ddim, noise on the CPU": lambda p: sampling.sample_ddim(p.net, p.schedule, p.shape, n_steps=4, x_T=p.eps.cpu()),
    "sampling.sample_dpm_solver": lambda p: sampling.sample_dpm_solver(p.net, p.schedule, p.shape, n_steps=4, generator=p.g),
    "sampling.ddim_invert": lambda p: sampling.ddim_invert(p.net, p.schedule, p.x, n_steps=4),
    "sampling.slerp": lambda p: [sampling.slerp(p.x, p.eps, share) for share in (0.5, p.labels / 4)],
    "sampling.inpaint": lambda p: sampling.inpaint(
        p.net, p.schedule, p.x, torch.arange(SIZE) < 4, n_steps=3, n_repeats=2, generator=p.g
    ),
    "evaluation.bits_per_dim": lambda p: evaluation.bits_per_dim(p.net, p.schedule, p.x, n_levels=17, generator=p.g),
    "evaluation.classifier_features": lambda p: evaluation.classifier_features(p.make(evaluation.DigitClassifier, SIZE), p.x.cpu()),
    "evaluation.DigitClassifier": lambda p: p.make(evaluation.DigitClassifier, SIZE)(p.x),
    "evaluation.train_classifier": lambda p: weights_of(
        evaluation.train_classifier(p.x, p.labels, channels=4, n_features=4, n_iterations=2, batch_size=4)
    ),
    "evaluation.classifier_report": lambda p: evaluation.classifier_report(p.make(evaluation.DigitClassifier, SIZE), p.x),
    "evaluation.frechet_distance": lambda p: evaluation.frechet_distance(p.features(1), p.features(2)),
    "evaluation.kernel_distance": lambda p: evaluation.kernel_distance(p.features(1), p.features(2).cpu()),
    "evaluation.distance_with_error": lambda p: evaluation.distance_with_error(
        evaluation.kernel_distance, p.features(1), p.features(2), generator=p.g
    ),
    "evaluation.gap_with_error": lambda p: evaluation.gap_with_error(
        evaluation.kernel_distance, p.features(1), p.features(2), p.features(3), generator=p.g
    ),
    "evaluation.nearest_neighbors": lambda p: evaluation.nearest_neighbors(p.x, p.eps),
    "results.train_variant": lambda p: results.train_variant("mu, L", copy.deepcopy(p.net), p.x, p.config(), n_steps=T)[0](p.x, p.t),
    "results.measure_bound": lambda p: results.measure_bound(p.net, p.schedule, yardstick(p), 4)[0],
    "results.measure_samples": lambda p: results.measure_samples(p.net, p.schedule, yardstick(p), 10, 3),
    "results.measure_images": lambda p: results.measure_images(p.x.repeat(3, 1, 1, 1), yardstick(p)),
    "results.paired_difference": lambda p: results.paired_difference(p.x.flatten(), p.eps.flatten()),
    "improved.optimal_variances": lambda p: improved.optimal_variances(p.mixture, p.schedule)(p.points, p.t),
    "improved.step_bits": lambda p: improved.step_bits(p.schedule, p.x, p.eps, p.t, torch.cat([p.x, p.eps], 1), n_levels=17),
    "improved.hybrid_loss": lambda p: improved.hybrid_loss(p.learned, p.schedule, p.x, n_levels=17, generator=p.g),
    "improved.respaced_model": lambda p: improved.respaced_model(p.net, [0, 3, 7, 11])(p.x, torch.arange(4).to(p.device)),
    "improved.LossHistory": loss_history,
    "improved.loss_weights": lambda p: [improved.loss_weights(p.schedule, name) for name in improved.LOSS_WEIGHTS],
    "improved.weighted_loss": lambda p: improved.weighted_loss(
        p.net, p.schedule, p.x, t=p.t, eps=p.eps, weights=improved.loss_weights(p.schedule, "min_snr")
    ),
    "improved.zero_terminal_snr": lambda p: improved.zero_terminal_snr(p.schedule).to(p.device),
    "score.score": lambda p: [score.score(p.net, p.schedule, p.x, t) for t in (3, p.t)],
    "score.langevin": lambda p: score.langevin(p.net, p.schedule, p.x, 3, n_steps=2, generator=p.g),
    "score.flow_velocity": lambda p: score.flow_velocity(p.net, p.schedule, p.x, p.t),
    "score.sample_sde": lambda p: score.sample_sde(p.net, p.schedule, p.shape, generator=p.g),
    "score.flow_log_likelihood": lambda p: [
        flow_step(p, n_probes=2, generator=p.g),
        score.flow_log_likelihood(bound.optimal_denoiser(p.mixture, p.schedule), p.schedule, p.points, n_steps=3),
    ],
    "vae.VAE": lambda p: p.make(vae.VAE, SIZE, hidden=8).encode(p.x),
    "vae.vae_bound": lambda p: vae.vae_bound(p.make(vae.VAE, SIZE, hidden=8), p.x, n_levels=17, generator=p.g),
    "vae.VAEBound": lambda p: vae.vae_bound(p.make(vae.VAE, SIZE, hidden=8), p.x, n_levels=17, generator=p.g).total,
    "vae.train_vae": lambda p: weights_of(
        vae.train_vae(p.make(vae.VAE, SIZE, hidden=8), p.x, n_levels=17, n_iterations=2, batch_size=2)
    ),
    "vae.sample_vae": lambda p: [
        vae.sample_vae(p.make(vae.VAE, SIZE, hidden=8), 2, n_levels=n, generator=p.g) for n in (None, 17)
    ],
    "vae.latent_rates": lambda p: vae.latent_rates(p.make(vae.VAE, SIZE, hidden=8), p.x),
    "vae.aggregate_log_prob": lambda p: vae.aggregate_log_prob(p.make(vae.VAE, SIZE, latent_dim=2, hidden=8), p.x, p.points),
    "gan.optimal_discriminator": lambda p: gan.optimal_discriminator(p.x, p.eps),
    "gan.generator_loss": lambda p: gan.generator_loss(p.x.flatten()),
    "gan.discriminator_loss": lambda p: gan.discriminator_loss(p.x.flatten(), p.eps.flatten()),
    "gan.Generator": lambda p: gan_parts(p)[0][0](p.x.view(-1, 16)),
    "gan.Discriminator": lambda p: gan_parts(p)[0][1](p.x),
    "gan.r1_penalty": lambda p: gan.r1_penalty(gan_parts(p)[0][1], p.x),
    "gan.gan_step": lambda p: (lambda players, moves: gan.gan_step(*players, moves, p.x, generator=p.g))(*gan_parts(p)),
    "gan.train_gan": lambda p: weights_of(gan.train_gan(*gan_parts(p)[0], p.x, n_iterations=2, batch_size=2).generator),
    "gan.sample_gan": lambda p: gan.sample_gan(gan_parts(p)[0][0], 3, generator=p.g),
    "captions.measure_strokes": lambda p: captions.measure_strokes(p.x),
    "captions.fit_caption_rule": lambda p: p.digits()[2].to_dict(),
    "captions.attributes": lambda p: (lambda x, labels, rule: captions.attributes(rule, x, labels))(*p.digits()),
    "captions.write_captions": lambda p: captions.write_captions(p.rows(), generator=p.g),
    "captions.check_attributes": lambda p: captions.check_attributes(p.rows()),
    "captions.caption_fits": lambda p: captions.caption_fits(["a bold two", "a one"], p.rows()),
    "captions.Tokenizer": lambda p: p.text[0].decode(p.text[1]),
    "clip.TextEncoder": lambda p: p.text[2](p.text[1]),
    "clip.CLIP": lambda p: (lambda model, words, tokens: (model.encode_images(p.x), model.encode_texts(tokens)))(*clip_model(p)),
    "clip.contrastive_loss": lambda p: clip.contrastive_loss(
        p.points, p.points.flip(0), torch.tensor(1.0), fits=torch.eye(4).bool()
    ),
    "clip.train_clip": clip_run,
    "clip.similarities": lambda p: (lambda model, words, _: clip.similarities(model, words, p.x.cpu(), ["a two", "a one"]))(*clip_model(p)),
    "clip.zero_shot": lambda p: (lambda model, words, _: clip.zero_shot(model, words, p.x, ["a two", "a one"]))(*clip_model(p)),
    "clip.recall_at": lambda p: clip.recall_at(p.points @ p.points.T, torch.eye(4).bool().to(p.device), 2),
    "conditioning.TextUNet": lambda p: p.hearing(p.x, p.t, p.text[2](p.text[1])),
    "conditioning.guided": lambda p: [
        conditioning.guided(p.hearing, *conditioning.encode_words(p.text[2], p.text[1]), scale)(p.x, p.t) for scale in (0, 1, 3)
    ],
    "conditioning.encode_words": lambda p: conditioning.encode_words(p.text[2], p.text[1]),
    "conditioning.drop_context": lambda p: conditioning.drop_context(
        *conditioning.encode_words(p.text[2], p.text[1]), 0.5, generator=p.g
    ),
    "conditioning.conditional_loss": lambda p: conditioning.conditional_loss(
        p.hearing, p.schedule, p.x, *conditioning.encode_words(p.text[2], p.text[1]), generator=p.g
    ),
    "conditioning.train_conditional": conditional_run,
    "conditioning.score_attributes": lambda p: (
        lambda x, labels, rule: conditioning.score_attributes(
            x, captions.attributes(rule, x, labels), p.make(evaluation.DigitClassifier, SIZE), rule
        )
    )(*p.digits()),
    "conditioning.attention_maps": lambda p: conditioning.attention_maps(p.hearing, p.x, p.t, p.text[2](p.text[1])),
    "latent.Autoencoder": lambda p: p.autoencoder.decode(p.autoencoder.encode(p.x)[0]),
    "latent.autoencoder_loss": lambda p: latent.autoencoder_loss(p.autoencoder, p.x, kl_weight=0.1, generator=p.g),
    "latent.psnr": lambda p: latent.psnr(p.x, p.eps),
    "latent.fit_latent_scale": lambda p: weights_of(latent.fit_latent_scale(p.autoencoder, p.x, generator=p.g)),
    "latent.to_latents": lambda p: latent.to_latents(p.autoencoder, p.x, generator=p.g),
    "latent.from_latents": lambda p: latent.from_latents(p.autoencoder, latent.to_latents(p.autoencoder, p.x)),
    "latent.train_autoencoder": lambda p: weights_of(latent.train_autoencoder(p.autoencoder, p.x, n_iterations=2, batch_size=2)),
    "pipeline.TextToImage": lambda p: [
        p.pipeline(False).generate("a bold one", 2, n_steps=3, eta=0.5, generator=p.g),
        p.pipeline(True).generate(["a two", "a one"], 1, n_steps=3, guidance=0, generator=p.g),
        p.pipeline(True).generate("a two", 4, n_steps=3, image=p.x.cpu(), generator=p.g),
    ],
    "runs.trainer_state": resumed,
    "runs.held_out_loss": lambda p: runs.held_out_loss(training.Trainer(p.net, p.schedule, p.config()), p.x.cpu()),
    "hub.NoisePredictor": lambda p: hub.NoisePredictor(p.net, p.schedule, "v")(p.x, p.t),
    "hub.PaddedDownsample": lambda p: p.make(hub.PaddedDownsample, 1)(p.x),
    "fast.optimize_for_sampling": lambda p: fast.optimize_for_sampling(p.net, torch.bfloat16)(p.x, p.t),
    "plots.to_pixels": lambda p: plots.to_pixels(p.x),
}

ON_THE_CPU = {  # what is handed out there: numbers to be read, indices that a loader needs, tokens, pixels
    "data.batch_order",
}
MODULES = [name for name in rules.offered().values()]


def plain(value):
    """Turn a result into numbers, tensors, lists and dictionaries."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value.values_there if isinstance(value, Pretended) else value


def tensors_in(value):
    """List the tensors of a result."""
    if is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, dict | list | tuple):
        return [x for one in (value.values() if isinstance(value, dict) else value) for x in tensors_in(one)]
    return [value] if isinstance(value, torch.Tensor) else []


def outcome(name, device, source):
    """Take one walk with the data on one device and the generator on another."""
    torch.manual_seed(0)
    with pretended_cuda():
        return WALKS[name](Place(device, source))


@pytest.mark.parametrize("name", WALKS)
def test_a_device_changes_nothing(name):
    wanted = outcome(name, "cpu", "cpu")
    found = outcome(name, "cuda", "cuda")
    left = [tuple(x.shape) for x in tensors_in(found) if not isinstance(x, Pretended)]
    print(name, "LEFT", left) if left else None
    torch.testing.assert_close(plain(found), plain(wanted), rtol=1e-4, atol=1e-5)
    if "p.g" in inspect.getsource(WALKS[name]):
        for places in (("cuda", "cpu"), ("cpu", "cuda")):
            torch.testing.assert_close(plain(outcome(name, *places)), plain(wanted), rtol=1e-4, atol=1e-5)
