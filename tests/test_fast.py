"""Faster calls of the same network: equal answers, a copy, and clear about bad input."""

import copy
import shutil

import pytest
import torch

from ddpm_nb.elbo import output_to_eps
from ddpm_nb.fast import optimize_for_sampling
from ddpm_nb.gaussian import seeded, seeded_init
from ddpm_nb.hub import NoisePredictor
from ddpm_nb.sampling import sample_ddim
from ddpm_nb.schedules import make_schedule
from ddpm_nb.unet import make_unet


def network(x, t):
    """Stand in for a network that is no module."""
    return x


def perturbed_unet():
    """Build a network none of whose layers is zero, in training mode and with dropout."""
    with seeded_init(0):
        unet = make_unet("digits", base_channels=16, dropout=0.5)
        for parameter in unet.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape)
    return unet.train()


@pytest.fixture
def digits_unet():
    """A network of the test's own."""
    return perturbed_unet()


@pytest.fixture(scope="module")
def compiled():
    """Compile a network in float32, once, without a copy; return the faster one and the network."""
    network = perturbed_unet().eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddpm_nb.fast.copy.deepcopy", lambda network: network)
        return optimize_for_sampling(network, compile=True), network


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.0), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("given", [torch.float32, torch.float64])
def test_optimized_network_gives_the_same_answers(digits_unet, dtype, tolerance, given):
    before = {name: value.clone() for name, value in digits_unet.state_dict().items()}
    fast, x, t = optimize_for_sampling(digits_unet, dtype), torch.randn(4, 1, 8, 8, dtype=given), torch.tensor([0, 9, 500, 999])
    answer = fast(x, t)
    assert answer.dtype == given and not answer.requires_grad
    assert digits_unet.training and all(p.requires_grad and p.dtype == torch.float32 for p in digits_unet.parameters())
    assert all(torch.equal(before[name], value) for name, value in digits_unet.state_dict().items())
    exact = digits_unet.eval()(x.float(), t)
    assert relative(answer, exact) <= tolerance and (tolerance == 0) == torch.equal(answer.float(), exact)


@pytest.mark.parametrize("objective", ["v", "x_0"])
def test_the_conversion_to_noise_is_not_rounded(digits_unet, objective):
    schedule = make_schedule("cosine", 1000)
    model = NoisePredictor(digits_unet.eval(), schedule, objective)
    fast, rounded = optimize_for_sampling(model, torch.bfloat16), optimize_for_sampling(digits_unet, torch.bfloat16)
    x, t = torch.randn(4, 1, 8, 8, generator=seeded(0)), torch.tensor([0, 500, 900, 995])
    assert torch.equal(fast(x, t), output_to_eps(schedule, objective, x, t, rounded(x, t)))
    assert model.schedule.betas.dtype == torch.float32
    exact = optimize_for_sampling(model)(x, t)
    assert torch.equal(exact, model(x, t)) and not exact.requires_grad


def test_optimized_network_is_a_copy(digits_unet):
    fast, x, t = optimize_for_sampling(digits_unet), torch.randn(2, 1, 8, 8), torch.tensor([3, 4])
    before = fast(x, t)
    digits_unet.conv_in.weight.data.zero_()
    assert torch.equal(fast(x, t), before)


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")


def walks_alike(fast, network, tolerance):
    """Assert that a compiled network answers and walks as the other one does; all calls in one mode, so that it is compiled once."""
    schedule, x, t = make_schedule("cosine", 100), torch.randn(2, 1, 8, 8, generator=seeded(0)), torch.tensor([5, 50])
    with torch.inference_mode():
        assert relative(fast(x, t), network(x, t)) < tolerance
    walks = [sample_ddim(net, schedule, x.shape, n_steps=3, x_T=x) for net in (fast, network)]
    assert relative(*walks) < 4 * tolerance


@needs_compiler
def test_compiled_network_gives_the_same_walk(compiled):
    walks_alike(*compiled, 1e-5)


@needs_compiler
def test_compiled_network_in_bfloat16_gives_nearly_the_same_walk(digits_unet):
    walks_alike(optimize_for_sampling(digits_unet.eval(), torch.bfloat16, compile=True), digits_unet, 0.05)


@needs_compiler
def test_compiled_network_has_its_weights_as_constants(compiled):
    """Otherwise products of weights are computed at every call and convolutions lay their weights out anew."""
    if torch.__version__ < torch.torch_version.TorchVersion("2.15"):
        pytest.skip("PyTorch 2.6 leaves weights variable where they are to be constants: right, and slower")
    fast, network = compiled
    x, t, kept = torch.randn(2, 1, 8, 8), torch.tensor([3, 4]), copy.deepcopy(network.state_dict())
    with torch.inference_mode():
        before, expected = fast(x, t), network(x, t)
        assert relative(before, expected) < 1e-5 and expected.abs().max() > 0
    with torch.no_grad():
        network.conv_out.weight.zero_()
        network.conv_out.bias.zero_()
    with torch.inference_mode():
        assert network(x, t).abs().max() == 0
        assert torch.equal(fast(x, t), before)
    network.load_state_dict(kept)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((network,), TypeError, "model must be a torch.nn.Module; got function"),
        ((torch.nn.Identity(), torch.int8), ValueError, "dtype must be torch.float32, torch.bfloat16 or torch.float16; got torch.int8"),
        ((torch.nn.Identity(), "bfloat16"), ValueError, "dtype must be .* got bfloat16"),
    ],
)
def test_optimizing_refuses_bad_input(arguments, error, words):
    with pytest.raises(error, match=words):
        optimize_for_sampling(*arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", [False, True])
def test_optimized_network_on_a_gpu(digits_unet, compile):
    digits_unet.cuda().eval()
    schedule, x = make_schedule("cosine", 100).cuda(), torch.randn(4, 1, 8, 8, device="cuda")
    walks = [
        sample_ddim(net, schedule, x.shape, n_steps=5, x_T=x)
        for net in (digits_unet, optimize_for_sampling(digits_unet, torch.bfloat16, compile=compile))
    ]
    assert relative(walks[1], walks[0]) < 0.2
