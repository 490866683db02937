"""Text conditioning: attention against other forms, what the U-Net hears, guidance, dropout, training, the shipped network."""

import inspect
import json
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from conftest import refuses
from ddpm_nb.captions import (
    BEGIN,
    PADDING,
    CaptionRule,
    Tokenizer,
    attributes,
    fit_caption_rule,
    write_captions,
)
from ddpm_nb.clip import TextEncoder
from ddpm_nb.conditioning import (
    ClassUNet,
    CrossAttention,
    SpatialTransformer,
    TextLevel,
    TextUNet,
    attention_maps,
    conditional_loss,
    drop_context,
    encode_words,
    guided,
    of_class,
    score_attributes,
    train_conditional,
)
from ddpm_nb.data import ImageDataset, load_dataset
from ddpm_nb.elbo import output_to_eps, simple_loss
from ddpm_nb.evaluation import load_classifier
from ddpm_nb.fast import optimize_for_sampling
from ddpm_nb.files import load_parts, save_parts
from ddpm_nb.forward import NoiseSchedule
from ddpm_nb.gaussian import seeded, seeded_init
from ddpm_nb.hub import PeerUNet, load_pretrained, save_pretrained
from ddpm_nb.sampling import sample_ddim
from ddpm_nb.schedules import make_schedule
from ddpm_nb.training import OneProcess, TrainConfig, fit
from ddpm_nb.unet import Downsample, ResBlock, SelfAttention, UNet, Upsample

TINY = {"image_size": 8, "in_channels": 1, "context_dim": 6, "base_channels": 8, "attn_resolutions": (8, 4), "n_heads": 2, "norm_groups": 2}
SHIPPED = Path(str(files("ddpm_nb"))) / "pipelines" / "digits"


@pytest.fixture(autouse=True)
def own_seed():
    """Seed the initial weights, and leave torch's random state as it was."""
    with seeded_init(0):
        yield


def draw(*shape, seed=0):
    """Draw normal numbers."""
    return torch.randn(shape, generator=seeded(seed))


def perturbed(module, scale=0.1):
    """Move every parameter a little, those that start at zero included."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=seeded(parameter.numel())))
    return module


def tiny(**changes):
    return perturbed(TextUNet(**{**TINY, **changes})).eval()


# Cross-attention


@pytest.mark.parametrize("n_heads", [1, 2, 8])
def test_attention_is_pytorchs(n_heads):
    attention, x, words = CrossAttention(16, 6, n_heads=n_heads), draw(2, 9, 16), draw(2, 5, 6, seed=1)
    heads = lambda z: z.view(2, -1, n_heads, 16 // n_heads).transpose(1, 2)
    q, k, v = heads(attention.q(x)), heads(attention.k(words)), heads(attention.v(words))
    expected = attention.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 9, 16))
    torch.testing.assert_close(attention(x, words), expected)


def test_weights_are_weights():
    weights = CrossAttention(16, 6).weights(10 * draw(3, 7, 16), draw(3, 5, 6, seed=1))
    assert weights.shape == (3, 4, 7, 5)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 7))


def test_a_question_of_length_zero_hears_the_mean():
    attention, words = CrossAttention(16, 6), draw(2, 5, 6)
    told = attention(torch.zeros(2, 3, 16), words)
    torch.testing.assert_close(told, attention.out(attention.v(words).mean(1, keepdim=True)).expand(2, 3, 16))


def test_a_long_question_hears_one_word():
    attention, words = CrossAttention(16, 6, n_heads=1), draw(2, 5, 6)
    x = 1e4 * draw(2, 3, 16, seed=1)
    heard = attention.weights(x, words)[:, 0].argmax(-1)  # (2, 3)
    values = attention.v(words).gather(1, heard[..., None].expand(2, 3, 16))
    torch.testing.assert_close(attention(x, words), attention.out(values), rtol=1e-3, atol=1e-4)


def test_order_of_words_does_not_matter():
    attention, x, words, order = CrossAttention(16, 6), draw(2, 3, 16), draw(2, 5, 6, seed=1), torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(attention(x, words[:, order]), attention(x, words))
    torch.testing.assert_close(attention.weights(x, words[:, order]), attention.weights(x, words)[..., order])


def test_attention_refuses():
    for name, value in (("n_heads", 3), ("n_heads", 0), ("context_dim", 0), ("channels", 0)):
        refuses(lambda name=name, value=value: CrossAttention(**{"channels": 16, "context_dim": 6, name: value}), name)


# The transformer block


def test_transformer_begins_as_identity():
    block, x = SpatialTransformer(16, 6), draw(2, 16, 4, 4)
    assert torch.equal(block(x, draw(2, 5, 6)), x)


def test_transformer_does_not_know_places():
    block, x, words, order = perturbed(SpatialTransformer(16, 6)), draw(2, 16, 4, 4), draw(2, 5, 6), torch.randperm(16, generator=seeded(0))
    shuffled = x.flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(block(shuffled, words).flatten(2), block(x, words).flatten(2)[..., order])


def test_every_step_of_the_transformer_counts():
    block, x, words = perturbed(SpatialTransformer(16, 6)), draw(2, 16, 4, 4), draw(2, 5, 6)
    whole = block(x, words)
    for part in (block.positions.out, block.words.out, block.think[-1]):
        kept = [p.detach().clone() for p in part.parameters()]
        with torch.no_grad():
            [p.zero_() for p in part.parameters()]
        assert (block(x, words) - whole).abs().max() > 1e-4
        with torch.no_grad():
            [p.copy_(k) for p, k in zip(part.parameters(), kept, strict=True)]
    torch.testing.assert_close(block(x, words), whole)


def test_transformer_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="norm_groups"):
        SpatialTransformer(16, 6, norm_groups=5)


# The U-Net


LAYOUTS = [{}, {"attn_resolutions": ()}, {"attn_resolutions": (4,)}, {"channel_mults": (1,)}, {"in_channels": 4, "n_res_blocks": 2}]


@pytest.mark.parametrize("changes", LAYOUTS)
def test_transformers_stand_where_attention_stood(changes):
    options = {**TINY, **changes}
    net = TextUNet(**options)
    plain = UNet(**{k: v for k, v in net.config.items() if k != "context_dim"})
    count = lambda model, kind: sum(isinstance(m, kind) for m in model.modules())
    assert count(net, SpatialTransformer) == count(plain, SelfAttention) > 0
    assert count(net, SelfAttention) == 0
    for kind in (ResBlock, Downsample, Upsample):
        assert count(net, kind) == count(plain, kind)
    assert all(isinstance(level, TextLevel) for level in (*net.down, net.mid, *net.up))
    x = draw(2, options["in_channels"], 8, 8)
    assert net(x, torch.tensor([0, 9]), draw(2, 5, 6)).shape == x.shape


def test_network_begins_deaf():
    net, x, t = TextUNet(**TINY), draw(2, 1, 8, 8), torch.tensor([3, 700])
    perturbed(net.conv_out)
    [perturbed(m.conv_2) for m in net.modules() if isinstance(m, ResBlock)]
    assert net(x, t, draw(2, 5, 6)).abs().max() > 0
    assert torch.equal(net(x, t, draw(2, 5, 6)), net(x, t, draw(2, 7, 6, seed=1)))


def test_entrances():
    net, x, t, words = tiny(), draw(2, 1, 8, 8), torch.tensor([3, 700]), draw(2, 5, 6)
    first, other = words.clone(), words.clone()
    first[:, 0] += 1
    other[:, 4] += 1
    moved = lambda changed: (net(x, t, changed) - net(x, t, words)).abs().max()
    assert min(moved(first), moved(other)) > 1e-4
    for m in net.modules():
        if isinstance(m, SpatialTransformer):
            nn.init.zeros_(m.leave.weight), nn.init.zeros_(m.leave.bias)
    assert moved(other) == 0 < moved(first)
    nn.init.zeros_(net.sentence.weight)
    assert moved(first) == 0


def test_each_image_hears_its_own_sentence():
    net, x, t, words = tiny(), draw(3, 1, 8, 8), torch.tensor([3, 700, 5]), draw(3, 5, 6)
    changed = words.clone()
    changed[1] += 1
    moved = (net(x, t, changed) - net(x, t, words)).abs().amax((1, 2, 3))
    assert moved[1] > 1e-4
    assert max(moved[0], moved[2]) < 1e-6


def test_every_parameter_learns():
    net = perturbed(TextUNet(**TINY))
    net(draw(2, 1, 8, 8), torch.tensor([3, 700]), draw(2, 5, 6)).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_config_rebuilds_the_network(tmp_path):
    net = tiny()
    again = TextUNet(**json.loads(json.dumps(net.config)))
    again.load_state_dict(net.state_dict())
    args = draw(2, 1, 8, 8), torch.tensor([3, 40]), draw(2, 5, 6)
    assert torch.equal(again.eval()(*args), net(*args))
    save_parts(tmp_path / "net", {"unet": net})
    loaded = load_parts(tmp_path / "net", (TextUNet,))[0]["unet"]
    assert torch.equal(loaded(*args), net(*args))
    assert loaded.config == net.config


def test_network_refuses_contexts():
    net, x, t = TextUNet(**TINY), draw(2, 1, 8, 8), torch.tensor([0, 1])
    for context in (draw(2, 5, 7), draw(1, 5, 6), draw(2, 6), "a seven", None):
        refuses(lambda context=context: net(x, t, context), "context must have shape (2, L, 6)")
    refuses(lambda: TextUNet(**{**TINY, "context_dim": 0}), "context_dim")


# A class


CLASSES = {"image_size": 8, "in_channels": 1, "base_channels": 8, "channel_mults": (1, 2), "n_res_blocks": 1, "attn_resolutions": (), "norm_groups": 2}


def class_net(**changes):
    return perturbed(ClassUNet(3, **{**CLASSES, **changes})).eval()


def test_a_new_class_network_is_the_network_without_classes():
    with seeded_init(3):
        plain = perturbed(UNet(**CLASSES)).eval()
    with seeded_init(3):
        net = ClassUNet(3, **CLASSES).eval()
    net.load_state_dict(plain.state_dict() | {"classes.weight": net.classes.weight})
    x, t = draw(2, 1, 8, 8), torch.tensor([3, 700])
    for labels in (None, torch.tensor([0, 2]), torch.tensor([3, 1])):
        assert torch.equal(net(x, t, labels), plain(x, t))


def test_a_class_is_added_to_the_time():
    net, x, t, labels = class_net(), draw(3, 1, 8, 8), torch.tensor([3, 700, 5]), torch.tensor([2, 0, 3])
    rows = net.classes.weight[[2, 0, 3]]
    assert torch.equal(net(x, t, labels), net.walk(x, F.silu(net.embed_time(x, t) + rows)))
    assert net.classes.weight.shape == (4, 32)
    assert torch.equal(net(x, t), net(x, t, torch.full((3,), 3)))
    assert torch.equal(net(x, t, labels.int()), net(x, t, labels))
    moved = (net(x, t, labels) - net(x, t, torch.tensor([2, 1, 3]))).abs().amax((1, 2, 3))
    assert moved[1] > 1e-4
    assert max(moved[0], moved[2]) < 1e-6


def test_a_class_network_takes_the_options_of_a_unet():
    options = {name: p.default for name, p in inspect.signature(UNet).parameters.items()}
    own = {name: p.default for name, p in inspect.signature(ClassUNet).parameters.items()}
    assert own == {"n_classes": inspect.Parameter.empty} | options
    changes = {"out_channels": 2, "n_heads": 2, "dropout": 0.3, "upsampling": "transposed", "time_layout": "cos_first", "norm_eps": 1e-3}
    net = ClassUNet(3, **CLASSES | changes)
    assert net.config == {"n_classes": 3} | UNet(**CLASSES | changes).config


@pytest.mark.parametrize("objective", ["eps", "v"])
def test_a_class_network_is_saved_loaded_and_sampled(tmp_path, objective):
    net, schedule = class_net(), make_schedule("cosine", 20)
    save_pretrained(tmp_path / "net", net, schedule, objective=objective)
    again, schedule = load_pretrained(tmp_path / "net")
    x, t, labels = draw(3, 1, 8, 8), torch.tensor([3, 17, 5]), torch.tensor([2, 0, 3])
    eps_hat = output_to_eps(schedule, objective, x, t, net(x, t, labels))
    assert torch.equal(again(x, t, labels), eps_hat)
    assert torch.equal(partial(again, labels=labels)(x, t), eps_hat)
    for scale in (0, 1, 2.5):
        options = {"n_steps": 4, "x_T": x}
        one = sample_ddim(of_class(again, 2, scale), schedule, x.shape, **options)
        each = sample_ddim(of_class(again, torch.full((3,), 2), scale), schedule, x.shape, **options)
        by_hand = sample_ddim(guided(again, torch.full((3,), 2), torch.tensor([3]), scale), schedule, x.shape, **options)
        assert torch.equal(one, each)
        assert torch.equal(one, by_hand)
    assert not torch.equal(one, sample_ddim(of_class(again, 1, scale), schedule, x.shape, **options))


@pytest.mark.parametrize("scale", [0, 0.3, 1, 2.5])
def test_guidance_of_classes_is_that_of_words(scale):
    net, x, t, labels = class_net(), draw(3, 1, 8, 8), torch.tensor([3, 700, 5]), torch.tensor([2, 0, 1])
    expected = scale * net(x, t, labels) + (1 - scale) * net(x, t)
    for null in (torch.tensor([3]), torch.full((3,), 3)):
        torch.testing.assert_close(guided(net, labels, null, scale)(x, t), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(of_class(net, labels, scale)(x, t), expected, rtol=1e-4, atol=1e-5)


def test_class_networks_refuse():
    net, x, t = class_net(), draw(2, 1, 8, 8), torch.tensor([3, 700])
    for labels in (torch.tensor([0, 4]), torch.tensor([-1, 0]), torch.tensor([0]), torch.tensor(2), torch.tensor([0.0, 1.0]), torch.tensor([True, False]), [0, 1], 2):
        refuses(lambda labels=labels: net(x, t, labels), "labels must be (2,) whole numbers in 0..2, or 3 for no class")
    assert net(x, t, torch.tensor([2, 3], dtype=torch.uint8)).equal(net(x, t, torch.tensor([2, 3])))
    for labels in (3, -1, torch.tensor([0, 3]), 1.5, True):
        refuses(lambda labels=labels: of_class(net, labels), "labels must be whole numbers in 0..2")
    refuses(lambda: of_class(net, 1, -1), "scale")
    refuses(lambda: of_class(UNet(**CLASSES), 1), "model must be told classes; UNet is not", error=TypeError)
    refuses(lambda: of_class(net, torch.tensor([1, 2]))(draw(3, 1, 8, 8), torch.tensor([3, 7, 5])), "labels must be one class, or one for each of 3 images; got shape (2,)")
    for bad in (torch.tensor([3, 3]), torch.tensor([3.0]), 3, None):
        refuses(lambda bad=bad: guided(net, torch.tensor([0, 1, 2]), bad, 2), "null_context must be the number of no class")
    for n in (0, 1, 2.0):
        refuses(lambda n=n: ClassUNet(n, **CLASSES), "n_classes", error=(ValueError, TypeError))


def test_a_network_of_others_is_told_a_class_but_not_guided():
    sizes = {"image_size": 8, "in_channels": 1, "out_channels": 1, "widths": (8, 8), "time_dim": 8, "norm_groups": 4}
    peer = PeerUNet(**sizes, down_attention=(False, False), up_attention=(False, False), mid_attention=False, n_classes=3).eval()
    peer = perturbed(peer)
    x, t, labels = draw(2, 1, 8, 8), torch.tensor([3, 700]), torch.tensor([2, 2])
    assert torch.equal(of_class(peer, 2)(x, t), peer(x, t, labels))
    refuses(lambda: of_class(peer, 2, 3), "scale must be 1", "no row for no class")


def test_a_class_network_without_classes_takes_the_steps_of_a_unet():
    net, x = class_net(), draw(2, 1, 8, 8)
    told = net(x, torch.tensor([3, 7]))
    for t in (torch.tensor([3.0, 7.0]), torch.tensor([3, 7], dtype=torch.uint8)):
        torch.testing.assert_close(net(x, t), told)
    refuses(lambda: net(x, 5), "t must be a tensor of shape (2,)", error=(TypeError, ValueError))


def test_a_compiled_class_network_is_guided():
    net, x, t = class_net(), draw(2, 1, 8, 8), torch.tensor([3, 700])
    compiled = torch.compile(net, backend="eager")
    assert torch.equal(of_class(compiled, 2, 3.0)(x, t), of_class(net, 2, 3.0)(x, t))


# Training on classes


class Told(nn.Module):
    """Note what it is told about images whose grey level is their class."""

    n_classes = 5

    def __init__(self):
        super().__init__()
        self.scale, self.told = nn.Parameter(torch.zeros(1)), []

    def forward(self, x, t, labels):
        self.told.append(labels)
        return self.scale * x


class Labeled(Dataset):
    """Read one at a time."""

    flip = True

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index]


class Half(OneProcess):
    """Pretend to be one of two processes."""

    n = 2

    def __init__(self, rank):
        self.rank = rank

    def share(self, values):
        return values.chunk(2)[self.rank]


def five_classes(n=403, kind="memory"):
    levels = torch.arange(n)[:, None, None, None].expand(n, 1, 4, 4) % 5
    data = ImageDataset(levels, torch.arange(n) % 5, n_levels=5, classes="abcde", flip=True)
    return data if kind == "memory" else Labeled(data)


def what_it_was_told(data, processes=None, **changes):
    """Train, and return the classes of the images and what the network was told, (n_iterations, B)."""
    model, classes = Told(), []

    def loss(predict, schedule, x_0, *, t, eps, reduction):
        classes.append(((x_0[:, 0, 0, 0] + 1) * 2).round().long())
        return (predict(x_0, t) - eps).square().flatten(1).mean(1)

    config = TrainConfig(**{"n_iterations": 50, "batch_size": 80, "precision": "float32", "conditional": "class", **changes})
    options = {"processes": processes, "loss": loss, "progress": False}
    fit(model, make_schedule("linear", 10), data, config, **options)
    return torch.cat(classes), torch.cat(model.told)


@pytest.mark.parametrize("kind", ["memory", "one by one"])
@pytest.mark.parametrize("n_accumulate", [1, 4])
def test_each_image_comes_with_its_class_or_none(kind, n_accumulate):
    classes, told = what_it_was_told(five_classes(kind=kind), n_accumulate=n_accumulate)
    dropped = told == 5
    assert len(told) == 4000
    assert told[~dropped].equal(classes[~dropped])
    assert abs(dropped.double().mean() - 0.1) < 5 * (0.1 * 0.9 / 4000) ** 0.5
    in_one, _ = what_it_was_told(five_classes())
    assert classes.equal(in_one)


def test_labels_are_dropped_as_often_as_asked():
    for share, expected in ((0.0, 0), (1 - 1e-12, 4000)):
        assert (what_it_was_told(five_classes(), label_dropout=share)[1] == 5).sum() == expected


def test_processes_drop_the_labels_that_one_would():
    classes, told = what_it_was_told(five_classes())
    halves = [what_it_was_told(five_classes(), Half(rank)) for rank in (0, 1)]
    for whole, first, second in zip((classes, told), *halves, strict=True):
        assert torch.cat([first.view(50, 40), second.view(50, 40)], 1).flatten().equal(whole)


def test_a_run_without_classes_is_as_it_was():
    images, schedule = five_classes().images(), make_schedule("linear", 10)
    config = TrainConfig(n_iterations=3, batch_size=8, precision="float32")
    losses = []
    for dropout in (0.1, 0.9):
        with seeded_init(0):
            net = UNet(**CLASSES | {"image_size": 4})
        losses.append(fit(net, schedule, images, replace(config, label_dropout=dropout), progress=False).losses)
    assert losses[0].equal(losses[1])


def test_training_on_classes_refuses():
    data, schedule = five_classes(), make_schedule("linear", 10)
    config = TrainConfig(n_iterations=2, batch_size=8, precision="float32", conditional="class")
    train_on = lambda data, model=None, config=config: fit(model or Told(), schedule, data, config, progress=False)
    refuses(lambda: train_on(data.images()), "data must hold labels to learn classes", "ImageDataset(")
    nameless = ImageDataset(data.levels, n_levels=5)
    refuses(lambda: train_on(nameless), "data must have the network's 5 classes; got 1 (all)")
    pairs = [data[i] for i in range(20)]
    for label, told in ((5, "got 5"), (-1, "got -1"), (1.5, "got 1.5"), (None, "got None"), (torch.tensor([1, 2]), "got tensor")):
        refuses(lambda label=label: train_on([(pairs[0][0], label), *pairs]), "the label of data[0] must be a whole number in 0..4", told)
    late = [*pairs, (pairs[0][0], 7), *pairs]
    long = replace(config, n_iterations=6)
    refuses(lambda: train_on(late, config=long), "the label of data[20] must be a whole number in 0..4; got 7")
    assert len(train_on([(image, torch.tensor(label)) for image, label in pairs]).losses) == 2
    plain = UNet(**CLASSES | {"image_size": 4})
    refuses(lambda: train_on(data, plain), "conditional='class' needs a network that is told a class", "got UNet", error=TypeError)
    net = ClassUNet(5, **CLASSES | {"image_size": 4})
    refuses(lambda: train_on(data, net, replace(config, conditional="none")), "ClassUNet would never be told a class")
    for name, value in (("conditional", "text"), ("label_dropout", 1), ("label_dropout", 1.1), ("label_dropout", -0.1)):
        refuses(lambda name=name, value=value: replace(config, **{name: value}), name)


def test_classes_fit_the_number_of_images():
    net = ClassUNet(5, **CLASSES | {"image_size": 4})
    x, t = draw(4, 1, 4, 4), torch.zeros(4, dtype=torch.int64)
    for labels in (torch.tensor([1, 2]), torch.tensor([[1], [2], [3], [4]])):
        refuses(lambda labels=labels: of_class(net, labels)(x, t), "labels must be one class, or one for each of 4 images; got shape")
    for labels in (1, torch.tensor([1]), torch.tensor([1, 2, 3, 4])):
        assert of_class(net, labels)(x, t).shape == x.shape


def test_a_network_learns_its_classes():
    patterns, labels = draw(5, 1, 4, 4).sign(), torch.arange(400) % 5
    data = ImageDataset((patterns[labels] > 0).long(), labels, n_levels=2, classes="abcde")
    with seeded_init(0):
        net = ClassUNet(5, **CLASSES | {"image_size": 4, "base_channels": 16})
    config = TrainConfig(n_iterations=200, batch_size=40, lr=1e-2, ema_decay=0.9, precision="float32", conditional="class")
    schedule = make_schedule("cosine", 50)
    net = fit(net, schedule, data, config, progress=False).ema
    labels = torch.arange(5).repeat_interleave(6)
    nearest = lambda x: torch.cdist(x.flatten(1), patterns.flatten(1)).argmin(1)
    x = sample_ddim(of_class(net, labels), schedule, (30, 1, 4, 4), n_steps=10, generator=seeded(0))
    assert (nearest(x) == labels).double().mean() > 0.45  # chance is 0.2 +- 0.07
    x = sample_ddim(net, schedule, (30, 1, 4, 4), n_steps=10, generator=seeded(0))  # told none: any class
    assert len(nearest(x).unique()) >= 4


# Dropping captions


def test_dropped_rows_are_dropped_as_a_whole():
    context, null = torch.ones(20_000, 4, 2), torch.zeros(1, 4, 2)
    kept = drop_context(context, null, 0.2, generator=seeded(0)).mean((1, 2))
    assert set(kept.tolist()) == {0.0, 1.0}
    assert abs(float((kept == 0).double().mean()) - 0.2) < 5 * (0.2 * 0.8 / 20_000) ** 0.5


def test_classes_are_dropped_one_by_one():
    labels = torch.arange(3).repeat(100)
    dropped = drop_context(labels, torch.tensor([3]), 0.5, generator=seeded(0))
    assert dropped.shape == labels.shape and ((dropped == labels) | (dropped == 3)).all() and 3 in dropped


def test_drop_none_and_all():
    context, null = draw(50, 4, 2), draw(1, 4, 2, seed=1)
    assert torch.equal(drop_context(context, null, 0), context)
    assert torch.equal(drop_context(context, null, 1), null.expand_as(context))


def test_drop_follows_its_generator():
    context, null = draw(50, 4, 2), draw(1, 4, 2, seed=1)
    before = torch.get_rng_state()
    first, again, other = (drop_context(context, null, 0.5, generator=seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_drop_and_guidance_refuse():
    context, null = draw(5, 4, 2), draw(1, 4, 2)
    for value in (-0.1, 1.1, float("nan")):
        refuses(lambda value=value: drop_context(context, null, value), "probability")
    for value in (-1, float("inf"), float("nan")):
        refuses(lambda value=value: guided(linear_model, context, null, value), "scale")
    for bad in (draw(1, 3, 2), draw(4, 2), draw(2, 4, 2), None):
        for call in (lambda bad=bad: drop_context(context, bad, 0.5), lambda bad=bad: guided(tiny(), context, bad, 2)):
            refuses(call, "null_context must have shape (1, 4, 2)")
    refuses(lambda: guided(tiny(), draw(4, 2), null, 2), "context must have shape (B, L, D)")


# Guidance


def linear_model(x_t, t, context):
    """Depend on everything, differently for each image."""
    return x_t * context.mean((1, 2))[:, None, None, None] + t[:, None, None, None] + context[:, 0, :1, None, None]


def test_scale_one_and_zero_call_once():
    context, null, x, t, calls = draw(3, 4, 2), draw(1, 4, 2, seed=1), draw(3, 1, 2, 2), torch.tensor([1, 2, 3]), []

    def model(x_t, t, context):
        calls.append(len(x_t))
        return linear_model(x_t, t, context)

    assert torch.equal(guided(model, context, null, 1)(x, t), linear_model(x, t, context))
    assert torch.equal(guided(model, context, null, 0)(x, t), linear_model(x, t, null.expand(3, 4, 2)))
    guided(model, context, null, 2.5)(x, t)
    assert calls == [3, 3, 6]


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.5, 8])
def test_guidance_extrapolates(scale):
    context, null, x, t = draw(3, 4, 2), draw(1, 4, 2, seed=1), draw(3, 1, 2, 2), torch.tensor([1, 2, 3])
    given, without = linear_model(x, t, context), linear_model(x, t, null.expand(3, 4, 2))
    out = guided(linear_model, context, null, scale)(x, t)
    torch.testing.assert_close(out, scale * given + (1 - scale) * without)
    w = scale - 1  # Ho and Salimans 2022, equation 6
    torch.testing.assert_close(out, (1 + w) * given - w * without)


def test_guidance_pushes_the_noise_and_not_a_learned_variance():
    both = lambda x, t, context: torch.cat([context.mean((1, 2)).view(-1, 1, 1, 1).expand_as(x), 0.3 * context[:, :1, :1, None].expand_as(x)], 1)
    context, null, x, t = draw(3, 4, 2), draw(1, 4, 2, seed=1), draw(3, 1, 2, 2), torch.tensor([1, 2, 3])
    given, without = both(x, t, context), both(x, t, null.expand(3, 4, 2))
    out = guided(both, context, null, 4.0)(x, t)
    assert out.shape == (3, 2, 2, 2)
    torch.testing.assert_close(out[:, :1], (4 * given - 3 * without)[:, :1])
    assert torch.equal(out[:, 1:], given[:, 1:])


def test_one_call_is_two_calls():
    net, context, null, x, t = tiny(), draw(2, 5, 6), draw(1, 5, 6, seed=1), draw(2, 1, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        given, without = net(x, t, context), net(x, t, null.expand_as(context))
        torch.testing.assert_close(guided(net, context, null, 3)(x, t), without + 3 * (given - without), rtol=1e-4, atol=1e-5)


def test_points_are_guided():
    model = lambda x, t, labels: x * labels[:, None]
    x, labels = draw(3, 2), torch.tensor([0, 1, 2])
    expected = 3 * x + 2.0 * (x * labels[:, None] - 3 * x)
    assert torch.equal(guided(model, labels, torch.tensor([3]), 2.0)(x, torch.tensor([5, 5, 5])), expected)


def test_null_of_each_image():
    context, nulls, x, t = draw(3, 4, 2), draw(3, 4, 2, seed=1), draw(3, 1, 2, 2), torch.tensor([1, 2, 3])
    whole = guided(linear_model, context, nulls, 2)(x, t)
    for i in range(3):
        one = guided(linear_model, context[i : i + 1], nulls[i : i + 1], 2)(x[i : i + 1], t[i : i + 1])
        torch.testing.assert_close(whole[i : i + 1], one)


# Words, loss and training


def text_parts(length=6, n_words=9):
    """Make a text encoder and tokens of 20 images with 3 captions each."""
    encoder = perturbed(TextEncoder(n_words, length, dim=6, n_heads=2)).eval().requires_grad_(False)
    tokens = torch.randint(3, n_words, (20, 3, length), generator=seeded(0))
    tokens[..., 0], tokens[..., 4:] = BEGIN, PADDING
    return encoder, tokens


def test_encoded_words():
    encoder, tokens = text_parts()
    words, null = encode_words(encoder, tokens)
    assert words.shape == (20, 3, 6, 6)
    assert not words.requires_grad
    torch.testing.assert_close(words[4, 2], encoder(tokens[4, 2:])[0])
    torch.testing.assert_close(null, encoder(torch.tensor([[BEGIN] + 5 * [PADDING]])))
    torch.testing.assert_close(encode_words(encoder, tokens[:, 0])[0], words[:, 0])


def test_encoding_refuses():
    encoder, _ = text_parts()
    for tokens in (torch.tensor([2, 3, 4]), torch.zeros(0, 6, dtype=torch.int64), "a seven"):
        refuses(lambda tokens=tokens: encode_words(encoder, tokens), "tokens must have shape")


def test_conditional_loss_is_the_simple_loss():
    net, schedule, x, words, null = tiny(), make_schedule("cosine", 50), draw(6, 1, 8, 8), draw(6, 5, 6), draw(1, 5, 6, seed=1)
    for drop, context in ((0, words), (1, null.expand_as(words))):
        g = seeded(5)
        torch.rand(6, generator=g)  # what the choice of the rows draws
        expected = simple_loss(partial(net, context=context), schedule, x, generator=g)
        torch.testing.assert_close(conditional_loss(net, schedule, x, words, null, drop=drop, generator=seeded(5)), expected)
    with pytest.raises(ValueError, match="drop"):
        conditional_loss(net, schedule, x, words, null, drop=2)


def train_tiny(tokens, encoder, *, drop=0.1, **changes):
    """Train a tiny network on twenty images."""
    torch.manual_seed(1)
    config = TrainConfig(**{"n_iterations": 4, "batch_size": 8, "warmup": 1, "precision": "float32", **changes})
    x, losses = draw(20, 1, 8, 8).clamp(-1, 1), []
    note = lambda i, loss, average: losses.append(float(loss))
    return train_conditional(TextUNet(**TINY), make_schedule("cosine", 50), x, tokens, encoder, config, drop=drop, callback=note), losses


def test_training_repeats_itself():
    encoder, tokens = text_parts()
    (first, losses), (again, same), (other, _) = (train_tiny(tokens, encoder, seed=seed) for seed in (0, 0, 1))
    assert losses == same
    assert len(losses) == 4
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    assert not first.training
    assert not any(p.requires_grad for p in first.parameters())


def test_dropout_follows_the_seed_and_leaves_the_global_stream():
    encoder, tokens = text_parts()
    config = TrainConfig(n_iterations=3, batch_size=8, warmup=1, precision="float32")
    found = []
    for seed in (5, 6):
        with seeded_init(1):
            net = TextUNet(**TINY, dropout=0.5)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        net = train_conditional(net, make_schedule("cosine", 50), draw(20, 1, 8, 8), tokens, encoder, config)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(net.sentence.weight.clone())
    assert torch.equal(*found)
    net = train_conditional(net, make_schedule("cosine", 50), draw(20, 1, 8, 8), tokens, encoder, config)  # a frozen one is trained on
    assert not torch.equal(net.sentence.weight, found[0])


def test_training_leaves_the_text_encoder_alone():
    encoder, tokens = text_parts()
    encoder.requires_grad_(True)
    before, drawn = [p.detach().clone() for p in encoder.parameters()], tokens.clone()
    torch.manual_seed(1)
    net, state = TextUNet(**TINY), torch.get_rng_state()
    config = TrainConfig(n_iterations=3, batch_size=8, warmup=1, precision="float32")
    train_conditional(net, make_schedule("cosine", 50), draw(20, 1, 8, 8), tokens, encoder, config)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(tokens, drawn)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, encoder.parameters(), strict=True))


def test_with_full_dropout_captions_do_not_matter():
    encoder, tokens = text_parts()
    other = tokens.clone()
    other[..., 1:4] = 3
    nearly = 1 - 1e-12
    assert train_tiny(tokens, encoder, drop=nearly)[1] == train_tiny(other, encoder, drop=nearly)[1]
    assert train_tiny(tokens, encoder, drop=0)[1] != train_tiny(other, encoder, drop=0)[1]


def test_training_hears_captions():
    encoder, tokens = text_parts()
    torch.manual_seed(1)
    tokens[:10, :, 1:4], tokens[10:, :, 1:4] = 3, 4
    x = torch.cat([torch.full((10, 1, 8, 8), 0.9), torch.full((10, 1, 8, 8), -0.9)])
    config = TrainConfig(n_iterations=60, batch_size=16, warmup=5, lr=1e-2, ema_decay=0.9, precision="float32")
    schedule = make_schedule("cosine", 50)
    net = train_conditional(TextUNet(**TINY), schedule, x, tokens, encoder, config)
    words, null = encode_words(encoder, tokens[:, 0])
    loss = lambda c, drop: float(conditional_loss(net, schedule, x, c, null, drop=drop, generator=seeded(0)))
    with torch.no_grad():
        told, untold, wrong = loss(words, 0), loss(words, 1), loss(words.flip(0), 0)
    assert told < 0.9 * untold < 0.9 * wrong


def test_training_refuses():
    encoder, good = text_parts()
    x, whole, schedule = draw(20, 1, 8, 8), torch.int64, make_schedule("cosine", 50)
    net = TextUNet(**TINY)
    before = [p.detach().clone() for p in net.parameters()]

    def train(x=x, tokens=good, drop=0.1, **options):
        config = TrainConfig(**{"n_iterations": 1, "batch_size": 4, **options})
        return lambda: train_conditional(net, schedule, x, tokens, encoder, config, drop=drop)

    refuses(train(x=draw(20, 8, 8)), "x_0 must have shape")
    refuses(train(x=draw(0, 1, 8, 8), tokens=torch.zeros(0, 3, 6, dtype=whole)), "x_0 must have shape")
    refuses(train(tokens=torch.zeros(19, 3, 6, dtype=whole)), "tokens must have shape (20, K, L)")
    refuses(train(tokens=torch.zeros(20, 3, 6)), "dtype torch.int64; got", "torch.float32")
    refuses(train(tokens=torch.zeros(20, 6, dtype=whole)), "tokens must have shape")
    refuses(train(tokens="a seven"), "got str")
    refuses(train(objective="v"), "objective='eps'")
    refuses(train(n_accumulate=2), "n_accumulate=1")
    refuses(train(precision="float16"), "float16")
    refuses(train(variance="learned"), "variance='fixed'")
    refuses(train(conditional="class"), "conditional='none'")
    refuses(train(drop=1.5), "drop must be")
    refuses(train(drop=1), "drop must be finite and in [0, 1); got 1")
    config = TrainConfig(n_iterations=1, batch_size=4)
    refuses(lambda: train_conditional(net, schedule, x, good, encoder, config, callback=5), "callback must be callable", error=TypeError)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


# Attention maps


def test_maps_are_weights_and_the_network_is_as_before():
    net, x, t, words = tiny(), draw(2, 1, 8, 8), torch.tensor([3, 700]), draw(2, 5, 6)
    before = net(x, t, words)
    maps = attention_maps(net, x, t, words)
    assert maps.shape == (2, 5, 8, 8)
    torch.testing.assert_close(maps.sum(1), torch.ones(2, 8, 8))
    assert torch.equal(net(x, t, words), before)
    assert not any(m._forward_hooks for m in net.modules())


def test_maps_of_one_layer_are_its_weights():
    net = tiny(channel_mults=(1,), attn_resolutions=())  # the middle alone attends
    x, t, words, given = draw(2, 1, 8, 8), torch.tensor([3, 700]), draw(2, 5, 6), []
    layer = net.mid.attentions[0].words
    handle = layer.register_forward_hook(lambda module, args, out: given.append(args))
    net(x, t, words)
    handle.remove()
    expected = layer.weights(*given[0]).mean(1).mT.reshape(2, 5, 8, 8)
    torch.testing.assert_close(attention_maps(net, x, t, words), expected)
    torch.testing.assert_close(attention_maps(net, x, t, words, side=8), expected)


def test_maps_by_side():
    net, args = tiny(), (draw(2, 1, 8, 8), torch.tensor([3, 700]), draw(2, 5, 6))
    coarse, fine, both = (attention_maps(net, *args, side=side) for side in (4, 8, None))
    n = [sum(isinstance(m, SpatialTransformer) for m in level.modules()) for level in (*net.down, net.mid, *net.up)]
    n_fine = n[0] + n[-1]
    torch.testing.assert_close(both, (n_fine * fine + (sum(n) - n_fine) * coarse) / sum(n))
    with pytest.raises(ValueError, match="side must be that of a layer that attends, 4 or 8; got 3"):
        attention_maps(net, *args, side=3)


def test_hooks_go_when_the_network_refuses():
    net = tiny()
    with pytest.raises(ValueError, match="context"):
        attention_maps(net, draw(2, 1, 8, 8), torch.tensor([3, 700]), draw(2, 5, 7))
    assert not any(m._forward_hooks for m in net.modules())


# Scores


@pytest.fixture(scope="module")
def judged():
    """Return held-out digits with their attributes, the rule of the training digits, and the judge."""
    train, test = load_dataset("digits"), load_dataset("digits", split="test")
    rule = fit_caption_rule(train.images(), train.labels)
    return test.images(), attributes(rule, test.images(), test.labels), rule, load_classifier("digits")


def test_real_images_have_their_attributes(judged):
    images, rows, rule, classifier = judged
    right = score_attributes(images, rows, classifier, rule)
    assert right.shape == (297, 3)
    assert right[:, 1:].all()
    expected = classifier(images).argmax(1) == rows[:, 0]
    assert torch.equal(right[:, 0], expected)
    assert expected.double().mean() > 0.95


def test_what_was_not_asked_for_is_wrong(judged):
    images, rows, rule, classifier = judged
    other = torch.stack([rows[:, 0], (rows[:, 1] + 1) % 3, (rows[:, 2] + 2) % 3], 1)
    assert not score_attributes(images, other, classifier, rule)[:, 1:].any()
    mirrored = score_attributes(images.flip(3), rows, classifier, rule)
    assert mirrored[:, 2].double().mean() < 0.6 < mirrored[:, 1].double().mean()


def test_scores_clip(judged):
    images, rows, rule, classifier = judged
    once, beyond = (score_attributes(factor * images[:50], rows[:50], classifier, rule) for factor in (1, 1.001))
    assert torch.equal(once, beyond)
    refuses(lambda: score_attributes((images[:50] + 1) * 127.5, rows[:50], classifier, rule), "images must be scaled to [-1, 1]")


def test_scores_refuse(judged):
    images, rows, rule, classifier = judged
    for wanted in (rows[:5], torch.cat([rows, rows[:, :1]], 1), "a seven"):
        with pytest.raises(ValueError, match=r"wanted must have shape \(297, 3\)"):
            score_attributes(images, wanted, classifier, rule)


# The shipped network


@pytest.fixture(scope="module")
def shipped():
    parts, tensors, config = load_parts(SHIPPED, (TextEncoder, TextUNet), extra=["schedule.betas"])
    schedule = NoiseSchedule(tensors["schedule.betas"])
    facts = config["facts"]
    return parts["unet"], parts["text_encoder"], schedule, Tokenizer.from_dict(facts["tokenizer"]), CaptionRule.from_dict(facts["rule"])


def test_shipped_network_obeys_and_guidance_helps(shipped, judged):
    net, encoder, schedule, tokenizer, rule = shipped
    wanted = judged[1][torch.randperm(297, generator=seeded(1))[:60]]
    context, null = encode_words(encoder, tokenizer.encode(write_captions(wanted, template=0)))
    share = {}
    for scale in (0, 1, 3):
        x = sample_ddim(guided(net, context, null, scale), schedule, (60, 1, 8, 8), n_steps=15, generator=seeded(2))
        share[scale] = score_attributes(x, wanted, judged[3], rule).double().mean(0)
    assert share[0][0] < 0.4
    assert min(share[1][0], share[3][0]) > 0.85
    assert share[0].mean() + 0.2 < share[1].mean() < share[3].mean()


def test_shipped_maps_and_the_stroke(shipped, judged):
    """At 4 x 4 the digit's word is heard on strokes more than padding is; at 8 x 8 the slant's is, and the digit's is not."""
    net, encoder, schedule, tokenizer, _ = shipped
    tokens = tokenizer.encode(write_captions(judged[1][torch.randperm(297, generator=seeded(3))[:200]], template=0))
    context, null = encode_words(encoder, tokens)
    maps, model, place = {4: 0, 8: 0}, guided(net, context, null, 1), torch.arange(tokens.shape[1])

    def listening(x_t, t):
        for side in maps:
            maps[side] = maps[side] + attention_maps(net, x_t, t, context, side=side)
        return model(x_t, t)

    ink = (sample_ddim(listening, schedule, (200, 1, 8, 8), n_steps=10, generator=seeded(4)).clamp(-1, 1)[:, 0] + 1) / 2
    groups = {"digit": place == 3, "slant": (place > 3) & (tokens != PADDING), "padding": tokens == PADDING}

    def on_ink(side, name, ink):
        heard = (maps[side] * groups[name].expand(tokens.shape)[:, :, None, None]).sum(1)
        return (heard * ink).sum((1, 2)) / heard.sum((1, 2)) / ink.mean((1, 2))

    def excess(side, name, ink):
        return on_ink(side, name, ink) - on_ink(side, "padding", ink)

    def errors(gap):
        return float(gap.mean() / gap.std() * len(gap) ** 0.5)

    assert errors(excess(4, "digit", ink)) > 2.5
    assert errors(excess(8, "slant", ink)) > 6
    assert errors(excess(8, "slant", ink) - excess(8, "slant", ink.roll(1, 0))) > 4
    assert errors(excess(8, "digit", ink)) < -4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_network_of_another_precision_hears_the_same_words(dtype):
    """The words come from an encoder in float32, also for a copy that computes faster."""
    network, x, t, words = tiny(), draw(2, 1, 8, 8), torch.tensor([3, 900]), draw(2, 5, 6, seed=1)
    with torch.no_grad():
        exact = network(x, t, words)
        if dtype != torch.float64:
            fast = optimize_for_sampling(network, dtype)
            told, silent = (guided(fast, words, null, 2.0)(x, t) for null in (torch.zeros(1, 5, 6), words))
            assert told.dtype == torch.float32 and (told - silent).abs().max() > 1e-3
            assert (fast(x, t, words) - exact).abs().max() < 0.05 * exact.abs().max()
        other = network.to(dtype)
        assert other(x.to(dtype), t, words).equal(other(x.to(dtype), t, words.to(dtype)))
