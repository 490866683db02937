"""Networks and schedules work inside loops and wrappers that other people write around them."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from ddpm_nb.elbo import simple_loss
from ddpm_nb.evaluation import classifier_report, load_classifier
from ddpm_nb.forward import NoiseSchedule
from ddpm_nb.gaussian import seeded
from ddpm_nb.hub import load_pretrained
from ddpm_nb.schedules import make_schedule
from ddpm_nb.unet import UNet

T = 20


def small_unet(**options):
    """Build a small network with random weights in every layer."""
    torch.manual_seed(0)
    unet = UNet(8, 1, 16, (1, 2), 1, (4,), norm_groups=8, **options)
    with torch.no_grad():
        for p in unet.parameters():
            p.normal_(std=0.1)
    return unet


@pytest.fixture
def batch():
    return torch.randn(4, 1, 8, 8, generator=seeded(1)), torch.tensor([0, 3, 7, 19])


def through_torch_save(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), through_torch_save], ids=["deepcopy", "pickle", "torch.save"])
def test_whole_objects_are_copied(batch, copied):
    network, schedule = small_unet().eval(), make_schedule("cosine", T)
    assert copied(network)(*batch).equal(network(*batch))
    again = copied(schedule)
    assert isinstance(again, NoiseSchedule) and again.exact_betas.equal(schedule.exact_betas)
    assert all(a.equal(b) for a, b in zip(again.buffers(), schedule.buffers(), strict=True))


def test_averages_and_wrappers_of_torch(batch):
    network = small_unet()
    average = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    average.update_parameters(network)
    assert average(*batch).equal(network(*batch))
    assert nn.DataParallel(network)(*batch).equal(network(*batch))


def test_traced_functions_are_the_function(batch):
    network = small_unet().eval()
    traced = torch.jit.trace(network, batch, check_trace=False)
    torch.testing.assert_close(traced(*batch), network(*batch), rtol=1e-5, atol=1e-6)
    other = batch[0] * 2, batch[1].flip(0)
    torch.testing.assert_close(traced(*other), network(*other), rtol=1e-5, atol=1e-6)


def test_function_transforms(batch):
    network = small_unet().eval()
    x, t = batch
    weights = {k: v.detach() for k, v in network.named_parameters()}

    def loss(weights, x, t):
        return functional_call(network, weights, (x[None], t[None])).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, t)
    whole = torch.autograd.grad(network(x, t).square().sum(), list(network.parameters()))
    for (name, rows), total in zip(each.items(), whole, strict=True):
        torch.testing.assert_close(rows.sum(0), total, rtol=1e-3, atol=1e-3, msg=name)
    _, along = jvp(lambda x: network(x, t), (x,), (x,))
    step = 1e-3
    double = copy.deepcopy(network).double()
    by_hand = (double(x.double() * (1 + step), t) - double(x.double() * (1 - step), t)) / (2 * step)
    torch.testing.assert_close(along.double(), by_hand, rtol=1e-2, atol=1e-3)


def test_gradients_for_the_images_and_the_layout_of_memory(batch):
    network = small_unet().eval()
    x, t = batch
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(network(x, t).sum(), x)
    assert slope.shape == x.shape and slope.abs().sum() > 0
    expected = network(x, t).detach()
    packed = network.to(memory_format=torch.channels_last)(x.detach().to(memory_format=torch.channels_last), t)
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def one_process(tmp_path):
    """Open a process group of one, by gloo, and close it."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_ddp_gives_every_parameter_its_gradient(one_process, batch, checkpointing):
    network = small_unet(checkpointing=checkpointing)
    wrapped = nn.parallel.DistributedDataParallel(network)
    simple_loss(wrapped, make_schedule("cosine", T), batch[0]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_fsdp_shards_by_blocks(one_process, batch):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from ddpm_nb.unet import ResBlock

    network, mesh = small_unet(), init_device_mesh("cpu", (1,))
    expected = network(*batch).detach()
    for module in network.modules():
        if isinstance(module, ResBlock):
            fully_shard(module, mesh=mesh)
    fully_shard(network, mesh=mesh)
    output = network(*batch)
    torch.testing.assert_close(output.detach(), expected, rtol=1e-5, atol=1e-6)
    output.square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_heun_of_edm_around_the_noise_predictor():
    """Karras et al. (2022), algorithm 1 without churn, in float64, over the levels of the shipped schedule up to 80."""
    network, schedule = load_pretrained("digits")
    logs = -schedule.log_snr.double() / 2  # log sigma, rising

    def slope(x, sigma):
        t = int((logs - sigma.log()).abs().argmin())
        scaled = (x / (1 + sigma**2).sqrt()).float()
        return network(scaled, torch.full((len(x),), t)).double()  # (x - x_0_hat) / sigma

    ends = torch.tensor([80.0, float(logs[0].exp())], dtype=torch.float64) ** (1 / 7)
    sigmas = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, 18, dtype=torch.float64)) ** 7
    x = 80 * torch.randn(48, 1, 8, 8, generator=seeded(0), dtype=torch.float64)
    with torch.no_grad():
        for sigma, after in zip(sigmas, [*sigmas[1:], torch.tensor(0.0)], strict=True):
            first = slope(x, sigma)
            proposal = x + (after - sigma) * first
            if after > 0:
                proposal = x + (after - sigma) * (first + slope(proposal, after)) / 2
            x = proposal
    assert x.abs().max() < 1.6
    report = classifier_report(load_classifier("digits"), x.float().clamp(-1, 1))
    assert report.confident > 0.85


def test_the_training_loop_of_diffusers(tmp_path):
    """Accelerate with accumulation, a cosine rate, EMAModel, a saved pipeline, and back."""
    diffusers = pytest.importorskip("diffusers")
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState
    from diffusers.optimization import get_cosine_schedule_with_warmup
    from diffusers.training_utils import EMAModel

    from ddpm_nb.convert import unet_from_diffusers, unet_to_diffusers
    from ddpm_nb.data import load_images

    model, noise_scheduler = unet_to_diffusers(UNet(8, 1, 16, (1, 2), 1, (4,), norm_groups=8), make_schedule("cosine", 1000))
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    try:
        ema = EMAModel(model.parameters(), decay=0.9)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        rate = get_cosine_schedule_with_warmup(optimizer, 2, 20)
        loader = torch.utils.data.DataLoader(load_images("digits")[:320], 16, shuffle=True, generator=seeded(0))
        model, optimizer, loader, rate = accelerator.prepare(model, optimizer, loader, rate)
        losses = []
        for clean in loader:
            noise = torch.randn(clean.shape, generator=seeded(len(losses)))
            t = torch.randint(1000, (len(clean),), generator=seeded(len(losses)))
            with accelerator.accumulate(model):
                predicted = model(noise_scheduler.add_noise(clean, noise, t), t).sample
                loss = nn.functional.mse_loss(predicted, noise)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                rate.step()
                optimizer.zero_grad()
            ema.step(model.parameters())
            losses.append(float(loss.detach()))
        assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
        unwrapped = accelerator.unwrap_model(model).eval()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    diffusers.DDPMPipeline(unwrapped, noise_scheduler).save_pretrained(tmp_path / "it")
    ours, schedule = unet_from_diffusers(tmp_path / "it")
    x, t = torch.randn(4, 1, 8, 8, generator=seeded(5)), torch.tensor([0, 10, 500, 999])
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x, t), unwrapped(x, t).sample, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(schedule.exact_betas.float(), noise_scheduler.betas, rtol=1e-6, atol=0)
