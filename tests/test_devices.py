"""Devices without a device: whatever takes tensors works where they lie, on a CUDA device that is pretended."""

import copy
import inspect
import re
import sys
import tempfile
from dataclasses import fields, is_dataclass, replace
from functools import cached_property, partial

import matplotlib.pyplot as plt
import numpy as np
import pytest
import rules
import torch
from pretend_cuda import Pretended, pretended_cuda
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from conftest import refuses
from ddpm_nb import (
    bound,
    captions,
    checks,
    clip,
    conditioning,
    convert,
    data,
    elbo,
    embeddings,
    evaluation,
    fast,
    files,
    flows,
    forward,
    gan,
    gaussian,
    hub,
    improved,
    latent,
    pipeline,
    plots,
    processes,
    results,
    runs,
    sampling,
    schedules,
    scores,
    texts,
    training,
    unet,
    vae,
)
from ddpm_nb.gaussian import seeded, seeded_init

SIZE, T = 8, 12
QUIET = {"progress": False}


class Timed(nn.Module):
    """Ask a network of steps at times in [0, 1]."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t):
        """Return the output at the nearest step."""
        return self.net(x, (t * (T - 1)).round().long())


class Place:
    """Build what a walk needs, on one device, with generators of one device."""

    def __init__(self, device, source):
        self.device, self.source, self.draws = torch.device(device), torch.device(source), False
        self.schedule = schedules.make_schedule("linear", T, rescale=False).to(device)
        levels = torch.randint(17, (4, 1, SIZE, SIZE), generator=seeded(2))
        self.x = data.scale_levels(levels, 17).to(device)
        self.t = torch.tensor([0, 3, 7, 11]).to(device)
        self.eps = torch.randn(self.x.shape, generator=seeded(3)).to(device)
        self.levels, self.labels = levels.to(device), torch.tensor([0, 1, 2, 1]).to(device)

    @cached_property
    def net(self):
        """Build a small U-Net."""
        return self.make(unet.make_unet, "digits", base_channels=8, norm_groups=2)

    def network_for(self, name):
        """Build the network that a function takes."""
        return self.learned if name == "hybrid_loss" else self.net

    @property
    def g(self):
        """Make a generator from the same seed each time."""
        self.draws = True
        return seeded(5, self.source)

    @property
    def shape(self):
        """Give the shape of the images."""
        return tuple(self.x.shape)

    def make(self, cls, *args, **options):
        """Build a network whose weights do not depend on the device."""
        is_fake = isinstance(self.x, FakeTensor)
        with seeded_init(4), torch.device(self.device if is_fake else "cpu"):  # fake weights are not moved
            network = cls(*args, **options)
            for p in network.parameters():
                nn.init.normal_(p, std=0.1) if p.ndim else None
        return network if is_fake else network.to(self.device)

    @property
    def learned(self):
        """Build a network that also returns v."""
        return self.make(unet.make_unet, "digits", base_channels=8, norm_groups=2, out_channels=2)

    @property
    def timed(self):
        """Build a velocity that is asked at times in [0, 1]."""
        return Timed(self.net)

    @property
    def velocity(self):
        """Build a velocity that does not tell where its weights are."""
        return flows.velocity_from_eps(self.net, self.schedule)

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
        options = {"base_channels": 8, "norm_groups": 2}
        return self.make(conditioning.TextUNet, SIZE, 1, 16, **options)

    @property
    def classy(self):
        """Build a U-Net that is told a class."""
        return self.make(conditioning.ClassUNet, 3, SIZE, 1, base_channels=8, norm_groups=2)

    @property
    def scenes(self):
        """Give scenes of two shapes."""
        return texts.all_scenes()[[0, 200, 401, 539]].to(self.device)

    @property
    def drawing(self):
        """Draw these scenes on the CPU, and bring the pictures to the device."""
        return texts.draw_shapes(4, scenes=self.scenes.cpu(), image_size=16, generator=seeded(6)).images.to(self.device)

    @property
    def own(self):
        """Build a pipeline whose tokenizer cuts words."""
        pieces = texts.fit_pieces(["a red square", "a blue circle"] * 2)
        encoder = self.make(clip.TextEncoder, len(pieces), pieces.length, dim=16, n_layers=1)
        return pipeline.TextToImage(pieces, encoder, self.hearing, self.schedule)

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
        options = {"base_channels": 8, "norm_groups": 2, "attn_resolutions": (4,)}
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
    return scores.flow_log_likelihood(p.net, p.schedule, p.x, n_steps=3, **options)


def sigmas(p):
    """Give noise levels that are times, too."""
    return torch.tensor([1.0, 0.5, 0.0]).to(p.device)


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
    losses = []
    clip.train_clip(model, p.x, p.rows(), words, p.config(), callback=lambda *told: losses.append(told[2]))
    return losses


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
    losses, note = [], lambda i, loss, average: losses.append(loss)
    conditioning.train_conditional(p.hearing, p.schedule, p.x, tokens[:, None], encoder, p.config(), callback=note)
    return losses


def yardstick(p):
    """Build what chapter 12 measures with."""
    classifier = p.make(evaluation.DigitClassifier, SIZE)
    return results.Yardstick(p.x, 17, classifier, evaluation.classifier_features(classifier, p.x.repeat(3, 1, 1, 1)))


def loss_history(p):
    """Fill the memory of losses and draw from it."""
    history = improved.LossHistory(T, n_kept=1)
    history.update(torch.arange(T).to(p.device), torch.arange(1.0, T + 1).to(p.device))
    return history.draw(5, p.g)


def own_run(p, x, n_downs=1, tokenizer=None):
    """Train a text-to-image model in two or three stages."""
    stage = replace(p.config(), batch_size=4)
    config = {"dim": 16, "n_downs": n_downs, "autoencoder_channels": 4, "unet_channels": 8, "attn_resolutions": (4,), "n_steps": T}
    config = texts.TextConfig(**config, clip=stage, autoencoder=stage, unet=stage)
    captions = texts.describe_scenes(p.scenes)
    with tempfile.TemporaryDirectory() as folder:
        options = {"prompts": captions[:1], "device": p.device, "progress": False, "tokenizer": tokenizer}
        made = texts.train_text((x, captions), f"{folder}/run", config, **options)
    assert {made.device.type} == {w.device.type for w in made.unet.parameters()} == {p.device.type}
    parts = (made.text_encoder, made.unet, made.autoencoder)
    return [weights_of(part) for part in parts if part is not None]


def whole_run(p):
    """Train in a folder with checkpoints, and go on from there."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"out": f"{folder}/run", "held_out": p.x, **QUIET}
        runs.train(copy.deepcopy(p.net), p.schedule, p.x, p.config(), **options)
        longer = replace(p.config(), n_iterations=3)
        again = runs.train(copy.deepcopy(p.net), p.schedule, p.x, longer, resume=True, **options)
    return again.losses, weights_of(again.ema)


def checkpoint(p):
    """Write a checkpoint and read it."""
    with tempfile.TemporaryDirectory() as folder:
        runs.save_checkpoint(folder, {"x": p.x, "t": p.t}, {"step": 1, "score": 0.5})
        return runs.load_checkpoint(folder)[0]


def read_back(p, **options):
    """Write a network to the disk and load it where it was."""
    with tempfile.TemporaryDirectory() as folder:
        hub.save_pretrained(f"{folder}/mine", p.net, p.schedule, **options)
        network, schedule = hub.load_pretrained(f"{folder}/mine", device=p.device)
    return network(p.x, p.t), weights_of(schedule)


def sealed(p):
    """Write tensors to the disk, as a checkpoint does, and read them."""
    with tempfile.TemporaryDirectory() as folder:
        paths = f"{folder}/facts.json", f"{folder}/weights.safetensors"
        files.write_sealed(*paths, {"n": 1}, {"x": p.x, "t": p.t})
        read = files.read_sealed(*paths)[1]
        return read["x"], read["t"]  # the order within a file may be another each time


def parts_on_disk(p):
    """Write parts to the disk and load them where they were."""
    with tempfile.TemporaryDirectory() as folder:
        files.save_parts(f"{folder}/mine", {"unet": p.net}, tensors={"x": p.x}, card={"data": "none"})
        parts, tensors, _ = files.load_parts(f"{folder}/mine", [unet.UNet], extra=["x"], device=p.device)
    return parts["unet"](p.x, p.t), tensors


def through_diffusers(p):
    """Convert a network to the other library, where it lies, and back."""
    theirs, scheduler = convert.unet_to_diffusers(p.net, p.schedule)
    ours, _ = convert.unet_from_diffusers(theirs, scheduler=scheduler)
    return weights_of(theirs), ours(p.x, p.t)


def drawn(axes):
    """Give the picture that was drawn on axes."""
    plt.close("all")
    return axes.images[0].get_array().data


# What is walked, with the networks, the schedule and the data on one device and the generator on the same or on another.
WALKS = {
    "gaussian.randn": lambda p: gaussian.randn((2, 3), generator=p.g, device=p.device),
    "gaussian.randn, a generator each": lambda p: gaussian.randn((2, 3), generator=[p.g, p.g], device=p.device),
    "gaussian.reparameterize": lambda p: gaussian.reparameterize(p.x, p.x.abs(), generator=p.g),
    "gaussian.draw_categories": lambda p: gaussian.draw_categories(p.mixture.weights, 5, p.g),
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
    "forward.extract_all": lambda p: forward.extract_all(p.schedule, p.x, p.t, "alphas", "betas"),
    "forward.q_step": lambda p: forward.q_step(p.schedule, p.x, p.t, generator=p.g),
    "forward.q_sample": lambda p: forward.q_sample(p.schedule, p.x, p.t, generator=p.g),
    "forward.q_sample, one step": lambda p: forward.q_sample(p.schedule, p.x, 3, generator=p.g),
    "forward.q_sample, steps on the CPU": lambda p: forward.q_sample(p.schedule, p.x, p.t.cpu(), generator=p.g),
    "forward.q_mean_variance": lambda p: forward.q_mean_variance(p.schedule, p.x, p.t),
    "forward.q_posterior": lambda p: forward.q_posterior(p.schedule, p.x, p.eps, p.t),
    "forward.predict_x_0": lambda p: forward.predict_x_0(p.schedule, p.x, p.t, p.eps),
    "forward.predict_eps": lambda p: forward.predict_eps(p.schedule, p.x, p.t, p.eps),
    "elbo.normal_log_prob": lambda p: elbo.normal_log_prob(p.x, p.eps, p.x.square() + 1),
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
    "elbo.draw_timesteps": lambda p: elbo.draw_timesteps(T, p.x, p.g),
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
        unet.make_unet, "digits", base_channels=8, norm_groups=2, n_heads=2, upsampling="transposed", checkpointing=True
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
    "data.check_labels": lambda p: [
        data.check_labels(data.ImageDataset(p.levels, p.labels, n_levels=17, classes="012"), 3),
        data.check_labels(list(zip(p.x, p.labels, strict=True)), 3),
    ],
    "data.mirror": lambda p: data.mirror(p.x, p.labels > 1),
    "data.stream_batches": lambda p: [
        next(data.stream_batches(where, 2, {"seed": 0, "start": 0, "flip": True, "rank": 0, "n_processes": 1}, p.device))
        for where in (p.x, p.x.cpu())
    ],
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
    "training.fit, classes": lambda p: training.fit(
        p.classy, p.schedule, data.ImageDataset(p.levels, p.labels, n_levels=17, classes="012"), p.config(conditional="class"), **QUIET
    ).losses,
    "training.recent_loss": lambda p: training.recent_loss(p.x.flatten(), p.config()),
    "training.EMA": lambda p: weights_of(training.EMA(p.net, 0.9).model),
    "training.descend": lambda p: [
        loss for _, loss in training.descend(copy.deepcopy(p.net), p.config(), lambda i: elbo.simple_loss(p.net, p.schedule, p.x, t=p.t, eps=p.eps))
    ],
    "sampling.ddpm_step": lambda p: sampling.ddpm_step(p.schedule, p.x, 3, p.eps, generator=p.g),
    "sampling.p_sample": lambda p: sampling.p_sample(p.net, p.schedule, p.x, torch.tensor(3).to(p.device), generator=p.g),
    "sampling.respace": lambda p: weights_of(sampling.respace(p.schedule, [0, 5, 11])),
    "sampling.start_noise": lambda p: [
        sampling.start_noise(p.x, p.shape, generator=p.g),
        sampling.start_noise(p.x, p.shape, p.eps.cpu()),
    ],
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
    "evaluation.mean_with_error": lambda p: evaluation.mean_with_error(p.x.flatten()),
    "evaluation.gap_with_error": lambda p: evaluation.gap_with_error(
        evaluation.kernel_distance, p.features(1), p.features(2), p.features(3), generator=p.g
    ),
    "evaluation.nearest_neighbors": lambda p: evaluation.nearest_neighbors(p.x, p.eps),
    "evaluation.nearest_neighbors, images on the CPU": lambda p: evaluation.nearest_neighbors(p.x, p.eps.cpu()),
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
    "scores.score": lambda p: [scores.score(p.net, p.schedule, p.x, t) for t in (3, p.t)],
    "scores.langevin": lambda p: scores.langevin(p.net, p.schedule, p.x, 3, n_steps=2, generator=p.g),
    "scores.flow_velocity": lambda p: scores.flow_velocity(p.net, p.schedule, p.x, p.t),
    "scores.sample_sde": lambda p: scores.sample_sde(p.net, p.schedule, p.shape, generator=p.g),
    "scores.flow_log_likelihood": lambda p: [
        flow_step(p, n_probes=2, generator=p.g),
        scores.flow_log_likelihood(bound.optimal_denoiser(p.mixture, p.schedule), p.schedule, p.points, n_steps=3),
    ],
    "flows.flow_matching_loss": lambda p: flows.flow_matching_loss(p.timed, p.x, generator=p.g),
    "flows.flow_matching_loss, other times": lambda p: flows.flow_matching_loss(
        p.timed, p.x, t=flows.logit_normal_times(4, generator=p.g), eps=p.eps
    ),
    "flows.flow_times": lambda p: flows.flow_times(p.schedule),
    "flows.velocity_from_eps": lambda p: p.velocity(p.x, torch.tensor([0.1, 0.4, 0.7, 1.0])),
    "flows.velocity_from_eps, schedule on the CPU": lambda p: flows.velocity_from_eps(p.net, p.schedule.cpu())(p.x, 0.5),
    "flows.eps_from_velocity": lambda p: flows.eps_from_velocity(p.timed, p.schedule)(p.x, p.t),
    "flows.sample_flow": lambda p: [
        flows.sample_flow(p.timed, p.shape, n_steps=2, method=method, generator=p.g) for method in ("heun", "euler")
    ],
    "flows.sample_flow, a generator each": lambda p: flows.sample_flow(p.timed, p.shape, n_steps=1, generator=[p.g] * 4),
    "flows.sample_flow, device told": lambda p: flows.sample_flow(
        p.velocity, p.shape, n_steps=2, generator=p.g, device=p.device
    ),
    "flows.sample_flow, noise given": lambda p: [
        flows.sample_flow(p.velocity, p.shape, n_steps=2, x_T=p.eps),
        flows.sample_flow(p.velocity, p.shape, n_steps=2, x_T=p.eps.cpu(), device=p.device),
        flows.sample_flow(p.timed, p.shape, n_steps=2, x_T=p.eps.cpu()),
    ],
    "flows.logit_normal_times": lambda p: flows.logit_normal_times(3, generator=p.g),
    "flows.straightness": lambda p: flows.straightness(p.timed, p.x, n_steps=3),
    "flows.edm_denoiser": lambda p: flows.edm_denoiser(p.net, p.schedule)(p.x, torch.tensor([0.1, 1.0, 3.0, 9.0])),
    "flows.edm_preconditioning": lambda p: flows.edm_preconditioning(p.x.abs() + 1),
    "flows.sample_heun": lambda p: flows.sample_heun(p.timed, p.shape, n_steps=2, sigmas=sigmas(p), generator=p.g),
    "flows.sample_heun, device told": lambda p: flows.sample_heun(
        flows.edm_denoiser(p.net, p.schedule), p.shape, n_steps=2, generator=p.g, device=p.device
    ),
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
    "captions.check_tokens": lambda p: captions.check_tokens(p.text[1], len(p.text[0])),
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
    "conditioning.ClassUNet": lambda p: [p.classy(p.x, p.t, p.labels), p.classy(p.x, p.t)],
    "conditioning.of_class": lambda p: [
        conditioning.of_class(p.classy, labels, scale)(p.x, p.t)
        for labels in (2, p.labels, p.labels.cpu())
        for scale in (0, 1, 3)
    ],
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
    "pipeline.TextToImage, interpolation": lambda p: p.pipeline(True).interpolate("a two", "a one", 3, n_steps=3, generator=p.g),
    "texts.turn_round": lambda p: texts.turn_round(p.scenes),
    "texts.describe_scenes": lambda p: texts.describe_scenes(p.scenes),
    "texts.shape_cover": lambda p: texts.shape_cover(p.scenes[:, 1], p.points + 8, p.points[:, 0].abs() + 20, 16),
    "texts.draw_shapes": lambda p: texts.draw_shapes(3, scenes=p.scenes, image_size=16, generator=p.g),
    "texts.draw_shapes, all scenes": lambda p: texts.draw_shapes(3, image_size=16, generator=p.g),
    "texts.colour_masks": lambda p: texts.colour_masks(p.drawing),
    "texts.read_shapes": lambda p: texts.read_shapes(p.drawing),
    "texts.score_shapes": lambda p: [texts.score_shapes(p.drawing, wanted) for wanted in (p.scenes, p.scenes.cpu())],
    "texts.PieceTokenizer": lambda p: p.own.tokenizer.decode(p.own.tokenizer.encode(["a red circle"]).to(p.device)),
    "texts.Pairs": lambda p: (
        lambda pairs: [pairs.images(p.labels), pairs.captions(p.labels, seeded(1, p.device)), pairs.to_bytes()]
    )(texts.Pairs(p.levels.byte(), p.rows().unsqueeze(-1))),
    "texts.TextDenoiser": lambda p: texts.TextDenoiser(p.hearing, p.text[2])(p.x, p.t, p.text[1]),
    "texts.train_text": lambda p: own_run(p, p.drawing),
    "texts.train_text, pictures on the CPU": lambda p: own_run(p, p.drawing.cpu()),
    "texts.train_text, pixels, words given": lambda p: own_run(
        p, p.drawing, 0, captions.fit_tokenizer(texts.describe_scenes(texts.all_scenes()), 10)
    ),
    "texts.word_maps": lambda p: texts.word_maps(p.own, ["a red circle", "a blue square"], n_steps=4, side=None, generator=p.g),
    "texts.map_scores": lambda p: [
        texts.map_scores(p.x[:, 0], p.eps[:, 0] > 0),
        texts.map_scores(p.x[:, 0].cpu(), p.eps[:, 0] > 0),
        texts.map_scores(p.x[:, 0].cpu(), p.eps[:, 0].cpu() > 0, p.eps[:, 0] < -1),
    ],
    "texts.exchange_words": lambda p: texts.exchange_words(p.own, "a red circle", "a blue square", [1, 2], n_steps=4),
    "runs.trainer_state": resumed,
    "runs.held_out_loss": lambda p: runs.held_out_loss(training.Trainer(p.net, p.schedule, p.config()), p.x.cpu()),
    "hub.NoisePredictor": lambda p: hub.NoisePredictor(p.net, p.schedule, "v")(p.x, p.t),
    "hub.PaddedDownsample": lambda p: p.make(hub.PaddedDownsample, 1)(p.x),
    "fast.optimize_for_sampling": lambda p: fast.optimize_for_sampling(p.net, torch.bfloat16)(p.x, p.t),
    "hub.ScaleShiftBlock": lambda p: p.make(hub.ScaleShiftBlock, 1, 4, 8, norm_groups=1)(p.x, p.points.repeat(1, 4)),
    "hub.PeerUNet": lambda p: p.make(
        hub.PeerUNet, SIZE, 1, 1, (8, 8), 16, (False, True), (True, False), n_res_blocks=1, norm_groups=4, mid_norm_groups=4
    )(p.x, p.t),
    "hub.load_pretrained": read_back,
    "files.write_sealed": sealed,
    "files.load_parts": parts_on_disk,
    "files.build_parts": lambda p: weights_of(
        files.build_parts({"line": {"class": "VAE", "config": {"image_size": SIZE, "hidden": 8}}}, [vae.VAE], {
            f"line.{name}": tensor for name, tensor in weights_of(p.make(vae.VAE, SIZE, hidden=8)).items()
        })["line"]
    ),
    "convert.unet_to_diffusers": through_diffusers,
    "runs.save_checkpoint": checkpoint,
    "runs.train": whole_run,
    "runs.same_betas": lambda p: runs.same_betas(p.schedule.exact_betas, p.schedule.exact_betas),
    "runs.schedule_name": lambda p: runs.schedule_name(p.schedule),
    "runs.describe_data": lambda p: runs.describe_data(p.x),
    "processes.Processes": lambda p: (
        lambda n: [weights_of(n.wrap(p.net)), n.share(p.x), n.mean(p.x), n.gather(p.x)]
    )(processes.Processes(p.device)),
    "plots.to_pixels": lambda p: plots.to_pixels(p.x),
    "plots.tile": lambda p: plots.tile(p.x, 2),
    "plots.show_images": lambda p: drawn(plots.show_images(p.x, n_cols=2)),
    "plots.plot_curves": lambda p: [line.get_ydata() for line in plots.plot_curves(p.t, {"x": p.points[:, 0]}).lines],
    "plots.frame_sheet": lambda p: plots.frame_sheet([[p.x, p.x]], 2),
    "plots.image_slider": lambda p: plots.image_slider([p.x, p.x], ["0", "1"], alt="noise").data,
    "checks.check_floating": lambda p: checks.check_floating("x", p.x),
    "checks.check_same_shape": lambda p: checks.check_same_shape("x", p.x, "eps", p.eps),
    "checks.check_timesteps": lambda p: [checks.check_timesteps(t, T, 4) for t in (p.t, p.t[1])],
    "checks.check_range": lambda p: checks.check_range("x", p.x),
    "checks.check_images": lambda p: checks.check_images("x", p.x),
    "checks.call_model": lambda p: checks.call_model(p.net, p.x, p.t),
    "checks.call_same_shape": lambda p: checks.call_same_shape(p.net, p.x, p.t),
    "checks.check_numbers": lambda p: [checks.check_numbers("share", v, p.x) for v in (0.5, p.t, p.t.cpu())],
    "checks.check_kept": lambda p: checks.check_kept(p.t, T - 1),
    "checks.check_taken": lambda p: checks.check_taken(p.net, p.shape[1:], p.x.dtype),
    "checks.check_told": lambda p: checks.check_told(p.classy, "class"),
    "checks.check_trainable": lambda p: checks.check_trainable(p.net, p.schedule),
    "checks.check_batch": lambda p: checks.check_batch("x", p.x, p.shape[1:]),
    "checks.check_square_images": lambda p: checks.check_square_images("x", p.x),
    "checks.check_each": lambda p: checks.check_each("x", p.x[:1], p.shape[1:], 3),
    "checks.check_mask": lambda p: checks.check_mask("mask", p.x > 0),
    "checks.check_levels": lambda p: checks.check_levels(p.levels, p.labels, 17, 3),
    "checks.check_alike": lambda p: checks.check_alike(1, p.x[1], 0, p.x[0]),
    "checks.check_class": lambda p: checks.check_class(0, p.labels[0], 3),
    "checks.check_classes": lambda p: [checks.check_classes("labels", p.labels, len(p.labels), 3, waits=waits) for waits in (True, False)],
    "checks.check_grid": lambda p: checks.check_grid("x", p.levels / 8 - 1, 17),
    "checks.fill_weights": lambda p: weights_of(checks.fill_weights(p.net)),
    "checks.relative_difference": lambda p: checks.relative_difference(p.net, p.make(unet.ResNetBaseline, 1, 4, 1), p.x, p.t),
    "checks.same_tensors": lambda p: checks.same_tensors(p.net, copy.deepcopy(p.net)),
}


# What takes no tensor, or is a part of something that is walked.
NOT_WALKED = [
    "gaussian.seeded", "gaussian.seeded_init", "elbo.log_snr_schedule", "flows.karras_sigmas", "schedules.linear_betas",
    "schedules.cosine_betas",
    "schedules.sigmoid_betas", "schedules.make_schedule", "unet.Downsample", "unet.Upsample", "unet.group_norm",
    "unet.zero_init", "unet.ResBlock", "unet.SelfAttention", "unet.Level", "unet.make_unet", "unet.join_projections",
    "unet.is_plain", "unet.faster_on_cpu", "unet.down_path", "unet.up_path", "unet.level_sizes", "data.load_digits", "data.load_dataset", "data.load_images",
    "data.mix_seeds", "data.describe_images", "data.epoch_order", "training.TrainConfig", "training.lr_factor", "training.make_optimizer",
    "training.OneProcess", "checks.own_streams", "training.seed_dropout", "training.Watcher",
    "training.TrainResult", "sampling.respaced_steps", "evaluation.BitsPerDim", "evaluation.save_classifier",
    "evaluation.load_classifier", "evaluation.ClassifierReport", "evaluation.verdict", "evaluation.inception_fid",
    "results.Yardstick", "results.read_results", "improved.learns_variance", "vae.make_mlp", "gan.GANResult",
    "captions.Strokes", "captions.CaptionRule", "captions.split_words", "captions.read_captions",
    "captions.fit_tokenizer", "captions.check_prompts", "captions.check_texts", "clip.TextBlock", "clip.ImageEncoder", "clip.make_clip",
    "clip.decay_groups", "conditioning.CrossAttention", "conditioning.SpatialTransformer", "conditioning.TextLevel",
    "latent.PlainBlock", "progress.show_progress", "texts.all_scenes", "texts.Shapes", "texts.split_scenes",
    "texts.read_metadata", "texts.CaptionedFolder", "texts.merge_pair", "texts.learn_merges", "texts.cut_word",
    "texts.count_tokens", "texts.fit_pieces", "texts.TextConfig", "texts.StageLoss", "texts.PairLoss",
    "texts.CompressionLoss", "texts.CaptionLoss", "texts.StageCheckpoints", "texts.SampleSheets",
    # asked where a tensor lies, so that the answer is another on each device: tests of their own below
    "checks.has_values", "checks.check_device",
    # looks at arguments that are no tensors
    "checks.assert_refused", "checks.check_kind", "checks.check_bool", "checks.check_choice", "checks.check_int",
    "checks.check_number", "checks.check_limit", "checks.check_fields", "checks.check_generator", "checks.split_generator",
    "checks.check_schedule", "checks.check_callable", "checks.check_callback", "checks.check_model", "files.check_path", "checks.check_gradients",
    "checks.check_batch_size", "checks.check_place", "checks.check_methods", "checks.check_processes", "checks.check_fit", "precision.pick_precision", "checks.fact_of",
    "precision.MixedPrecision",  # with `fit`
    "checks.check_labels",  # `data.check_labels`
    "checks.spared_streams", "data.image_of", "data.is_mirrored",  # `data.check_data`, and `train` for the last
    # reads and writes files, words and options; what of it holds tensors is walked with `train`, `load_parts` and `load_pretrained`
    "cli.default_options", "cli.make_parser", "cli.read_options", "cli.pick_device", "cli.suit", "cli.shell_words", "cli.main",
    "files.replaced_file", "files.write_json", "files.read_json", "files.checksum", "files.read_sealed", "files.find_model",
    "files.check_writable", "files.refuse_foreign_folder", "files.check_card", "files.model_card", "files.plan_module", "files.save_parts", "files.read_config", "files.Pretrained",
    "hub.save_pretrained", "hub.describe_model",
    "pictures.to_mode", "pictures.Listing", "pictures.list_folder", "pictures.check_white", "pictures.read_picture", "pictures.list_pictures", "pictures.find_parts", "pictures.FolderDataset", "pictures.load_folder",
    "pictures.load_torchvision",
    "runs.load_trainer_state", "runs.refuse_difference", "runs.read_checkpoint", "runs.load_checkpoint", "runs.list_checkpoints", "runs.comparable_facts", "runs.pick_loss", "runs.TrainLog",
    "runs.read_log", "runs.prepare_run", "runs.refuse_other_run", "runs.refuse_other_config", "runs.read_settings", "runs.Checkpoints", "runs.Interrupted",
    "runs.StopSignals", "runs.TensorBoard",
    "convert.diffusers_names", "convert.unet_from_diffusers", "convert.options_from_scheduler",
    "plots.new_figure", "plots.Html", "plots.touchable", "fast.keep_freed_memory",
]
WALKED_MODULES = [
    "gaussian", "forward", "elbo", "schedules", "bound", "embeddings", "unet", "data", "training", "sampling",
    "evaluation", "results", "improved", "scores", "vae", "gan", "captions", "clip", "conditioning", "latent",
    "pipeline", "flows", "texts", "checks", "cli", "convert", "fast", "files", "hub", "pictures", "plots", "processes", "progress", "precision", "runs",
]


def plain(value):
    """Turn a result into numbers, texts and tensors of the CPU."""
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, dict):
        return [plain(one) for one in value.values()]
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value.values_there if isinstance(value, Pretended) else value


def assert_same(found, wanted, where):
    """Assert that two results agree, up to rounding."""
    assert type(found) is type(wanted), where
    if isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other, where)
    elif isinstance(wanted, torch.Tensor | float | np.ndarray):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3, msg=lambda text: f"{where}: {text}")
    else:
        assert found == wanted, where


def outcome(name, device, source):
    """Take one walk with the data on one device and the generator on another; tell also whether it used the generator."""
    torch.manual_seed(0)
    with pretended_cuda():
        place = Place(device, source)
        return WALKS[name](place), place.draws


def test_every_public_name_is_walked():
    assert {*WALKED_MODULES} == {nb.module for nb in rules.read_book() if nb.module} - {"__init__"}
    walked = {name.partition(",")[0] for name in WALKS}
    public = {f"{m}.{name}" for m in WALKED_MODULES for name, _ in rules.public_objects(m)}
    assert sorted(public - walked - set(NOT_WALKED)) == []
    assert sorted(set(NOT_WALKED) - public) == sorted(set(NOT_WALKED) & walked) == []


METHODS = [  # walks that together call every public method that takes or gives tensors
    "evaluation.bits_per_dim", "captions.Tokenizer", "captions.check_tokens", "clip.zero_shot", "conditioning.ClassUNet",
    "conditioning.attention_maps", "data.ImageDataset", "evaluation.DigitClassifier", "gan.Discriminator", "gan.sample_gan",
    "gaussian.GaussianMixture", "hub.NoisePredictor", "hub.PaddedDownsample", "hub.PeerUNet", "hub.ScaleShiftBlock",
    "improved.LossHistory", "latent.autoencoder_loss", "pipeline.TextToImage", "pipeline.TextToImage, interpolation",
    "processes.Processes", "texts.Pairs", "texts.PieceTokenizer", "texts.TextDenoiser", "texts.train_text, pixels, words given",
    "unet.ResNetBaseline", "unet.UNet, transposed, heads, checkpoints", "vae.VAEBound",
]
OF_FILES = {"pictures.FolderDataset.images", "pictures.FolderDataset.read"}  # read on the CPU


def tensor_methods():
    """Map the code of each public method that takes or gives tensors to its name."""
    found = {}
    for module in WALKED_MODULES:
        for name, cls in rules.public_objects(module):
            for key, member in vars(cls).items() if inspect.isclass(cls) else ():
                function = getattr(member, "fget", None) or getattr(member, "__func__", member)
                if inspect.isfunction(function) and not key.startswith("_"):
                    function = inspect.unwrap(function)
                    if any("Tensor" in str(hint) for hint in inspect.get_annotations(function).values()):
                        found[function.__code__] = f"{module}.{name}.{key}"
    return found


def test_every_method_of_tensors_is_walked():
    waiting = tensor_methods()
    assert len(waiting) > 60
    for name in METHODS:
        torch.manual_seed(0)
        with pretended_cuda():
            place = Place("cuda", "cuda")
            sys.setprofile(lambda frame, event, arg: waiting.pop(frame.f_code, None))
            try:
                WALKS[name](place)
            finally:
                sys.setprofile(None)
    assert sorted({*waiting.values()} - OF_FILES) == []


@pytest.mark.parametrize("name", WALKS)
def test_a_device_changes_nothing(name):
    """Networks, schedule and data on the device: the same numbers, whichever of the two the generator is on."""
    wanted, draws = outcome(name, "cpu", "cpu")
    wanted = plain(wanted)
    for device, source in [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")][: 3 if draws else 1]:
        found, _ = outcome(name, device, source)
        assert_same(plain(found), wanted, f"data on {device}, generator on {source}")


# What PyTorch's own fake tensors can walk: they have no values, so nothing may be looked at, and no gradients without a driver.
FAKE = [
    "gaussian.reparameterize", "gaussian.discretized_gaussian_log_likelihood", "gaussian.normal_kl", "forward.q_step",
    "forward.q_sample", "forward.q_posterior", "forward.predict_x_0", "forward.predict_eps", "elbo.simple_loss",
    "elbo.objective_target", "elbo.output_to_eps", "bound.optimal_denoiser", "unet.UNet", "sampling.ddpm_step",
    "scores.sample_sde", "scores.score", "improved.step_bits", "improved.weighted_loss", "conditioning.TextUNet",
    "clip.CLIP", "latent.autoencoder_loss", "vae.vae_bound",
]


@pytest.mark.parametrize("name", FAKE)
def test_fake_tensors_walk(name):
    with FakeTensorMode():
        for device in ["cuda", "cpu"] if name.startswith(("gaussian", "forward")) else ["cuda"]:
            WALKS[name](Place(device, "cpu"))


def test_the_pretended_device_refuses_what_fake_tensors_refuse():
    """Rules of devices: PyTorch's, operation by operation, and CUDA's on indices and generators, which fake tensors do not know."""
    calls = [
        lambda here, there: here + there,
        lambda here, there: there * here[0, 0],
        lambda here, there: here * there[0, 0],
        lambda here, there: torch.where(there > 0, there, here),
        lambda here, there: torch.cat([here, there]),
        lambda here, there: there @ here.T,
        lambda here, there: nn.functional.linear(there, here),
        lambda here, there: there[torch.tensor([0, 1])],
        lambda here, there: there.clone().copy_(here),
        lambda here, there: there.masked_fill(here > 0, 1.0),
        lambda here, there: there.gather(1, torch.zeros(2, 1, dtype=torch.long)),
        lambda here, there: there.to(here) + here,
        lambda here, there: here.to(there) + there,
        lambda here, there: there.new_zeros(2, 3) + torch.full((2, 3), 1.0, device=there.device),
        lambda here, there: there.numpy(),
    ]
    verdicts = []
    for mode in (pretended_cuda, FakeTensorMode):
        with mode():
            here, there = torch.ones(2, 3), torch.ones(2, 3).to("cuda")
            verdicts.append([refused(partial(call, here, there)) for call in calls])
    assert verdicts[0] == verdicts[1]
    assert True in verdicts[0] and False in verdicts[0]
    with pretended_cuda():
        here, there = torch.ones(3), torch.tensor([0, 1]).to("cuda")
        assert refused(lambda: here[there])
        for source, place in (("cpu", "cuda"), ("cuda", "cpu")):
            assert refused(lambda s=source, p=place: torch.randn(2, generator=seeded(0, s), device=p))
        weight = torch.ones(3).to("cuda").requires_grad_()
        (weight.square().sum() * 2).backward()
        assert weight.grad.device == torch.device("cuda", 0)
        assert weight.grad.tolist() == [4.0, 4.0, 4.0]


def refused(call):
    """Tell whether a call raises."""
    try:
        call()
    except (RuntimeError, TypeError):
        return True
    return False


APART = {  # the network on the device, all else on the CPU; and the schedule alone there
    "simple_loss": lambda net, p: elbo.simple_loss(net, p.schedule, p.x),
    "hybrid_loss": lambda net, p: improved.hybrid_loss(net, p.schedule, p.x, n_levels=17),
    "weighted_loss": lambda net, p: improved.weighted_loss(
        net, p.schedule, p.x, t=p.t, eps=p.eps, weights=torch.ones(T).to(p.x.device)
    ),
    "vlb_terms": lambda net, p: bound.vlb_terms(net, p.schedule, p.x, n_levels=17),
    "sample_ddpm": lambda net, p: sampling.sample_ddpm(net, p.schedule, p.shape, x_T=p.eps),
    "sample_ddim": lambda net, p: sampling.sample_ddim(net, p.schedule, p.shape, n_steps=3),
    "sample_dpm_solver": lambda net, p: sampling.sample_dpm_solver(net, p.schedule, p.shape, n_steps=3),
    "ddim_invert": lambda net, p: sampling.ddim_invert(net, p.schedule, p.x, n_steps=3),
    "inpaint": lambda net, p: sampling.inpaint(net, p.schedule, p.x, p.x > 0, n_steps=3),
    "score": lambda net, p: scores.score(net, p.schedule, p.x, 3),
    "langevin": lambda net, p: scores.langevin(net, p.schedule, p.x, 3, n_steps=1),
    "sample_sde": lambda net, p: scores.sample_sde(net, p.schedule, p.shape),
    "flow_log_likelihood": lambda net, p: scores.flow_log_likelihood(net, p.schedule, p.x, n_steps=3, n_probes=1),
    "predict_noise": lambda net, p: elbo.predict_noise(net, p.schedule, "v")(p.x, p.t),
    "reverse_mean_variance": lambda net, p: elbo.reverse_mean_variance(net, p.schedule, p.x, p.t)[0],
    "p_sample": lambda net, p: sampling.p_sample(net, p.schedule, p.x, 3)[1],
    "flow_velocity": lambda net, p: scores.flow_velocity(net, p.schedule, p.x, p.t),
}
APART_ELSEWHERE = {  # name -> where they are apart
    "bits_per_dim": "`vlb_terms`",
    "velocity_from_eps": "FLOWS",
    "eps_from_velocity": "FLOWS",
    "edm_denoiser": "FLOWS",
    "fit": "brings both together: the walk 'training.fit, two parts'",
    "train": "brings both together, as `fit`",
    "save_pretrained": "asks the network nothing",
    "measure_bound": "`bits_per_dim`",
    "measure_samples": "`sample_ddim`",
    "conditional_loss": "`simple_loss`",
    "train_conditional": "brings the schedule; `conditional_loss`",
}


def test_a_function_of_a_network_and_a_schedule_is_tried_with_them_apart():
    found = set()
    for module in WALKED_MODULES:
        functions = [(name, f) for name, f in rules.public_objects(module) if inspect.isfunction(f) and module != "checks"]
        found |= {name for name, f in functions if {"model", "schedule"} <= inspect.signature(f).parameters.keys()}
    assert sorted(found ^ ({*APART} | {*APART_ELSEWHERE})) == []


@pytest.mark.parametrize("name", APART)
def test_a_network_and_a_schedule_on_two_devices_are_told_apart(name):
    with pretended_cuda():
        here, there = Place("cpu", "cpu"), Place("cuda", "cuda")
        if name != "predict_noise":  # which leaves the call to whoever has the network
            net = there.network_for(name)
            refuses(partial(APART[name], net, here), "model's input must be as its weights", "on cuda:0", error=TypeError)
        there.schedule = here.schedule
        # where images begin on the schedule's device, it is the network that is elsewhere
        refuses(partial(APART[name], there.network_for(name), there), "must be", "on c", error=(TypeError, ValueError))


FLOWS = {  # the network on the device, noise and images on the CPU
    "flow_matching_loss": lambda there, p: flows.flow_matching_loss(there.timed, p.x),
    "velocity_from_eps": lambda there, p: there.velocity(p.x, 0.5),
    "eps_from_velocity": lambda there, p: flows.eps_from_velocity(there.timed, p.schedule)(p.x, p.t),
    "sample_flow": lambda there, p: flows.sample_flow(there.velocity, p.shape, n_steps=1),
    "sample_flow, device told": lambda there, p: flows.sample_flow(there.timed, p.shape, n_steps=1, device="cpu"),
    "straightness": lambda there, p: flows.straightness(there.timed, p.x, n_steps=1),
    "sample_heun": lambda there, p: flows.sample_heun(flows.edm_denoiser(there.net, p.schedule), p.shape, n_steps=1),
    "sample_heun, device told": lambda there, p: flows.sample_heun(there.timed, p.shape, n_steps=1, device="cpu"),
}


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_names_a_network_that_is_elsewhere(name):
    with pretended_cuda():
        here, there = Place("cpu", "cpu"), Place("cuda", "cuda")
        refuses(partial(FLOWS[name], there, here), "model's input must be as its weights", "on cuda:0", error=TypeError)


def test_pairs_and_words_that_are_elsewhere_are_named():
    with pretended_cuda():
        here, there = Place("cpu", "cpu"), Place("cuda", "cuda")
        pairs = texts.Pairs(here.levels.byte(), here.rows()[:, None])
        trainer = training.Trainer(there.net, there.schedule, there.config())
        for loss in (texts.PairLoss(pairs), texts.CompressionLoss(pairs, 1.0), texts.CaptionLoss(pairs, here.x, 0.1)):
            refuses(partial(loss.start, trainer), "pairs must be on the network's device, cuda:0; it is on cpu")
        parts = here.own
        parts.text_encoder = there.own.text_encoder
        refuses(lambda: texts.word_maps(parts, ["a red circle"]), "text_encoder must be on the schedule's device, cpu")


def test_parts_of_a_pipeline_on_two_devices_are_told_apart():
    with pretended_cuda():
        parts = Place("cpu", "cpu").pipeline(True)
        parts.unet = Place("cuda", "cuda").pipeline(True).unet
        for draw in (lambda: parts.generate("a two"), lambda: parts.interpolate("a two", "a one")):
            refuses(draw, "unet must be on the schedule's device, cpu; it is on cuda:0")


def test_a_wrong_number_of_grey_levels_is_refused_on_a_device():
    with pretended_cuda():
        p = Place("cuda", "cuda")
        words = "must lie on the grid of n_levels=256 levels"
        refuses(lambda: bound.vlb_terms(abs, p.schedule, p.x), f"x_0 {words}")
        refuses(lambda: evaluation.bits_per_dim(p.net, p.schedule, p.x, n_levels=256), f"images {words}")


def test_what_has_no_weights_is_let_through():
    checks.check_device("autoencoder", None, "the images'", torch.device("cpu"))
    checks.check_device("model", nn.Identity(), "the images'", torch.device("cpu"))


def in_halves(p, net, what, dtype):
    """Turn images, network or schedule into 16 bits."""
    if what in ("images", "all"):
        p.x, p.eps = p.x.to(dtype), p.eps.to(dtype)
    if what in ("schedule", "all"):
        p.schedule = schedules.make_schedule("linear", T, dtype=dtype)
    return net.to(dtype) if what in ("network", "all") else net


@pytest.mark.parametrize("name", [name for name in APART if name not in ("ddim_invert", "predict_noise")])
def test_half_precision_is_right_or_refused(name):
    """Images, network or schedule in 16 bits: finite and near the result in float32, or one sentence that names the type."""
    torch.manual_seed(0)
    exact = Place("cpu", "cpu")
    wanted, worked = values_of(APART[name](exact.network_for(name), exact)), set()
    for what in ("images", "network", "schedule", "all"):
        for dtype in (torch.float16, torch.bfloat16):
            torch.manual_seed(0)
            p = Place("cpu", "cpu")
            net = in_halves(p, p.network_for(name), what, dtype)
            try:
                found = values_of(APART[name](net, p))
            except (TypeError, ValueError, RuntimeError) as refusal:
                assert re.search(r"type|grid|Half|BFloat16|as its weights", str(refusal)), refusal  # noqa: PT017
                continue
            assert bool(found.isfinite().all()), (what, dtype)
            if not name.startswith(("sample", "langevin", "inpaint")):  # where noise in 16 bits is another draw
                assert float((found - wanted).abs().max()) <= 0.05 * (1 + float(wanted.abs().max())), (what, dtype)
            worked.add((what, dtype))
    for dtype in (torch.float16, torch.bfloat16):  # nothing is mixed where all is in one type; and what only is converted may be in any
        assert ("all", dtype) in worked and worked & {("images", dtype), ("schedule", dtype)}, (dtype, worked)


def test_automatic_precision_asks_the_device(monkeypatch):
    """bfloat16 where the processor or the GPU computes in it, float32 elsewhere; and what was chosen is not changed."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for able in (False, True):
        best = torch.bfloat16 if able else torch.float32
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda able=able: able, raising=False)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, able=able: able or including_emulation)
        assert training.pick_precision("auto", cpu) == training.pick_precision("auto", cuda) == best
        assert training.pick_precision("auto", torch.device("meta")) == torch.float32
        for device in (cpu, cuda):
            assert training.pick_precision("float32", device) == torch.float32
            assert training.pick_precision("bfloat16", device) == torch.bfloat16
    assert training.pick_precision("float16", cuda) == torch.float16



def values_of(result):
    """Return one tensor in float64 from a result."""
    return (result.total if is_dataclass(result) else result).detach().double()


@pytest.mark.parametrize("latent", [False, True])
def test_image_and_mask_may_lie_on_two_devices(latent):
    with pretended_cuda():
        p = Place("cuda", "cuda")
        pipeline, mask = p.pipeline(latent), torch.ones_like(p.x[:, :1], dtype=torch.bool)
        mask[..., 0] = False  # drawn anew
        for image, kept in ((p.x, mask.cpu()), (p.x.cpu(), mask)):
            x = pipeline.generate("a two", len(p.x), n_steps=2, image=image, mask=kept)
            assert x.device.type == "cuda"
