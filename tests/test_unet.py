"""The U-Net: its properties for many configurations, its numbers against other forms, and what it refuses."""

import copy
import inspect
import itertools
import json
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.export import Dim, export
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode

import ddpm_nb.unet as unet_module
from conftest import refuses
from ddpm_nb.unet import (
    PRESETS,
    Downsample,
    Level,
    ResBlock,
    ResNetBaseline,
    SelfAttention,
    UNet,
    Upsample,
    attend_by_products,
    attend_columns,
    attend_joined,
    group_norm,
    is_plain,
    make_unet,
    unet_shapes,
    upsample_joined,
)

f64 = torch.float64
TINY = {"image_size": 8, "in_channels": 1, "base_channels": 8, "channel_mults": (1, 2), "attn_resolutions": (4,), "norm_groups": 2}
VARIANTS = {
    "plain": {},
    "one level": {"channel_mults": (1,), "attn_resolutions": (8,)},
    "transposed": {"upsampling": "transposed"},
    "cumulative": {"channel_mults": (2, 2, 2), "cumulative": True},
    "heads": {"n_heads": 2, "attn_resolutions": (8, 4)},
    "no attention": {"attn_resolutions": (), "mid_attention": False},
    "cosines first": {"time_layout": "cos_first", "freq_shift": 0.0},
    "colour": {"in_channels": 3, "out_channels": 6},
    "one block": {"n_res_blocks": 1},
    "checkpointing": {"checkpointing": True},
}
each_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


def draw(*shape, seed=0, dtype=torch.float32):
    """Draw normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def perturbed(module, scale=0.1):
    """Move every parameter a little, those that start at zero included."""
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.add_(scale * draw(*p.shape, seed=i, dtype=p.dtype))
    return module


def inputs(unet, batch=3, dtype=torch.float32):
    """Make images and steps for a network."""
    size = unet.image_size
    return draw(batch, unet.in_channels, size, size, seed=1, dtype=dtype), (torch.arange(batch) * 71) % 300


def on_meta(make):
    """Build a network of shapes without memory."""
    with torch.device("meta"):
        return make()


@contextmanager
def plainly():
    """Let every layer compute what its formula says."""
    with (
        mock.patch.object(Upsample, "forward", Upsample.forward.plain),
        mock.patch.object(SelfAttention, "forward", SelfAttention.forward.plain),
    ):
        yield


# What every U-Net does.


@each_variant
def test_a_new_network_answers_zero_and_its_config_builds_it_again(changes):
    unet = UNet(**{**TINY, **changes})
    y = unet(*inputs(unet))
    assert y.shape == (3, changes.get("out_channels", unet.in_channels), 8, 8)
    assert not y.any()
    config = json.loads(json.dumps(unet.config))
    again = UNet(**config)
    assert again.config == unet.config == config
    again.load_state_dict(unet.state_dict())
    assert {name: p.shape for name, p in again.named_parameters()} == {name: p.shape for name, p in unet.named_parameters()}


@each_variant
def test_gradients_images_and_time(changes):
    """Every parameter gets a gradient, the images of a batch keep to themselves, and each answer depends on its time."""
    unet = perturbed(UNet(**{**TINY, **changes})).double()
    x, t = inputs(unet, dtype=f64)
    y, order = unet(x, t), torch.tensor([2, 0, 1])
    y.square().mean().backward()
    assert [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()] == []
    torch.testing.assert_close(unet(x[order], t[order]), y[order], rtol=0, atol=1e-12)
    torch.testing.assert_close(unet(x[:1], t[:1]), y[:1], rtol=0, atol=1e-12)
    assert ((unet(x, t + 20) - y).abs().flatten(1).amax(1) > 1e-3).all()


@each_variant
def test_shapes_follow_the_modules(changes):
    unet = UNet(**{**TINY, **changes})
    rows = unet_shapes(unet)
    assert [row[0] for row in rows][:1] + [row[0] for row in rows][-1:] == ["conv_in", "conv_out"]
    assert rows == unet_shapes(on_meta(lambda: UNet(**{**TINY, **changes})))
    assert not any(m._forward_hooks for m in unet.modules())
    blocks = [m for m in unet.modules() if isinstance(m, ResBlock | SelfAttention | Downsample | Upsample)]
    assert len(rows) == len(blocks) + 2


@settings(deadline=None, max_examples=12)
@given(
    mults=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    quarters=st.integers(1, 3),
    n_res_blocks=st.integers(1, 2),
    attention=st.sets(st.sampled_from([1, 2, 3, 4, 6, 8])),
    upsampling=st.sampled_from(["nearest", "transposed"]),
    cumulative=st.booleans(),
)
def test_every_size_that_can_be_halved_works(mults, quarters, n_res_blocks, attention, upsampling, cumulative):
    size = quarters * 2 ** (len(mults) - 1)
    unet = UNet(size, 1, 4, mults, n_res_blocks, attention, norm_groups=2, upsampling=upsampling, cumulative=cumulative)
    x, t = draw(2, 1, size, size), torch.tensor([3, 500])
    assert unet(x, t).shape == x.shape
    factors = torch.tensor(mults).cumprod(0).tolist() if cumulative else mults
    down = {name: channels for name, _, channels, _ in unet_shapes(unet) if name.startswith("down") and "blocks" in name}
    assert [down[f"down.{i}.blocks.0"] for i in range(len(mults))] == [4 * m for m in factors]


def test_copies_of_the_way_down_come_back_in_reverse_order():
    """The last channels of what each block of the way up is given are a copy of what the way down made."""
    unet = perturbed(UNet(16, 1, 16, (1, 2, 2), attn_resolutions=(8,), norm_groups=4))
    makers = [unet.conv_in]  # `attentions` holds the identity where a level does not attend
    for level in unet.down:
        makers += [*level.attentions, *([level.resample] if level.resample else [])]
    takers = [block for level in unet.up for block in level.blocks]
    copies, taken = [], []
    for layer in makers:
        layer.register_forward_hook(lambda layer, args, out: copies.append(out))
    for block in takers:
        block.register_forward_hook(lambda block, args, out: taken.append(args[0]))
    unet(*inputs(unet))
    assert len(copies) == len(taken) == len(makers)
    for h, made in zip(taken, reversed(copies), strict=True):
        assert torch.equal(h[:, -made.shape[1] :], made)


def test_attends_where_it_is_told_to():
    unet = UNet(**{**TINY, "image_size": 16, "channel_mults": (1, 1, 1), "attn_resolutions": (16, 4), "mid_attention": False})
    attended = [(name, side) for name, kind, _, side in unet_shapes(unet) if kind == "SelfAttention"]
    assert unet_shapes(copy.deepcopy(unet).bfloat16()) == unet_shapes(unet)
    assert {side for _, side in attended} == {16, 4}
    assert len(attended) == 2 * (2 + 3)


def test_dropout_acts_in_training_only():
    unet = perturbed(UNet(**TINY, dropout=0.5))
    x, t = inputs(unet)
    assert not torch.allclose(unet(x, t), unet(x, t), atol=1e-3)
    unet.eval()
    assert torch.equal(unet(x, t), unet(x, t))


def test_epsilon_reaches_every_normalisation():
    for eps, options in ((1e-6, {}), (1e-5, {"norm_eps": 1e-5})):
        assert {m.eps for m in UNet(**TINY, **options).modules() if isinstance(m, nn.GroupNorm)} == {eps}


def test_what_the_blocks_are_told_is_passed_on_as_it_is():
    """A subclass may tell them more than the time."""

    class Told(Level):
        def step(self, i, h, cond):
            heard.append(cond)
            return super().step(i, h, cond[0])

    unet, heard = perturbed(UNet(**TINY)), []
    x, t = inputs(unet)
    expected = unet(x, t)
    for level in (*unet.down, unet.mid, *unet.up):
        level.__class__ = Told
    cond = (F.silu(unet.embed_time(x, t)), "words")
    assert torch.equal(unet.walk(x, cond), expected)
    assert len(heard) == 2 * 2 + 2 + 2 * 3
    assert all(each is cond for each in heard)


# Presets.


def test_parameter_counts():
    counts = {name: sum(p.numel() for p in on_meta(lambda name=name: make_unet(name)).parameters()) for name in PRESETS}
    assert counts == {
        "ddpm-cifar10": 35_746_307,
        "ddpm-lsun": 113_673_219,
        "ddpm-celebahq": 113_673_219,
        "mnist": 1_623_169,
        "digits": 701_345,
        "small": 687_347,
    }


def test_presets_keep_the_image_and_hear_the_time():
    for name in PRESETS:
        unet = on_meta(lambda name=name: make_unet(name))
        x = torch.zeros(2, unet.in_channels, unet.image_size, unet.image_size, device="meta")
        assert unet(x, torch.zeros(2, device="meta")).shape == x.shape
        groups = [m.num_channels // m.num_groups for m in unet.modules() if isinstance(m, nn.GroupNorm)]
        assert min(groups) > 1, "a group of one channel takes the time out again"


PAPER = {  # appendix B of the paper and its code: sides of the levels, channels, dropout, residual blocks of the network
    "ddpm-cifar10": ([32, 16, 8, 4], [128, 256, 256, 256], 0.1, 8 + 2 + 12),
    "ddpm-lsun": ([256, 128, 64, 32, 16, 8], [128, 128, 256, 256, 512, 512], 0.0, 12 + 2 + 18),
    "ddpm-celebahq": ([256, 128, 64, 32, 16, 8], [128, 128, 256, 256, 512, 512], 0.0, 12 + 2 + 18),
}


@pytest.mark.parametrize("name", PAPER)
def test_presets_of_the_paper_make_its_choices(name):
    sides, widths, dropout, n_blocks = PAPER[name]
    unet = on_meta(lambda: make_unet(name))
    rows = {row[0]: row[1:] for row in unet_shapes(unet)}
    assert [rows[f"down.{i}.blocks.1"][1:] for i in range(len(sides))] == [*zip(widths, sides, strict=True)]
    attended = [(name.split(".")[0], side) for name, (kind, _, side) in rows.items() if kind == "SelfAttention"]
    assert attended == [("down", 16)] * 2 + [("mid_attention", sides[-1])] + [("up", 16)] * 3
    modules = [*unet.modules()]
    assert {(m.num_groups, m.eps) for m in modules if isinstance(m, nn.GroupNorm)} == {(32, 1e-6)}
    assert {m.p for m in modules if isinstance(m, nn.Dropout)} == {dropout}
    assert {m.mode for m in modules if isinstance(m, Upsample)} == {"nearest"}
    assert {m.n_heads for m in modules if isinstance(m, SelfAttention)} == {1}
    assert sum(isinstance(m, ResBlock) for m in modules) == n_blocks
    assert (unet.time_embedding.linear_1.in_features, unet.time_embedding.linear_2.out_features) == (128, 512)
    assert unet.config["time_layout"] == "concat"


def test_zero_layers_are_the_last_of_each_branch_and_no_others():
    unet = UNet(**TINY)
    zero = {name.removesuffix(".weight") for name, p in unet.named_parameters() if name.endswith("weight") and not p.any()}
    last = {ResBlock: "conv_2", SelfAttention: "out"}
    expected = {f"{name}.{last[type(m)]}" for name, m in unet.named_modules() if type(m) in last}
    assert zero == expected | {"conv_out"}


def test_options_replace_what_a_preset_says():
    """Every option that `make_unet` offers reaches the network, also where it counts as false; None changes nothing."""
    changes = {
        "image_size": 16,
        "in_channels": 3,
        "base_channels": 16,
        "channel_mults": [1, 1],
        "attn_resolutions": [],
        "dropout": 0.2,
        "norm_groups": 4,
        "n_heads": 2,
        "cumulative": True,
        "checkpointing": True,
        "n_res_blocks": 2,
        "norm_eps": 1e-3,
        "mid_attention": False,
        "upsampling": "transposed",
        "out_channels": 5,
        "time_layout": "cos_first",
        "freq_shift": 0.5,
    }
    assert set(inspect.signature(make_unet).parameters) == {"name", *changes}
    config = make_unet("digits", **changes).config
    assert {name: config[name] for name in changes} == changes
    assert make_unet("digits", **dict.fromkeys(changes)).config == make_unet("digits").config
    assert PRESETS["digits"].get("dropout") is None
    assert make_unet("ddpm-cifar10", image_size=8, base_channels=32, dropout=0.0).config["dropout"] == 0.0


# Blocks.


BLOCKS = [
    (lambda: SelfAttention(4, n_heads=2, norm_groups=2), 4),
    (lambda: SelfAttention(4, norm_groups=2), 4),
    (lambda: Downsample(2), 2),
    (lambda: Upsample(2), 2),
    (lambda: Upsample(2, mode="transposed"), 2),
    (lambda: group_norm(4, 2), 4),
]


def test_gradients_of_blocks():
    for make, channels in BLOCKS:
        block, x = perturbed(make().double()), draw(2, channels, 4, 4, dtype=f64).requires_grad_()
        assert torch.autograd.gradcheck(block, x)
        with plainly():
            assert torch.autograd.gradcheck(block, x)


@pytest.mark.parametrize(("a", "b"), [(4, 4), (4, 6)])
def test_residual_block_adds_to_its_skip_and_has_the_right_gradient(a, b):
    block, image = ResBlock(a, b, 3, norm_groups=2), draw(2, a, 4, 4)
    assert torch.equal(block(image, draw(2, 3)), block.skip(image))
    block = perturbed(block.double())
    x, time = draw(2, a, 3, 3, dtype=f64).requires_grad_(), draw(2, 3, seed=1, dtype=f64).requires_grad_()
    assert torch.autograd.gradcheck(block, (x, time))


# Attention, and the same with fewer products.


def by_einsum(q, k, v):
    """Attend by the definition; columns (B, heads, D, S)."""
    weights = torch.einsum("bhds,bhdr->bhsr", q, k) / q.shape[2] ** 0.5
    return torch.einsum("bhsr,bhdr->bhds", weights.softmax(-1), v)


def self_attention_by_einsum(layer, x):
    """Compute a self-attention layer by the definition, from its layers."""
    b, c, h, w = x.shape
    q, k, v = layer.qkv(layer.norm(x)).reshape(b, 3, layer.n_heads, c // layer.n_heads, h * w).unbind(1)
    return x + layer.out(by_einsum(q, k, v).reshape(x.shape))


@pytest.mark.parametrize(("d", "s", "r"), [(8, 16, 16), (3, 5, 7), (16, 1, 4), (2, 1100, 1100), (2, 1100, 3)])
def test_attention_in_columns_is_the_einsum_form(d, s, r):
    """Lengths above 1,024 take the fused kernel, the others the plain products; keys may be of another length."""
    q, (k, v) = draw(2, 2, d, s), draw(2, 2, 2, d, r, seed=1)
    torch.testing.assert_close(attend_columns(q, k, v), by_einsum(q, k, v), rtol=0, atol=1e-6)
    q, k, v = q.double(), k.double(), v.double()
    torch.testing.assert_close(attend_columns(q, k, v), by_einsum(q, k, v), rtol=0, atol=1e-14)


@pytest.mark.parametrize("s", [16, 1100])
def test_gradient_of_attention(s):
    """A derivative along a random direction, against a finite difference."""
    q, k, v = (z.requires_grad_() for z in draw(3, 1, 1, 2, s, dtype=f64))
    weights = draw(1, 1, 2, s, seed=1, dtype=f64)
    steps = draw(3, 1, 1, 2, s, seed=2, dtype=f64)
    grads = torch.autograd.grad((weights * attend_columns(q, k, v)).sum(), (q, k, v))
    slope = sum((g * d).sum() for g, d in zip(grads, steps, strict=True))
    moved = [[z + h * d for z, d in zip((q, k, v), steps, strict=True)] for h in (1e-5, -1e-5)]
    ahead, behind = ((weights * attend_columns(*parts)).sum() for parts in moved)
    torch.testing.assert_close(slope, (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-6)


FORMS = {  # every way to compute a layer: as it comes, as its formula says, and each faster form
    "as it comes": lambda layer, x: layer(x),
    "plain": lambda layer, x: type(layer).forward.plain(layer, x),
    "products": attend_by_products,
    "joined": attend_joined,
}


@pytest.mark.parametrize("shape", [(2, 8, 4, 4), (1, 8, 3, 4), (5, 4, 1, 1), (1, 2, 33, 32)])  # the last: the fused kernel
@pytest.mark.parametrize("n_heads", [1, 2])
def test_every_form_of_attention_is_the_definition(shape, n_heads):
    """Values and all gradients; the bias of the keys has no effect and, where the projections are joined, no gradient."""
    block, x = perturbed(SelfAttention(shape[1], n_heads=n_heads, norm_groups=2).double()), draw(*shape, dtype=f64).requires_grad_()
    weights, given = draw(*shape, seed=1, dtype=f64), [x, *block.parameters()]
    results = {}
    for name, form in {"definition": self_attention_by_einsum, **FORMS}.items():
        if name == "joined" and n_heads > 1:
            continue
        y = form(block, x)
        results[name] = (y, torch.autograd.grad((weights * y).sum(), given, allow_unused=True))
        torch.testing.assert_close(results[name], results["definition"], rtol=1e-10, atol=1e-12)
    fast = results["joined" if n_heads == 1 else "products"]
    assert torch.equal(results["as it comes"][0], fast[0]), "on a CPU the faster form is taken, for every batch"
    if n_heads == 1:
        grad_of_bias = fast[1][1 + [name for name, _ in block.named_parameters()].index("qkv.bias")]
        assert torch.equal(grad_of_bias[shape[1] : 2 * shape[1]], torch.zeros(shape[1], dtype=f64))


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 5, 4), (3, 3, 8, 8)])
def test_upsampling_with_joined_weights_is_repeating_and_convolving(shape):
    block, x = Upsample(3).double(), draw(*shape, dtype=f64).requires_grad_()
    plain = block.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    assert torch.equal(Upsample.forward.plain(block, x), plain)
    assert torch.equal(block(x), upsample_joined(block, x)), "on a CPU the faster form is taken"
    torch.testing.assert_close(block(x), plain, rtol=0, atol=1e-12)
    weights = draw(*plain.shape, seed=1, dtype=f64)
    given = (x, *block.parameters())
    wanted, grads = (torch.autograd.grad((weights * y).sum(), given) for y in (plain, block(x)))
    torch.testing.assert_close(grads, wanted, rtol=0, atol=1e-12)


def test_faster_forms_round_no_worse_in_bfloat16():
    up, x = Upsample(16), draw(4, 16, 8, 8)
    attention, z = perturbed(SelfAttention(64, norm_groups=8), scale=0.2), draw(4, 64, 8, 8)
    for block, image, own in ((up, x, 0), (attention, z, z.double())):
        exact = copy.deepcopy(block).double()(image.double()) - own
        with torch.autocast("cpu", torch.bfloat16):
            results = block(image), type(block).forward.plain(block, image)
        assert {y.dtype for y in results} <= {torch.bfloat16, torch.float32}
        fast, plain = ((y.double() - own - exact).square().mean() for y in results)
        assert 0 < fast < 4 * plain  # at most one bit worse: processors differ in where they round


def test_the_devices_other_than_a_cpu_take_the_plain_forms():
    unet = on_meta(lambda: UNet(**TINY))
    x, t = torch.zeros(2, 1, 8, 8, device="meta"), torch.zeros(2, device="meta")
    with mock.patch.multiple(unet_module, upsample_joined=None, attend_joined=None, attend_by_products=None):
        assert unet(x, t).shape == x.shape


# A shortcut never goes around a layer that does more than its weight and bias say.


def leaves(network):
    """List the names of the layers that have parameters of their own."""
    return [name for name, m in network.named_modules() if list(m.parameters(recurse=False))]


def bend(y):
    """Change an answer in a way that no linear layer or norm takes back."""
    return y + y.square()


class Adapter(nn.Module):
    """Wrap a layer as adapters for fine-tuning do: its weight is passed on, its answer changed."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    weight, bias = property(lambda self: self.base.weight), property(lambda self: self.base.bias)

    def forward(self, x):
        return bend(self.base(x))


class Bent(nn.Module):
    """Change a weight."""

    def forward(self, weight):
        return bend(weight)


def subclassed(layer):
    """Give a layer a class of its own."""
    kind = type(layer)
    layer.__class__ = type("Odd", (kind,), {"forward": lambda self, x: bend(kind.forward(self, x))})


def overridden(layer):
    """Give a layer a forward of its own."""
    plain = layer.forward
    layer.forward = lambda x: bend(plain(x))


def replace(network, name, layer):
    """Put another layer in a layer's place."""
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, layer)


WRAPPERS = {
    "forward hook": lambda network, name: network.get_submodule(name).register_forward_hook(lambda m, args, y: bend(y)),
    "pre-hook": lambda network, name: network.get_submodule(name).register_forward_pre_hook(lambda m, args: bend(args[0])),
    "subclass": lambda network, name: subclassed(network.get_submodule(name)),
    "own forward": lambda network, name: overridden(network.get_submodule(name)),
    "parametrisation": lambda network, name: parametrize.register_parametrization(network.get_submodule(name), "weight", Bent()),
    "adapter": lambda network, name: replace(network, name, Adapter(network.get_submodule(name))),
    "pruning": lambda network, name: prune.l1_unstructured(network.get_submodule(name), "weight", 0.5),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_acts_on_every_layer(wrapper):
    """At batches 1 and 64, in training and evaluation: the answer changes, and is that of the plain forms."""
    unet = perturbed(UNet(4, 1, 4, (1, 2), 1, (2,), norm_groups=2), 0.3)
    given = {batch: inputs(unet, batch) for batch in (1, 64)}
    with torch.no_grad():
        before = {batch: unet(*given[batch]) for batch in given}
    for name in leaves(unet):
        wrapped = copy.deepcopy(unet)
        WRAPPERS[wrapper](wrapped, name)
        with torch.no_grad(), plainly():
            plain = {batch: wrapped(*given[batch]) for batch in given}
        for batch, training in itertools.product(given, (True, False)):
            with torch.set_grad_enabled(training):
                y = wrapped.train(training)(*given[batch])
            assert (y - before[batch]).abs().max() > 1e-5, f"{wrapper} on {name} is ignored"
            torch.testing.assert_close(y, plain[batch], rtol=1e-4, atol=1e-5)


def test_wrapped_networks_train():
    """Two steps: a wrapper that computes the weight anew would fail in the second if the first graph were used."""
    for wrap in (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
    ):
        unet = perturbed(UNet(**TINY))
        for layer in (unet.up[0].resample.conv, unet.mid_attention.qkv, unet.mid_attention.out):
            wrap(layer)
        for _ in range(2):
            unet.zero_grad()
            unet(*inputs(unet)).square().mean().backward()
        assert all(p.grad is not None and p.grad.any() for p in unet.parameters())


def test_hooks_of_the_backward_pass_and_of_all_modules_are_called():
    unet, seen = perturbed(UNet(**TINY)), []
    x, t = inputs(unet)
    convolutions = [m for m in unet.modules() if isinstance(m, nn.Conv2d)]
    for m in convolutions:
        m.register_full_backward_hook(lambda m, given, got: seen.append(m))
    unet(x.requires_grad_(), t).sum().backward()
    assert len(seen) == len(convolutions) and set(seen) == set(convolutions)

    unet, seen = perturbed(UNet(**TINY)), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(m))
    try:
        unet(*inputs(unet))
    finally:
        handle.remove()
    assert {m for m in unet.modules() if isinstance(m, nn.Conv2d)} <= set(seen)


def test_only_the_convolution_that_a_shortcut_assumes_is_plain():
    """Other sizes, borders and types of weights are left to the layer."""
    make = lambda **changes: nn.Conv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1, **changes})
    assert is_plain(make(), 3) and is_plain(make(kernel_size=1, padding=0), 1)
    others = [{"padding_mode": "circular"}, {"bias": False}, {"groups": 2}, {"dilation": 2, "padding": 2}, {"kernel_size": 5, "padding": 2}]
    assert not any(is_plain(make(**changes), 3) for changes in [*others, {"stride": 2}, {"padding": 0}, {"padding": "same"}])
    assert not is_plain(nn.ConvTranspose2d(4, 4, 3, padding=1), 3)
    layer = make()
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(type("Quantised", (torch.Tensor,), {})))
    assert not is_plain(layer, 3)

    up, x = Upsample(4), draw(2, 4, 3, 3)
    up.conv = make(padding_mode="circular")  # the change that makes pictures tile
    assert torch.equal(up(x), up.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))
    assert inspect.signature(Upsample.forward) == inspect.signature(Upsample.forward.plain)


@pytest.mark.slow
def test_one_exported_program_serves_every_batch():
    unet = perturbed(UNet(**{**TINY, "n_res_blocks": 1}))
    x, t = inputs(unet, 16)
    for batch in (Dim.AUTO, Dim("batch", min=1, max=1024)):
        program = export(unet, (x, t), dynamic_shapes={"x": {0: batch}, "t": {0: batch}}).module()
        for n in (1, 2, 5, 64):
            given = inputs(unet, n)
            torch.testing.assert_close(program(*given), unet(*given), rtol=1e-4, atol=1e-5)


# Precision.


def test_statistics_of_bfloat16_are_computed_in_float32():
    """Rounding happens once, at the end: an offset of 30 would cost bfloat16 statistics most of their digits."""
    norm, x = perturbed(group_norm(8, 2)), (30 + draw(2, 8, 16, 16)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    exact = norm(x.double().float())
    torch.testing.assert_close(y.float(), exact, rtol=2**-8, atol=2**-8)
    groups = x.reshape(2, 2, -1)
    mean = groups.mean(-1, keepdim=True)  # rounded to bfloat16
    crude = (groups - mean) / (groups - mean).square().mean(-1, keepdim=True).sqrt()
    assert ((crude.reshape(x.shape).float() * norm.weight[:, None, None] + norm.bias[:, None, None]) - exact).abs().max() > 2**-5


def test_softmax_of_bfloat16_sums_in_float32():
    """Give every position the same score: 1,000 weights of 1/1000 must add up, which they do not in bfloat16."""
    q, k, v = torch.zeros(1, 1, 4, 1000), torch.zeros(1, 1, 4, 1000), torch.ones(1, 1, 4, 1000)
    y = attend_columns(*(z.bfloat16() for z in (q, k, v))).float()
    torch.testing.assert_close(y, torch.ones_like(y), rtol=0, atol=2**-7)
    total = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(1000):
        total = total + torch.ones((), dtype=torch.bfloat16)
    assert total < 600


def test_autocast_reaches_the_products_and_leaves_the_parameters():
    unet, seen = perturbed(make_unet("digits")), {}
    exact = unet(*inputs(unet))
    for name, m in unet.named_modules():
        if isinstance(m, nn.Conv2d | nn.GroupNorm):
            m.register_forward_hook(lambda m, args, y, name=name: seen.setdefault(type(m), set()).add((m.weight.dtype, y.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        y = unet(*inputs(unet))
        y.square().mean().backward()
    assert seen[nn.Conv2d] == {(torch.float32, torch.bfloat16)}
    assert {weight for weight, _ in seen[nn.GroupNorm]} == {torch.float32}
    assert {p.grad.dtype for p in unet.parameters()} == {torch.float32}
    assert (y.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("channels_last", [False, True])
def test_gpu_agrees_with_cpu(channels_last):
    unet = perturbed(UNet(**TINY, n_heads=2))
    x, t = inputs(unet)
    expected = unet(x, t)
    unet = unet.to("cuda", memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    with torch.backends.cudnn.flags(enabled=None, benchmark=None, deterministic=None, allow_tf32=False):
        torch.testing.assert_close(unet(x.cuda(), t.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_uses_a_fused_attention():
    layer, x = perturbed(SelfAttention(64, norm_groups=8)), draw(3, 64, 16, 16)
    expected = layer(x)
    backends = [nn.attention.SDPBackend.FLASH_ATTENTION, nn.attention.SDPBackend.EFFICIENT_ATTENTION]
    with nn.attention.sdpa_kernel(backends):  # raises if only the plain form would do
        y = layer.cuda().half()(x.cuda().half())
    torch.testing.assert_close(y.float().cpu(), expected, rtol=1e-2, atol=2e-2)


# Compilation, copies, checkpointing.


COMPILED = {
    "attention at one level": {},
    "attention everywhere": {"n_heads": 2, "attn_resolutions": (8, 4)},
    "transposed, no attention": {"upsampling": "transposed", "attn_resolutions": (), "mid_attention": False, "time_layout": "cos_first"},
    "dropout": {"dropout": 0.3, "time_layout": "interleaved"},
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", COMPILED.values(), ids=COMPILED)
def test_compiles_without_a_graph_break(changes):
    for training in (True, False):
        unet = perturbed(UNet(**{**TINY, **changes, "n_res_blocks": 1})).train(training)
        torch._dynamo.reset()
        with torch.set_grad_enabled(training):
            found = torch._dynamo.explain(unet)(*inputs(unet))
        assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_compiled_network_is_the_same_function(training, bf16):
    """With fullgraph=True a graph break is an error; the gradients pass through the same graph."""
    unet = perturbed(UNet(**{**TINY, "n_res_blocks": 1})).train(training)
    x, t = inputs(unet)
    torch._dynamo.reset()
    compiled = torch.compile(unet, backend="aot_eager", fullgraph=True)
    results = []
    for network in (unet, compiled):
        unet.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16), torch.set_grad_enabled(training):
            y = network(x, t)
        if training:
            y.float().square().mean().backward()
        results.append([y.detach(), *(p.grad for p in unet.parameters() if training)])
    torch.testing.assert_close(*results, **({"rtol": 0.05, "atol": 0.02} if bf16 else {}))


@pytest.mark.slow
def test_a_graph_break_would_be_counted():
    """The wrong form: a number taken out of a tensor to be looked at by Python."""
    unet = UNet(**{**TINY, "n_res_blocks": 1})
    step, unet.mid.step = unet.mid.step, lambda i, h, time: step(i, h / float(h.detach().abs().max()), time)
    torch._dynamo.reset()
    assert torch._dynamo.explain(unet)(*inputs(unet)).graph_break_count > 0


def test_images_stored_pixel_by_pixel_do_not_slow_the_cpu():
    """An image file has the colours of a pixel together; on a CPU group norm is slow on that format."""
    unet = perturbed(UNet(**{**TINY, "in_channels": 3}))
    x, t = inputs(unet)
    packed = x.to(memory_format=torch.channels_last)
    assert not packed.is_contiguous() and not unet.conv_in(packed).is_contiguous(), "the wrong form: the format spreads"
    seen = []
    for m in unet.modules():
        if isinstance(m, nn.GroupNorm):
            m.register_forward_pre_hook(lambda m, args: seen.append(args[0].is_contiguous()))
    assert torch.equal(unet(packed, t), unet(x, t))
    assert seen and all(seen)
    seen.clear()
    UNet.walk.plain(unet, packed, F.silu(unet.embed_time(packed, t)))
    assert seen and not any(seen), "the plain walk takes images as they come"


class Copies(TorchDispatchMode):
    """Record the operations that copy a tensor's data."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten.contiguous):
            self.found.append(func)
        return func(*args, **(kwargs or {}))


def test_forward_copies_nothing_that_a_view_would_do():
    unet = perturbed(make_unet("digits"))
    x, t = inputs(unet)
    with torch.no_grad(), Copies() as copies:
        unet(x, t)
    assert copies.found == []


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_recomputes_and_changes_nothing(dropout):
    runs, calls = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)  # equal weights, and equal dropout
        unet = perturbed(UNet(**TINY, checkpointing=checkpointing, dropout=dropout))
        unet.mid.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
        loss = unet(*inputs(unet)).square().mean()
        loss.backward()
        runs.append([loss.detach(), *(p.grad for p in unet.parameters())])
        calls.append(0)
    torch.testing.assert_close(runs[0], runs[1])
    assert calls == [1, 0, 1, 1, 0], "once without, twice with: forward and backward"


def test_checkpointing_is_idle_without_gradients():
    unet, calls = UNet(**TINY, checkpointing=True), []
    unet.mid.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        unet(*inputs(unet))
    assert calls == [1]


def saved_bytes(unet):
    """Measure what a forward pass keeps for the backward pass, apart from the parameters."""
    kept, own = {}, {p.untyped_storage().data_ptr() for p in unet.parameters()}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        unet(*inputs(unet)).sum().backward()
    return sum(kept.values())


def test_checkpointing_keeps_less():
    plain, checkpointed = (saved_bytes(perturbed(UNet(**TINY, checkpointing=c))) for c in (False, True))
    assert checkpointed < plain / 2


# The baseline.


def test_baseline_is_the_notes_network():
    baseline = ResNetBaseline(1, channels=1, n_blocks=1)
    assert sum(p.numel() for p in baseline.parameters()) == 20
    x, (first, second) = draw(2, 1, 8, 8), [m for m in baseline.modules() if isinstance(m, nn.Conv2d)]
    torch.testing.assert_close(baseline(x, None), x + second(F.silu(first(F.silu(x)))))


@pytest.mark.parametrize(("channels", "n_blocks"), [(1, 1), (1, 3), (8, 1), (8, 2)])
def test_baseline_sees_a_square_and_no_time(channels, n_blocks):
    baseline = perturbed(ResNetBaseline(1, channels, n_blocks).double())
    x = draw(1, 1, 33, 33, dtype=f64).requires_grad_()
    y = baseline(x, torch.tensor([5]))
    assert torch.equal(y, baseline(x, torch.tensor([900])))
    y[0, 0, 16, 16].backward()
    seen = (x.grad[0, 0] != 0).any(0).nonzero().flatten()
    n_convolutions = 2 * n_blocks + 2 * (channels > 1)
    assert (int(seen[0]), int(seen[-1])) == (16 - n_convolutions, 16 + n_convolutions)


def test_baseline_config_builds_it_again():
    baseline = ResNetBaseline(3, 8, 2)
    again = ResNetBaseline(**json.loads(json.dumps(baseline.config)))
    again.load_state_dict(baseline.state_dict())
    assert not ResNetBaseline(3, 8, 2)(draw(1, 3, 4, 4), None).any()


# What is refused.


def test_impossible_configurations_are_refused():
    for changes, words, *error in (
        ({"image_size": 7}, "divisible by 2 for 2 levels, such as 6 or 8; got 7"),
        ({"image_size": 1}, "such as 2 or 4; got 1"),
        ({"image_size": 20, "channel_mults": (1, 1, 1, 1)}, "divisible by 8 for 4 levels, such as 16 or 24; got 20"),
        ({"image_size": 8.0}, "image_size must be a whole number", TypeError),
        ({"image_size": 0}, "image_size must be at least 1"),
        ({"in_channels": 0}, "in_channels must be at least 1"),
        ({"out_channels": 0}, "out_channels must be at least 1"),
        ({"base_channels": 2}, "base_channels must be at least 4"),
        ({"channel_mults": ()}, "channel_mults must name at least one level"),
        ({"channel_mults": (1, 0)}, "channel_mults must be at least 1"),
        ({"channel_mults": (1, 1.5)}, "channel_mults must be a whole number", TypeError),
        ({"n_res_blocks": 0}, "n_res_blocks must be at least 1"),
        ({"attn_resolutions": (4.5,)}, "attn_resolutions must be a whole number", TypeError),
        ({"dropout": 1.0}, "dropout must be finite and in"),
        ({"dropout": -0.1}, "dropout must be finite and in"),
        ({"norm_groups": 3}, "norm_groups must divide the channels of every level, 8 and [8, 16]; got 3"),
        ({"norm_eps": 0.0}, "norm_eps must be finite"),
        ({"n_heads": 0}, "n_heads must be at least 1"),
        ({"n_heads": 3}, "n_heads must divide the 16 channels; got 3"),
        ({"upsampling": "bilinear"}, "upsampling must be one of 'nearest', 'transposed'"),
        ({"time_layout": "sines"}, "layout must be one of"),
    ):
        refuses(lambda changes=changes: UNet(**{**TINY, **changes}), words, error=(*error, ValueError)[0])


def test_wrong_inputs_are_refused():
    unet = UNet(**TINY)
    for x, t, words in (
        (torch.zeros(2, 3, 8, 8), torch.zeros(2), "x must be a tensor of shape (B, 1, 8, 8); got (2, 3, 8, 8)"),
        (torch.zeros(2, 1, 16, 16), torch.zeros(2), "got (2, 1, 16, 16)"),
        (torch.zeros(1, 8, 8), torch.zeros(1), "got (1, 8, 8)"),
        ([[0.0]], torch.zeros(1), "got list"),
        (torch.zeros(2, 1, 8, 8), torch.zeros(3), "t must be a tensor of shape (2,), one step for each image; got (3,)"),
        (torch.zeros(2, 1, 8, 8), torch.tensor(5), "got ()"),
        (torch.zeros(2, 1, 8, 8), 5, "got int"),
    ):
        refuses(lambda x=x, t=t: unet(x, t), words)


def test_impossible_blocks_are_refused():
    refuses(lambda: group_norm(8, 3), "norm_groups must divide the 8 channels; got 3")
    refuses(lambda: SelfAttention(8, n_heads=3, norm_groups=2), "n_heads must divide the 8 channels; got 3")
    refuses(lambda: Upsample(8, mode="cubic"), "mode must be one of 'nearest', 'transposed'; got 'cubic'")
    refuses(lambda: ResNetBaseline(0), "in_channels must be at least 1")
    refuses(lambda: ResNetBaseline(1, 0), "channels must be at least 1")
    refuses(lambda: ResNetBaseline(1, 8, 0), "n_blocks must be at least 1")
    refuses(lambda: make_unet("imagenet"), "name must be one of 'ddpm-cifar10'")
