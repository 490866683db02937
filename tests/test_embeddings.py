"""Test the embedding of time against exact values, peers and its own identities."""

import itertools
import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import refuses
from ddpm_nb.embeddings import LAYOUTS, TimeEmbedding, sinusoidal_embedding, wave_frequencies
from ddpm_nb.unet import UNet

# A widely copied table: the interleaved vectors of length 11 for t = 0 .. 9, to nine digits.
TABLE = """
0 1 0 1 0 1 0 1 0 1 0
0.841470985 0.540302306 0.18628711 0.98249535 0.035104703 0.99938364 0.006579285 0.999978356 0.001232846 0.99999924 0.000231013
0.909297427 -0.416146837 0.366052439 0.930594225 0.070166132 0.99753532 0.013158285 0.999913426 0.002465691 0.99999696 0.000462026
0.141120008 -0.989992497 0.533002529 0.846113647 0.105141066 0.994457317 0.019736715 0.999805212 0.003698532 0.99999316 0.000693039
-0.756802495 -0.653643621 0.681292572 0.732011223 0.13998639 0.990153428 0.026314291 0.999653719 0.004931367 0.999987841 0.000924052
-0.958924275 0.283662185 0.80573104 0.592281598 0.17465915 0.984628956 0.032890728 0.999458954 0.006164195 0.999981001 0.001155065
-0.279415498 0.960170287 0.901961427 0.431816609 0.209116605 0.977890713 0.039465741 0.999220924 0.007397013 0.999972642 0.001386077
0.656986599 0.753902254 0.966614776 0.256234022 0.243316277 0.969947003 0.046039046 0.998939641 0.00862982 0.999962762 0.00161709
0.989358247 -0.145500034 0.997427618 0.071680862 0.277216008 0.960807621 0.052610358 0.998615116 0.009862614 0.999951363 0.001848103
0.412118485 -0.911130262 0.993321218 -0.115381796 0.310774009 0.950483832 0.059179393 0.998247364 0.011095393 0.999938444 0.002079115
"""


def table():
    """Read the table; (10, 11), float64."""
    return torch.tensor([[float(x) for x in line.split()] for line in TABLE.split("\n") if line], dtype=torch.float64)


def exact(t, dim, layout, max_period, freq_shift):
    """Compute one vector with fifty digits, from the definitions and element by element."""
    with mpmath.workdps(50):
        half = mpmath.mpf(dim) / 2 if layout == "interleaved" else dim // 2
        angle = [t * mpmath.power(max_period, -i / (half - freq_shift)) for i in range(math.ceil(half))]
        sin, cos = [mpmath.sin(a) for a in angle], [mpmath.cos(a) for a in angle]
        if layout == "interleaved":
            values = [x for pair in zip(sin, cos, strict=True) for x in pair][:dim]
        else:
            values = (sin + cos if layout == "concat" else cos + sin) + [0] * (dim % 2)
        return [float(x) for x in values]


def test_table_to_nine_digits():
    waves = sinusoidal_embedding(torch.arange(10, dtype=torch.float64), 11, layout="interleaved")
    torch.testing.assert_close(waves, table(), rtol=0, atol=5.01e-10)


def test_table_is_not_another_layout():
    for layout in ("concat", "cos_first"):
        waves = sinusoidal_embedding(torch.arange(10, dtype=torch.float64), 11, layout=layout)
        assert (waves - table()).abs().max() > 0.5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dim", "max_period", "freq_shift"), [(4, 10_000, 1), (11, 10_000, 0), (32, 100, 0.5), (128, 10_000, 1)])
def test_exact_values(layout, dim, max_period, freq_shift):
    options = {"layout": layout, "max_period": max_period, "freq_shift": freq_shift}
    t = torch.tensor([0, 1, 37, 999, 0.25], dtype=torch.float64)
    expected = torch.tensor([exact(float(x), dim, layout, max_period, freq_shift) for x in t], dtype=torch.float64)
    double, single = (sinusoidal_embedding(x, dim, **options) for x in (t, t.float()))
    assert (double.dtype, single.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(double, expected, rtol=0, atol=1e-12)
    assert ((single.double() - expected).abs() <= 2 * 2**-24 * (t[:, None] + 1)).all()


def test_default_shift_belongs_to_the_layout():
    t = torch.arange(50)
    for layout in LAYOUTS:
        shift = 1.0 if layout == "concat" else 0.0
        given = {s: sinusoidal_embedding(t, 16, layout=layout, freq_shift=s) for s in (shift, 1 - shift)}
        assert torch.equal(sinusoidal_embedding(t, 16, layout=layout), given[shift])
        assert (given[shift] - given[1 - shift]).abs().max() > 0.1


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0, 1, 0.5])
def test_parity_with_diffusers(flip, shift):
    """Whole steps, and a few between them."""
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    t = torch.cat([torch.tensor([0.0, 0.5, 3.25, 17.125]), torch.arange(0, 1000, 7), torch.tensor([999])])
    for dim, max_period in itertools.product((4, 5, 32, 33, 128, 320), (10_000, 500)):
        theirs = embeddings.get_timestep_embedding(t, dim, flip_sin_to_cos=flip, downscale_freq_shift=shift, max_period=max_period)
        ours = sinusoidal_embedding(t, dim, layout="cos_first" if flip else "concat", freq_shift=shift, max_period=max_period)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1.2e-4)  # both are off by up to 6e-5 at t = 999
        torch.testing.assert_close(ours[:10], theirs[:10], rtol=0, atol=1e-5)


def test_time_network_agrees_with_diffusers():
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    theirs, ours = embeddings.TimestepEmbedding(32, 128), TimeEmbedding(32, 128, layout="cos_first")
    ours.load_state_dict(theirs.state_dict())
    t = torch.arange(0, 1000, 13)
    waves = embeddings.get_timestep_embedding(t, 32, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(ours(t), theirs(waves), rtol=0, atol=1e-4)


BAD = [
    ({"t": 3}, TypeError, "t must be a torch.Tensor; got int"),
    ({"t": torch.tensor(3)}, ValueError, "t must have shape (B,), one step for each image; got ()"),
    ({"t": torch.zeros(2, 1)}, ValueError, "got (2, 1)"),
    ({"t": torch.tensor([True])}, TypeError, "t must have an integer dtype, float32 or float64; got torch.bool"),
    ({"t": torch.zeros(2, dtype=torch.complex64)}, TypeError, "got torch.complex64"),
    ({"t": torch.zeros(2).half()}, TypeError, "got torch.float16"),
    ({"t": torch.zeros(2).bfloat16()}, TypeError, "got torch.bfloat16"),
    ({"dim": 1}, ValueError, "dim must be at least 2; got 1"),
    ({"dim": 8.0}, TypeError, "dim must be a whole number; got 8.0"),
    ({"dim": 2}, ValueError, "dim // 2 must be above freq_shift = 1 for layout 'concat'; got dim = 2"),
    ({"dim": 3}, ValueError, "dim // 2 must be above freq_shift = 1"),
    ({"dim": 4, "layout": "interleaved", "freq_shift": 2}, ValueError, "dim / 2 must be above freq_shift = 2 for layout 'interleaved'"),
    ({"layout": "sin_first"}, ValueError, "layout must be one of 'concat', 'cos_first', 'interleaved'; got 'sin_first'"),
    ({"max_period": 1}, ValueError, "max_period must be finite and in (1, inf); got 1"),
    ({"max_period": 0.5}, ValueError, "max_period must be finite"),
    ({"max_period": math.inf}, ValueError, "max_period must be finite"),
    ({"max_period": "long"}, TypeError, "max_period must be a number"),
    ({"freq_shift": -1}, ValueError, "freq_shift must be finite and in"),
    ({"freq_shift": math.nan}, ValueError, "freq_shift must be finite and in"),
]


def test_bad_arguments_are_refused():
    for change, error, message in BAD:
        refuses(lambda change=change: sinusoidal_embedding(**{"t": torch.arange(2), "dim": 8, **change}), message, error=error)


def test_bad_options_are_refused_when_the_network_is_built():
    for change, error, message in BAD:
        if "t" not in change:
            refuses(lambda change=change: TimeEmbedding(**{"dim": 8, "out_dim": 16, **change}), message, error=error)
    refuses(lambda: TimeEmbedding(8, 0), "out_dim must be at least 1; got 0")


def test_smallest_lengths():
    for layout, dim in (("concat", 4), ("cos_first", 2), ("cos_first", 3), ("interleaved", 2), ("interleaved", 3)):
        waves = sinusoidal_embedding(torch.arange(5), dim, layout=layout)
        assert waves.shape == (5, dim)
        assert bool(waves.isfinite().all())


def test_a_peer_divides_by_zero_where_ours_refuses():
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    assert bool(embeddings.get_timestep_embedding(torch.arange(3), 2).isnan().any())


def test_type_of_steps_does_not_matter():
    t = torch.tensor([0, 3, 200])
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32):
        assert torch.equal(sinusoidal_embedding(t.to(dtype), 32), sinusoidal_embedding(t, 32))


def test_empty_batch():
    assert sinusoidal_embedding(torch.arange(0), 8).shape == (0, 8)
    assert TimeEmbedding(8, 16)(torch.arange(0)).shape == (0, 16)


@settings(deadline=None, max_examples=60)
@given(
    t=st.integers(0, 4000),
    u=st.integers(0, 4000),
    half=st.integers(2, 80),
    layout=st.sampled_from(LAYOUTS),
    max_period=st.floats(1.01, 1e6),
    freq_shift=st.floats(0, 1),
)
def test_dot_product_depends_on_the_difference(t, u, half, layout, max_period, freq_shift):
    options = {"layout": layout, "max_period": max_period, "freq_shift": freq_shift}
    steps = torch.tensor([t, u, t + 17, u + 17, abs(t - u), 0], dtype=torch.float64)
    waves = sinusoidal_embedding(steps, 2 * half, **options)
    gram = waves @ waves.T
    torch.testing.assert_close(gram.diagonal(), torch.full((6,), float(half), dtype=torch.float64))
    torch.testing.assert_close(gram[0, 1], gram[2, 3], rtol=0, atol=1e-9)
    torch.testing.assert_close(gram[0, 1], gram[4, 5], rtol=0, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(dim=st.integers(4, 65), t=st.lists(st.floats(0, 1e4, width=32), min_size=1, max_size=5), layout=st.sampled_from(LAYOUTS))
def test_shape_range_and_rows(dim, t, layout):
    waves = sinusoidal_embedding(torch.tensor(t), dim, layout=layout)
    assert waves.shape == (len(t), dim)
    assert bool((waves.abs() <= 1).all())
    single = torch.cat([sinusoidal_embedding(torch.tensor([x]), dim, layout=layout) for x in t])
    torch.testing.assert_close(waves, single, rtol=0, atol=1e-6)  # an image's vector does not depend on its batch


@settings(deadline=None, max_examples=40)
@given(half=st.integers(1, 40), t=st.integers(0, 1000))
def test_layouts_of_even_length_hold_the_same_waves(half, t):
    waves = {layout: sinusoidal_embedding(torch.tensor([t]), 2 * half, layout=layout, freq_shift=0)[0] for layout in LAYOUTS}
    torch.testing.assert_close(waves["cos_first"], waves["concat"].roll(half))
    torch.testing.assert_close(waves["interleaved"], waves["concat"].reshape(2, half).T.flatten())


@settings(deadline=None, max_examples=40)
@given(dim=st.integers(4, 200), max_period=st.floats(1.5, 1e6), layout=st.sampled_from(LAYOUTS))
def test_frequencies_fall_geometrically(dim, max_period, layout):
    omega = wave_frequencies(dim, layout=layout, max_period=max_period)
    assert omega.dtype == torch.float64
    assert omega[0] == 1
    torch.testing.assert_close(omega[1:] / omega[:-1], (omega[1] / omega[0]).expand(len(omega) - 1))
    if layout == "concat":
        torch.testing.assert_close(omega[-1] * max_period, torch.ones((), dtype=torch.float64))


def test_odd_length_ends_in_a_zero_or_a_sine():
    t = torch.arange(1, 1000)
    for layout in ("concat", "cos_first"):
        assert bool((sinusoidal_embedding(t, 9, layout=layout)[:, -1] == 0).all())
    torch.testing.assert_close(sinusoidal_embedding(t, 9, layout="interleaved")[:, -1], (t * 10_000 ** (-8 / 9)).sin(), rtol=0, atol=1e-5)


def test_all_steps_are_told_apart():
    for layout in LAYOUTS:
        waves = sinusoidal_embedding(torch.arange(1000), 32, layout=layout)
        assert (torch.cdist(waves, waves) + 9 * torch.eye(1000)).min() > 0.5


def test_steps_between_0_and_1_are_not_told_apart():
    scaled = sinusoidal_embedding(torch.arange(1000) / 1000, 32)
    assert (scaled[1:] - scaled[:-1]).norm(dim=1).max() < 0.01


def test_the_copied_formula_is_another_function():
    t, half = torch.arange(1000), 32
    angles = t[:, None] * (torch.arange(half) - math.log(10_000) / (half - 1))
    copied = torch.cat([angles.sin(), angles.cos()], 1)
    assert (copied[44] @ copied[0]) / half > 0.9  # 44 is nearly seven turns
    ours = sinusoidal_embedding(t, 2 * half)
    assert (ours[44] @ ours[0]) / half < 0.7


def test_half_precision_anywhere_but_at_the_end_ruins_the_waves():
    t, reference = torch.arange(1000), sinusoidal_embedding(torch.arange(1000).double(), 128)
    rounded_steps = sinusoidal_embedding(t.bfloat16().float(), 128)
    assert (rounded_steps - reference).abs().max() > 1
    angles = t.half()[:, None] * wave_frequencies(128).half()
    assert (torch.cat([angles.sin(), angles.cos()], 1) - reference).abs().max() > 0.1
    assert (sinusoidal_embedding(t, 128).bfloat16() - reference).abs().max() < 0.003


def test_autocast_leaves_the_waves_alone():
    t = torch.arange(1000)
    with torch.autocast("cpu", torch.bfloat16):
        waves = sinusoidal_embedding(t, 64)
    assert waves.dtype == torch.float32
    assert torch.equal(waves, sinusoidal_embedding(t, 64))


def test_network_in_any_precision():
    t = torch.arange(0, 1000, 37)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        embed = TimeEmbedding(64, 128)
        reference = embed(t)
        assert not list(embed.buffers())  # there is nothing that a cast of the network could round
        result = embed.to(dtype)(t)
        assert result.dtype == dtype
        torch.testing.assert_close(result.float(), reference, rtol=0, atol=1e-5 if dtype.itemsize > 2 else 0.03)


def test_gradient_reaches_every_parameter():
    for layout in LAYOUTS:
        embed = TimeEmbedding(9, 20, layout=layout)
        embed(torch.arange(1, 30)).sin().sum().backward()
        for name, parameter in embed.named_parameters():
            reached = parameter.grad != 0
            assert bool(reached[:, :8].all() if name == "linear_1.weight" else reached.all()), name


def test_gradient_with_respect_to_the_network_is_right():
    embed, t = TimeEmbedding(6, 5).double(), torch.tensor([0, 4, 900])
    names = [name for name, _ in embed.named_parameters()]
    run = lambda *values: torch.func.functional_call(embed, dict(zip(names, values, strict=True)), (t,))
    assert torch.autograd.gradcheck(run, tuple(p.detach().clone().requires_grad_() for p in embed.parameters()))


def test_time_itself_is_differentiable():
    t = torch.tensor([0.5, 3.0, 7.25], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: sinusoidal_embedding(t, 7, layout="interleaved"), (t,))


def test_each_image_has_its_own_step():
    embed, t = TimeEmbedding(16, 32), torch.tensor([5, 700, 5])
    out = embed(t)
    torch.testing.assert_close(out[0], out[2])
    assert (out[0] - out[1]).abs().max() > 0.01
    torch.testing.assert_close(embed(t.flip(0)), out.flip(0))


def test_weights_load_in_the_wrong_layout_and_the_output_is_wrong():
    right, wrong = TimeEmbedding(32, 64, layout="concat"), TimeEmbedding(32, 64, layout="cos_first")
    wrong.load_state_dict(right.state_dict())
    t = torch.arange(1000)
    assert (wrong(t) - right(t)).norm() / right(t).norm() > 0.3


def test_options_are_used():
    embed = TimeEmbedding(16, 8, layout="cos_first", max_period=50, freq_shift=0.5)
    seen = []
    embed.linear_1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    embed(torch.arange(9))
    torch.testing.assert_close(seen[0], sinusoidal_embedding(torch.arange(9), 16, layout="cos_first", max_period=50, freq_shift=0.5))


def test_one_channel_a_group_makes_the_unet_blind():
    for groups, blind in ((8, True), (4, False)):
        net = UNet(8, 1, base_channels=8, channel_mults=(1, 1), n_res_blocks=1, attn_resolutions=(), norm_groups=groups)
        for parameter in net.parameters():  # the last convolutions begin at zero
            torch.nn.init.normal_(parameter, std=0.2)
        x, early, late = torch.randn(2, 1, 8, 8), torch.tensor([0, 0]), torch.tensor([900, 900])
        change = (net(x, early) - net(x, late)).abs().max() / net(x, early).abs().max()
        assert (change < 1e-4) == blind


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees_with_the_cpu_and_captures_in_a_graph():
    t = torch.arange(1000)
    for layout in LAYOUTS:
        there, here = (sinusoidal_embedding(x, 128, layout=layout).cpu() for x in (t.cuda(), t))
        torch.testing.assert_close(there, here, rtol=0, atol=1e-4)
    static, graph = t.cuda(), torch.cuda.CUDAGraph()
    sinusoidal_embedding(static, 128)
    with torch.cuda.graph(graph):  # refuses any copy between host and device
        out = sinusoidal_embedding(static, 128)
    static.add_(7)
    graph.replay()
    torch.testing.assert_close(out.cpu(), sinusoidal_embedding(t + 7, 128), rtol=0, atol=1e-4)
