"""Conversion to diffusers and back: the same function, nothing lost on the way."""

import inspect
import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from on_disk import SMALL, Bomb, randomize, same_weights
from safetensors.torch import load_file, save_file

import ddpm_nb.convert as convert
from conftest import refuses
from ddpm_nb.conditioning import ClassUNet
from ddpm_nb.convert import options_from_scheduler, unet_from_diffusers, unet_to_diffusers
from ddpm_nb.forward import NoiseSchedule
from ddpm_nb.hub import NoisePredictor, PeerUNet, load_pretrained, save_pretrained
from ddpm_nb.sampling import ddpm_step, sample_ddpm
from ddpm_nb.schedules import cosine_betas, linear_betas, make_schedule
from ddpm_nb.unet import ResNetBaseline, UNet

diffusers = pytest.importorskip("diffusers")



@pytest.fixture(scope="module")
def network():
    return randomize(UNet(**SMALL))


@pytest.fixture(scope="module")
def schedule():
    return make_schedule("cosine", 20)


BASE = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
CIFAR = {  # as published in google/ddpm-cifar10-32
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "act_fn": "silu",
    "center_input_sample": False,
    "mid_block_scale_factor": 1,
    "time_embedding_type": "positional",
} | {k: BASE[k] for k in ("attention_head_dim", "downsample_padding", "flip_sin_to_cos", "freq_shift", "norm_eps")}
THREE = {
    "sample_size": 16,
    "block_out_channels": (8, 8, 24),
    "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
}
PARITY = {
    "base": {},
    "cosines first": {"flip_sin_to_cos": True, "freq_shift": 0},
    "cosines first, shifted": {"flip_sin_to_cos": True, "freq_shift": 1},
    "sines first, not shifted": {"freq_shift": 0},
    "two heads": {"attention_head_dim": 8},
    "head of all channels": {"attention_head_dim": 16},
    "no attention": {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False},
    "attention in the middle only": {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2},
    "attention everywhere": {"down_block_types": ("AttnDownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D",) * 2},
    "no attention in the middle": {"add_attention": False},
    "three levels": THREE,
    "one level": {"block_out_channels": (8,), "down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)},
    "three blocks": {"layers_per_block": 3},
    "grey, with variance": {"in_channels": 1, "out_channels": 2},
    "other epsilon, dropout, groups": {"norm_eps": 1e-3, "dropout": 0.2, "norm_num_groups": 2},
    "explicit defaults": {"time_embedding_dim": 32, "attn_norm_num_groups": 4, "sample_size": (8, 8), "act_fn": "swish"},
    "google/ddpm-cifar10-32": CIFAR,
}


def random_peer(**options):
    """Build a UNet2DModel with random weights everywhere."""
    return randomize(diffusers.UNet2DModel(**BASE | options))


def inputs(options, n=3):
    options = BASE | {"in_channels": 3} | options
    size = options["sample_size"] if isinstance(options["sample_size"], int) else options["sample_size"][0]
    x = torch.randn(n, options["in_channels"], size, size, generator=torch.Generator().manual_seed(5))
    return x, torch.tensor([0, 40, 999])[:n]


def largest_difference(peer, ours, options):
    x, t = inputs(options)
    with torch.no_grad():
        expected = peer(x, t).sample
        assert expected.std() > 0.1, "a comparison with zero shows nothing"
        return (ours(x, t) - expected).abs().max().item()


@pytest.mark.parametrize("name", PARITY)
def test_a_converted_network_is_the_same_function_and_comes_back_bit_for_bit(name):
    peer = random_peer(**PARITY[name])
    ours, schedule = unet_from_diffusers(peer)
    assert largest_difference(peer, ours, PARITY[name]) < 1e-5
    assert not ours.training and torch.equal(schedule.exact_betas, linear_betas(1000))
    back, scheduler = unet_to_diffusers(ours, schedule)
    assert same_weights(back, peer) and not back.training
    assert scheduler.config.beta_schedule == "linear" and scheduler.config.num_train_timesteps == 1000
    again, _ = unet_from_diffusers(back)
    assert again.config == ours.config and same_weights(again, ours)
    parameters = {p.data_ptr() for n in (peer, ours, back) for p in n.parameters()}
    assert len(parameters) == sum(len(list(n.parameters())) for n in (peer, ours, back)), "no memory is shared"


DOWN, UP = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
COURSE = {  # the butterflies of the diffusion course of Hugging Face
    "sample_size": 32,
    "block_out_channels": (64, 128, 128, 256),
    "down_block_types": (DOWN[0], DOWN[0], DOWN[1], DOWN[1]),
    "up_block_types": (UP[0], UP[0], UP[1], UP[1]),
    "layers_per_block": 2,
}
SCRIPT = {  # the unconditional training script of diffusers
    "sample_size": 64,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*[DOWN[0]] * 4, DOWN[1], DOWN[0]),
    "up_block_types": (UP[1], UP[0], *[UP[1]] * 4),
    "layers_per_block": 2,
}
MNIST = {  # the class-conditional network of the course, which joins the class to the image itself
    "sample_size": 28,
    "in_channels": 11,
    "out_channels": 1,
    "block_out_channels": (32, 64, 64),
    "down_block_types": (DOWN[0], DOWN[1], DOWN[1]),
    "up_block_types": (UP[0], UP[0], UP[1]),
    "layers_per_block": 2,
}
SMALL_PEER = {name: BASE[name] for name in ("sample_size", "block_out_channels", "norm_num_groups")}
SMALL_PEER |= {"down_block_types": DOWN, "up_block_types": UP}
EVERYWHERE = {"down_block_types": ("AttnDownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D",) * 2}
PEERS = {  # what is not named has the default of diffusers, not of DDPM
    "the defaults, smaller": SMALL_PEER,
    "butterflies": COURSE,
    "the training script": SCRIPT,
    "MNIST with classes": MNIST,
    "padding": BASE | {"downsample_padding": 1},
    "three levels, padding": BASE | THREE | {"downsample_padding": 1},
    "heads that grow": BASE | EVERYWHERE | {"attention_head_dim": 4},
    "scale and shift": BASE | {"resnet_time_scale_shift": "scale_shift"},
    "scale, shift, groups in the middle": SMALL_PEER | {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2},
    "groups in the middle": BASE | {"attn_norm_num_groups": 2},
    "other widths": SMALL_PEER | {"block_out_channels": (8, 24), "attention_head_dim": 12},
    "no multiples": BASE | {"block_out_channels": (8, 12)},
    "attention on the way up only": BASE | {"down_block_types": ("DownBlock2D",) * 2},
    "attention on the way down only": BASE | {"up_block_types": ("UpBlock2D",) * 2},
    "a longer time vector": BASE | {"time_embedding_dim": 64},
    "no attention": SMALL_PEER | {"down_block_types": DOWN[:1] * 2, "up_block_types": UP[1:] * 2, "add_attention": False, "downsample_type": "resnet"},
}


@pytest.mark.parametrize("name", PEERS)
def test_networks_that_keep_the_defaults_of_diffusers_are_the_same_function(name, tmp_path):
    options = PEERS[name]
    peer = randomize(diffusers.UNet2DModel(**options))
    ours, schedule = unet_from_diffusers(peer)
    assert largest_difference(peer, ours, options) < 1e-5
    back, _ = unet_to_diffusers(ours, schedule)
    assert same_weights(back, peer) and largest_difference(back, ours, options) < 1e-5
    assert unet_from_diffusers(back)[0].config == ours.config
    save_pretrained(tmp_path / "m", ours, schedule)
    again, _ = load_pretrained(tmp_path / "m")
    x, t = inputs(options)
    with torch.no_grad():
        assert type(again) is type(ours) and torch.equal(again(x, t), ours(x, t))


def test_the_constructor_s_defaults_and_a_size_that_is_given_are_converted(tmp_path):
    with torch.device("meta"):
        peer = diffusers.UNet2DModel()
    ours, _ = unet_from_diffusers(peer, image_size=64)
    assert ours.config["head_dim"] == 8 and ours.config["widths"] == [224, 448, 672, 896]
    refuses(lambda: unet_from_diffusers(peer), "sample_size=None", "image_size=")
    peer = randomize(diffusers.UNet2DModel(**SMALL_PEER | {"sample_size": None}))
    peer.save_pretrained(tmp_path)
    ours, _ = unet_from_diffusers(tmp_path, image_size=8)
    assert largest_difference(peer, ours, SMALL_PEER) < 1e-5


@pytest.mark.parametrize("objective", ["eps", "v"])
def test_a_network_that_is_told_the_class(objective, schedule, tmp_path):
    peer = randomize(diffusers.UNet2DModel(**SMALL_PEER | {"num_class_embeds": 10}))
    scheduler = diffusers.DDPMScheduler(20, prediction_type=convert._PREDICTIONS[objective])
    ours, own = unet_from_diffusers(peer, scheduler=scheduler)
    x, t = inputs(SMALL_PEER)
    t, labels = t.clamp(max=19), torch.tensor([0, 7, 9])
    network = ours if objective == "eps" else ours.network
    with torch.no_grad():
        expected = peer(x, t, class_labels=labels).sample
        assert (network(x, t, labels) - expected).abs().max() < 1e-5
        assert not torch.equal(ours(x, t, labels), ours(x, t, labels.flip(0)))
    assert same_weights(unet_to_diffusers(ours, own)[0], peer)
    save_pretrained(tmp_path / "m", ours, own)
    again, _ = load_pretrained(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(again(x, t, labels), ours(x, t, labels))
    sample = sample_ddpm(lambda x, t: again(x, t, labels), own, x.shape, generator=torch.Generator().manual_seed(0))
    assert sample.isfinite().all()
    refuses(lambda: ours(x, t), "labels must be (B,) classes in 0..9")
    refuses(lambda: ours(x, t, labels + 1), "labels must be (3,) whole numbers in 0..9; got [1, 8, 10] of torch.int64")
    plain = unet_from_diffusers(random_peer(**SMALL_PEER))[0]
    if isinstance(plain, PeerUNet):
        refuses(lambda: plain(x, t, labels), "the network knows no classes")


OURS = {
    "small": {},
    "cumulative": {"channel_mults": (1, 2, 2), "cumulative": True, "image_size": 16},
    "heads": {"n_heads": 4},
    "shift": {"freq_shift": 0.5},
    "cosines first": {"time_layout": "cos_first"},
    "cosines first, shifted": {"time_layout": "cos_first", "freq_shift": 1},
    "wide": {"in_channels": 3, "out_channels": 6, "norm_eps": 1e-5, "dropout": 0.3, "mid_attention": False},
    "no attention": {"attn_resolutions": (), "mid_attention": False, "n_heads": 2},
    "transposed, but one level": {"channel_mults": (1,), "upsampling": "transposed"},
    "checkpointing": {"checkpointing": True},
}


@pytest.mark.parametrize("name", OURS)
def test_our_network_survives_the_way_there_and_back(name):
    ours = randomize(UNet(**SMALL | OURS[name]))
    peer, scheduler = unet_to_diffusers(ours, make_schedule("cosine", 50))
    options = {"sample_size": ours.image_size, "in_channels": ours.in_channels}
    assert largest_difference(peer, ours, options) < 1e-5
    back, schedule = unet_from_diffusers(peer, scheduler=scheduler)
    assert same_weights(back, ours) and torch.equal(schedule.exact_betas, cosine_betas(50))
    x, t = inputs(options)
    with torch.no_grad():
        assert torch.equal(back(x, t), ours(x, t))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_conversion_keeps_types_modes_and_any_memory_format(dtype):
    ours = randomize(UNet(**SMALL)).to(dtype).to(memory_format=torch.channels_last).train()
    peer, _ = unet_to_diffusers(ours, make_schedule("linear", 10))
    assert peer.training and peer.dtype == dtype and all(v.is_contiguous() for v in peer.state_dict().values())
    assert same_weights(unet_from_diffusers(peer)[0], ours)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"center_input_sample": True}, "center_input_sample=True"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
        ({"downsample_type": "resnet"}, "downsample_type='resnet'"),
        ({"upsample_type": "resnet"}, "upsample_type='resnet'"),
        ({"downsample_padding": 2}, "downsample_padding=2"),
        ({"act_fn": "gelu"}, "act_fn='gelu'"),
        ({"mid_block_type": None}, "mid_block_type=None"),
        ({"mid_block_scale_factor": 1.5}, r"mid_block_scale_factor=1\.5"),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ({"sample_size": None}, "sample_size=None"),
        ({"sample_size": (8, 16)}, r"sample_size=\(8, 16\)"),
        ({"sample_size": 9}, "image_size must be divisible by 2"),
        ({"down_block_types": ("SkipDownBlock2D", "DownBlock2D")}, "down_block_types=.* DownBlock2D and AttnDownBlock2D"),
        ({"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D")}, "up_block_types="),
        ({"attention_head_dim": 3}, "attention_head_dim=3"),
    ],
)
def test_what_the_unet_cannot_express_is_refused_by_name(options, match):
    with torch.device("meta"):
        peer = diffusers.UNet2DModel(**BASE | options)
    with pytest.raises(ValueError, match=match):
        unet_from_diffusers(peer)


def test_no_option_of_diffusers_is_forgotten():
    known = set(convert._ONLY) | set(BASE) | {"num_class_embeds", "downsample_type", "upsample_type"} | {"in_channels", "out_channels", "dropout", "add_attention"}
    known |= {"time_embedding_dim", "attn_norm_num_groups", "num_train_timesteps"}  # the last for time_embedding_type="learned" only
    assert set(inspect.signature(diffusers.UNet2DModel).parameters) == known


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"upsampling": "transposed"}, "upsampling='transposed'"),
        ({"time_layout": "interleaved"}, "time_layout='interleaved'"),
        ({"channel_mults": (2, 2)}, r"channel_mults=\[2, 2\]"),
        ({"n_heads": 2, "attn_resolutions": (8, 4)}, "n_heads=2"),
    ],
)
def test_what_diffusers_cannot_express_is_refused_by_name(options, match):
    with pytest.raises(ValueError, match=match):
        unet_to_diffusers(UNet(**SMALL | options), make_schedule("linear", 10))


def test_conversion_refuses_other_objects(network, schedule):
    with pytest.raises(TypeError, match="unet must be a UNet; got ResNetBaseline"):
        unet_to_diffusers(ResNetBaseline(1), schedule)
    with pytest.raises(TypeError, match="schedule must be a NoiseSchedule; got Tensor"):
        unet_to_diffusers(network, schedule.betas)
    with pytest.raises(TypeError, match=r"model_or_path must be a UNet2DModel, .* got UNet"):
        unet_from_diffusers(network)
    with pytest.raises(TypeError, match="scheduler must be a scheduler of diffusers"):
        unet_from_diffusers(random_peer(), scheduler=schedule)


def test_without_diffusers_the_error_says_what_to_install(network, schedule, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for call in (lambda: unet_to_diffusers(network, schedule), lambda: unet_from_diffusers("x")):
        with pytest.raises(ImportError, match="pip install diffusers"):
            call()


# schedules


@pytest.mark.parametrize(
    ("betas", "rule"),
    [
        (linear_betas(1000), "linear"),
        (linear_betas(37, 0.002, 0.3), "linear"),
        (linear_betas(200, rescale=True), "linear"),
        (linear_betas(1), "linear"),
        (cosine_betas(1000), "squaredcos_cap_v2"),
        (cosine_betas(7), "squaredcos_cap_v2"),
        (cosine_betas(100, s=0.01), None),
        (make_schedule("sigmoid", 100).exact_betas, None),
        (linear_betas(50).float().double(), None),
        (torch.tensor([0.5, 0.1, 0.3], dtype=torch.float64), None),
    ],
)
def test_schedules_survive_the_way_there_and_back(betas, rule, network, tmp_path):
    peer, scheduler = unet_to_diffusers(network, NoiseSchedule(betas))
    assert scheduler.config.num_train_timesteps == len(betas) == len(scheduler.betas)
    assert (scheduler.config.trained_betas is None) == (rule is not None)
    assert rule in (None, scheduler.config.beta_schedule)
    torch.testing.assert_close(scheduler.betas.double(), betas, rtol=1e-5, atol=1e-8)
    assert torch.equal(unet_from_diffusers(peer, scheduler=scheduler)[1].exact_betas, betas)
    scheduler.save_pretrained(tmp_path)
    again = diffusers.DDPMScheduler.from_pretrained(tmp_path)
    assert torch.equal(unet_from_diffusers(peer, scheduler=again)[1].exact_betas, betas)


RULES = [("DDPMScheduler", rule) for rule in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")]
RULES += [("DDIMScheduler", rule) for rule in ("linear", "scaled_linear", "squaredcos_cap_v2")]


@pytest.mark.parametrize(("kind", "rule"), RULES)
def test_schedulers_of_diffusers_keep_their_variances(kind, rule):
    scheduler = getattr(diffusers, kind)(100, beta_schedule=rule)
    schedule = unet_from_diffusers(random_peer(), scheduler=scheduler)[1]
    torch.testing.assert_close(schedule.alpha_bars, scheduler.alphas_cumprod, rtol=1e-5, atol=1e-9)


OTHER = [("variance_type", "learned_range"), ("variance_type", "learned"), ("thresholding", True), ("clip_sample_range", 2.0)]
OTHER += [("rescale_betas_zero_snr", True), ("prediction_type", "flow_prediction")]


@pytest.mark.parametrize(("name", "value"), OTHER)
def test_schedulers_of_other_models_are_refused(name, value):
    scheduler = diffusers.DDPMScheduler(**{name: value})
    refuses(lambda: unet_from_diffusers(random_peer(), scheduler=scheduler), f"the scheduler's {name}={value!r}")


SAVED = {
    "DDIMScheduler": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    "PNDMScheduler": {"beta_schedule": "scaled_linear"},
    "EulerDiscreteScheduler": {"prediction_type": "sample"},
    "DPMSolverMultistepScheduler": {"prediction_type": "v_prediction"},
}


@pytest.mark.parametrize("kind", SAVED)
def test_a_scheduler_saved_beside_a_model_keeps_what_it_means(kind, tmp_path):
    peer, scheduler = random_peer(), getattr(diffusers, kind)(50, **SAVED[kind])
    peer.save_pretrained(tmp_path / "unet")
    scheduler.save_pretrained(tmp_path / "scheduler")
    model, schedule = unet_from_diffusers(tmp_path)
    torch.testing.assert_close(schedule.alpha_bars, scheduler.alphas_cumprod, rtol=1e-5, atol=1e-9)
    word = SAVED[kind].get("prediction_type", "epsilon")
    assert convert._PREDICTIONS[getattr(model, "objective", "eps")] == word


@pytest.mark.parametrize("kind", ["ScoreSdeVeScheduler", "FlowMatchEulerDiscreteScheduler", "NoSuchScheduler"])
def test_a_saved_scheduler_without_such_a_schedule_is_refused(kind, tmp_path):
    random_peer().save_pretrained(tmp_path)
    config = {"_class_name": kind, "num_train_timesteps": 50}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises((TypeError, ValueError), match=kind):
        unet_from_diffusers(tmp_path)


def test_a_scheduler_says_how_our_sampler_walks(schedule):
    scheduler = diffusers.DDPMScheduler(20, beta_schedule="squaredcos_cap_v2", variance_type="fixed_large", timestep_spacing="trailing", clip_sample=False)
    wanted = {"clip_x_0": False, "variance": "beta", "spacing": "trailing"}
    assert options_from_scheduler(scheduler) == wanted
    x, output = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    theirs = scheduler.step(output, 9, x, generator=torch.Generator().manual_seed(0)).prev_sample
    options = {"variance": "beta", "clip_x_0": False, "generator": torch.Generator().manual_seed(0)}
    torch.testing.assert_close(ddpm_step(schedule, x, 9, output, **options)[0], theirs, atol=1e-5, rtol=1e-4)
    plain = options_from_scheduler(diffusers.DDPMScheduler(20))
    assert plain == {"clip_x_0": True, "variance": "posterior", "n_steps": 20}
    for option in ({"thresholding": True}, {"clip_sample_range": 2.0}, {"variance_type": "learned"}, {"steps_offset": 1}):
        (name,) = option
        refuses(lambda option=option: options_from_scheduler(diffusers.DDPMScheduler(20, **option)), name)


def test_the_shipped_cosine_models_are_exported_by_the_name_of_their_schedule():
    for name in ("digits", "mnist"):
        config = unet_to_diffusers(*load_pretrained(name))[1].config
        assert config.beta_schedule == "squaredcos_cap_v2" and config.trained_betas is None
        assert config.timestep_spacing == "linspace"


@pytest.mark.parametrize(("objective", "theirs"), [("v", "v_prediction"), ("x_0", "sample"), ("eps", "epsilon")])
def test_what_a_network_predicts_survives_the_way_there_and_back(objective, theirs, network, schedule, tmp_path):
    save_pretrained(tmp_path / "m", network, schedule, objective=objective)
    model, own = load_pretrained(tmp_path / "m")
    peer, scheduler = unet_to_diffusers(model, own)
    assert scheduler.config.prediction_type == theirs
    back, _ = unet_from_diffusers(peer, scheduler=scheduler)
    assert type(back) is type(model)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 15])
    with torch.no_grad():
        assert torch.equal(back(x, t), model(x, t))
        for i in (3, 15):  # the step that diffusers takes is ours
            output = peer(x, torch.tensor([i, i])).sample
            x_0 = scheduler.step(output, i, x, generator=torch.Generator().manual_seed(0)).pred_original_sample
            eps_hat = model(x, torch.tensor([i, i]))
            ours = (x - own.sqrt_one_minus_alpha_bars[i] * eps_hat) / own.sqrt_alpha_bars[i]
            torch.testing.assert_close(x_0, ours.clamp(-1, 1), atol=1e-4, rtol=1e-4)


def test_a_network_that_predicts_v_is_exported_with_its_own_schedule(network, schedule):
    model = NoisePredictor(network, schedule, "v")
    refuses(lambda: unet_to_diffusers(model, make_schedule("cosine", 7)), "schedule must be the one with which the model predicts the noise")


@pytest.mark.parametrize("objective", ["mu", "velocity"])
def test_what_has_no_word_in_diffusers_is_refused_by_name(objective, network, schedule):
    model = NoisePredictor(network, schedule, objective)
    words = f"objective={objective!r} cannot be expressed by a scheduler of diffusers"
    refuses(lambda: unet_to_diffusers(model, schedule), words)


@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
def test_a_saved_and_converted_model_gives_the_same_pictures_in_a_pipeline(name, tmp_path):
    schedule = make_schedule(name, 20)
    ours, _ = unet_from_diffusers(random_peer())
    save_pretrained(tmp_path / "m", ours, schedule)
    pipeline = diffusers.DDPMPipeline(*unet_to_diffusers(*load_pretrained(tmp_path / "m")))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(2, torch.Generator().manual_seed(1), num_inference_steps=20, output_type="np").images
    x = sample_ddpm(ours, schedule, (2, 3, 8, 8), generator=torch.Generator().manual_seed(1))
    expected = x.clamp(-1, 1).add(1).div(2).permute(0, 2, 3, 1)
    assert expected.std() > 0.05
    torch.testing.assert_close(torch.from_numpy(images), expected, atol=1e-4, rtol=0)
    other = sample_ddpm(ours, schedule, (2, 3, 8, 8), generator=torch.Generator().manual_seed(2))
    assert (other - x).abs().max() > 0.1
    fewer = pipeline(1, torch.Generator().manual_seed(1), num_inference_steps=3, output_type="np").images
    assert fewer.shape == (1, 8, 8, 3)


@pytest.mark.parametrize("separately", [False, True])
def test_a_converted_model_saved_by_diffusers_runs_in_its_pipeline(separately, tmp_path):
    ours, schedule = randomize(UNet(**SMALL | {"in_channels": 3})), make_schedule("cosine", 20)
    model, scheduler = unet_to_diffusers(ours, schedule)
    if separately:
        model.save_pretrained(tmp_path / "unet")
        scheduler.save_pretrained(tmp_path / "scheduler")
        parts = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet"), diffusers.DDPMScheduler.from_pretrained(tmp_path / "scheduler")
        pipeline = diffusers.DDPMPipeline(*parts)
    else:
        diffusers.DDPMPipeline(model, scheduler).save_pretrained(tmp_path)
        pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.bin")) and len(list(tmp_path.rglob("*.safetensors"))) == 1
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(2, torch.Generator().manual_seed(1), num_inference_steps=20, output_type="np").images
    x = sample_ddpm(ours, schedule, (2, 3, 8, 8), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(torch.from_numpy(images), x.clamp(-1, 1).add(1).div(2).permute(0, 2, 3, 1), atol=1e-4, rtol=0)


# folders of diffusers

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def peer():
    return random_peer()


@pytest.fixture
def pipeline_folder(peer, tmp_path):
    scheduler = diffusers.DDPMScheduler(40, beta_schedule="squaredcos_cap_v2")
    diffusers.DDPMPipeline(peer, scheduler).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_pipelines_and_folders_of_every_layout_load(peer, pipeline_folder, tmp_path):
    flat = tmp_path / "flat"  # as the models of the paper are published
    shutil.copytree(pipeline_folder / "unet", flat)
    shutil.copy(pipeline_folder / "scheduler" / "scheduler_config.json", flat)
    pipeline = diffusers.DDPMPipeline.from_pretrained(pipeline_folder, use_safetensors=True)
    for source in (pipeline, pipeline_folder, str(pipeline_folder), flat):
        ours, schedule = unet_from_diffusers(source)
        assert same_weights(unet_to_diffusers(ours, schedule)[0], peer)
        assert torch.equal(schedule.exact_betas, cosine_betas(40))
    for source in (pipeline_folder / "unet", peer):
        assert torch.equal(unet_from_diffusers(source)[1].exact_betas, linear_betas(1000))
    given = diffusers.DDPMScheduler(10)
    assert torch.equal(unet_from_diffusers(pipeline_folder, scheduler=given)[1].exact_betas, linear_betas(10))


def test_a_schedule_comes_to_where_its_network_is():
    peer = diffusers.UNet2DModel(**BASE).to("meta")
    assert unet_from_diffusers(peer)[1].betas.device.type == "meta"


def test_old_names_of_the_attention_layers_load(peer, pipeline_folder):
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(pipeline_folder / "unet" / WEIGHTS)
    for theirs, old in new.items():
        tensors = {k.replace(f".{theirs}.", f".{old}."): v for k, v in tensors.items()}
    assert any("proj_attn" in k for k in tensors)
    save_file(tensors, pipeline_folder / "unet" / WEIGHTS, {"format": "pt"})
    assert same_weights(unet_to_diffusers(*unet_from_diffusers(pipeline_folder))[0], peer)


def change_tensors(change):
    return lambda root: save_file(change(load_file(root / WEIGHTS)), root / WEIGHTS, {"format": "pt"})


def change_config(**changes):
    return lambda root: (root / "config.json").write_text(json.dumps(json.loads((root / "config.json").read_text()) | changes))


def to_bin(root):
    torch.save(Bomb(root / "trace"), root / "diffusion_pytorch_model.bin")
    (root / WEIGHTS).unlink()


FOLDERS = {
    "only a pickle": (to_bin, r"no \.safetensors file; \.bin files are pickles"),
    "truncated": (lambda root: (root / WEIGHTS).write_bytes((root / WEIGHTS).read_bytes()[:5000]), "does not hold a UNet2DModel"),
    "a pickle in disguise": (lambda root: (root / WEIGHTS).write_bytes(pickle.dumps(Bomb(root / "trace"))), "does not hold a UNet2DModel"),
    "missing tensor": (change_tensors(lambda t: {k: v for k, v in t.items() if k != "conv_in.bias"}), "missing_keys.*conv_in.bias"),
    "extra tensor": (change_tensors(lambda t: t | {"spy": torch.zeros(1)}), "unexpected_keys.*spy"),
    "wrong shape": (change_tensors(lambda t: t | {"conv_in.bias": torch.zeros(9)}), "conv_in.bias"),
    "no config": (lambda root: (root / "config.json").unlink(), "config.json"),
    "broken config": (lambda root: (root / "config.json").write_text("{"), "does not hold a UNet2DModel"),
    "other class": (change_config(_class_name="UNet2DConditionModel"), "holds a UNet2DConditionModel; it must be a UNet2DModel"),
    "giant": (change_config(block_out_channels=[8 * 10**4, 16 * 10**4]), "the configuration asks for .* numbers from .* bytes"),
    "endless": (change_config(layers_per_block=10**9), "need more than .* tensors|needs more tensors"),
    "text for channels": (change_config(block_out_channels="many"), "does not hold a UNet2DModel"),
    "no channels": (change_config(block_out_channels=[]), "does not hold a UNet2DModel"),
    "zero channels": (change_config(block_out_channels=[0, 0]), "does not hold a UNet2DModel"),
    "refused option": (change_config(downsample_padding=2), "downsample_padding=2 cannot be expressed"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_damaged_folders_of_diffusers_are_refused(name, pipeline_folder):
    damage, match = FOLDERS[name]
    damage(pipeline_folder / "unet")
    with pytest.raises(ValueError, match=match):
        unet_from_diffusers(pipeline_folder)
    assert not (pipeline_folder / "unet" / "trace").exists()


def test_a_pickle_beside_the_safetensors_is_not_read(pipeline_folder, peer):
    torch.save(Bomb(pipeline_folder / "trace"), pipeline_folder / "unet" / "diffusion_pytorch_model.bin")
    assert same_weights(unet_to_diffusers(*unet_from_diffusers(pipeline_folder))[0], peer)
    assert not (pipeline_folder / "trace").exists()


@pytest.mark.parametrize("name", ["nowhere", "../nowhere", "a/b/c", "", "-/x", Path("owner/name")])
def test_names_that_are_neither_folders_nor_of_the_hub_are_refused(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    if str(name) in ("", "."):
        with pytest.raises(ValueError, match="does not hold a UNet2DModel"):
            unet_from_diffusers(name)
    else:
        with pytest.raises(FileNotFoundError, match=r"no folder .* owner/name"):
            unet_from_diffusers(name)


def test_a_file_is_no_folder_of_diffusers(pipeline_folder):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        unet_from_diffusers(pipeline_folder / "unet" / WEIGHTS)


def test_a_name_of_the_hub_is_fetched_without_pickles(pipeline_folder, peer, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(pipeline_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    ours, _ = unet_from_diffusers("google/ddpm-cifar10-32")
    assert asked == [("google/ddpm-cifar10-32", ["*.json", "*.safetensors"])]
    assert same_weights(unet_to_diffusers(ours, make_schedule("linear", 5))[0], peer)


def test_without_a_network_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match="no folder owner/name here, and the Hugging Face Hub, which needs a network"):
        unet_from_diffusers("owner/name")




def test_what_diffusers_would_not_walk_or_hear_is_refused_by_name():
    refuses(lambda: options_from_scheduler(diffusers.DDIMScheduler()), "scheduler must be a DDPMScheduler", "got DDIMScheduler", error=TypeError)
    classes = ClassUNet(10, **SMALL)
    refuses(lambda: unet_to_diffusers(classes, make_schedule("cosine", 50)), "unet must be a UNet or a PeerUNet; got ClassUNet", error=TypeError)


def test_a_learned_variance_is_walked_by_diffusers():
    ours = randomize(UNet(**SMALL | {"in_channels": 3, "out_channels": 6}))
    peer, scheduler = unet_to_diffusers(ours, make_schedule("cosine", 50))
    x = torch.randn(1, 3, ours.image_size, ours.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        step = scheduler.step(peer(x, 7).sample, 7, x, generator=torch.Generator().manual_seed(0))
    assert step.prev_sample.shape == x.shape and scheduler.config.variance_type == "learned_range"


def test_a_learned_variance_is_walked_here_as_diffusers_walks_it(schedule):
    ours = randomize(UNet(**SMALL | {"in_channels": 3, "out_channels": 6}))
    peer, scheduler = unet_to_diffusers(ours, schedule)
    options = options_from_scheduler(scheduler)
    assert options == {"clip_x_0": True, "variance": "learned", "spacing": "linspace"}
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for i in (1, 9, 19):
        with torch.no_grad():
            output = peer(x, i).sample
        theirs = scheduler.step(output, i, x, generator=torch.Generator().manual_seed(0)).prev_sample
        here = {"variance": options["variance"], "clip_x_0": options["clip_x_0"]}
        mine = ddpm_step(schedule, x, i, output, **here, generator=torch.Generator().manual_seed(0))[0]
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    as_v = diffusers.DDPMScheduler(20, variance_type="learned_range", prediction_type="v_prediction")
    refuses(lambda: options_from_scheduler(as_v), "the scheduler's variance_type='learned_range' cannot be expressed but for the noise")


@pytest.mark.parametrize(
    "change",
    [{}, {"variance_type": "fixed_large"}, {"timestep_spacing": "trailing", "clip_sample": False}, {"variance_type": "learned_range"}, {"timestep_spacing": "linspace"}],
)
def test_what_lies_beside_a_model_says_how_to_walk(change, tmp_path):
    """The pictures of the pipeline in a folder come out here, with what the folder says of the walk and with nothing else."""
    learns = change.get("variance_type") == "learned_range"
    peer = random_peer(out_channels=6 if learns else 3)
    pipeline = diffusers.DDPMPipeline(peer, diffusers.DDPMScheduler(20, beta_schedule="squaredcos_cap_v2", **change))
    pipeline.save_pretrained(tmp_path)
    options = options_from_scheduler(tmp_path)
    assert options == options_from_scheduler(pipeline) == options_from_scheduler(pipeline.scheduler) == options_from_scheduler(str(tmp_path))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(2, torch.Generator().manual_seed(1), num_inference_steps=20, output_type="np").images
    model, schedule = unet_from_diffusers(tmp_path)
    draw = lambda **o: sample_ddpm(model, schedule, (2, 3, 8, 8), generator=torch.Generator().manual_seed(1), **o)
    expected = lambda x: x.clamp(-1, 1).add(1).div(2).permute(0, 2, 3, 1)
    torch.testing.assert_close(torch.from_numpy(images), expected(draw(**options)), atol=2e-3, rtol=0)


def test_a_folder_without_a_scheduler_or_with_one_that_cannot_be_walked(tmp_path):
    random_peer().save_pretrained(tmp_path / "model")
    refuses(lambda: options_from_scheduler(tmp_path / "model"), "holds no scheduler_config.json", error=FileNotFoundError)
    torn = diffusers.DDPMScheduler(20, thresholding=True)
    diffusers.DDPMPipeline(random_peer(), torn).save_pretrained(tmp_path / "torn")
    for call in (unet_from_diffusers, options_from_scheduler):
        refuses(lambda call=call: call(tmp_path / "torn"), "the scheduler's thresholding=True cannot be expressed; pass another scheduler")
    unet_from_diffusers(tmp_path / "torn", scheduler=diffusers.DDPMScheduler(20))
