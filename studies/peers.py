"""Give this package and its peers one interface: a network, a training step, a sampling chain, as each library's own script does them.

`LIBRARIES` maps a name to a class. An object of it is one network of `NETWORKS` on one device in one precision; `step(x_0)` trains
once, `chain(batch, n_steps, hook)` samples and calls `hook()` after each step.
"""

import copy
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

NETWORKS = {
    "digits": {"size": 8, "channels": 1, "base": 32, "mults": (1, 2), "blocks": 1, "attention": 4, "groups": 8},
    "small": {"size": 32, "channels": 1, "base": 32, "mults": (1, 2, 2), "blocks": 2, "attention": 16, "groups": 32},
    "big": {"size": 32, "channels": 1, "base": 64, "mults": (1, 2, 2, 4), "blocks": 2, "attention": 16, "groups": 32},
    "ddpm-cifar10": {"size": 32, "channels": 3, "base": 128, "mults": (1, 2, 2, 2), "blocks": 2, "attention": 16, "groups": 32},
}
N_STEPS = 1000


@dataclass(frozen=True)
class Case:
    """Say which network runs where and how."""

    network: str  # key of `NETWORKS`
    size: int  # pixels a side
    precision: str  # "float32" or "bfloat16"
    device: torch.device

    @property
    def plan(self):
        """Return the layers, for this size of images; attention stays at half of 32 or at its fixed resolution."""
        return NETWORKS[self.network] | {"size": self.size}

    @property
    def attends(self):
        """Return for each level whether it attends."""
        return [self.size // 2**i == self.plan["attention"] for i in range(len(self.plan["mults"]))]

    def autocast(self):
        """Return the context in which a peer computes."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def sampler(self, network):
        """Return a copy of a peer's network to sample with: weights in the precision, as ours."""
        return copy.deepcopy(network).to(getattr(torch, self.precision)).eval()

    def noise(self, batch):
        """Draw the noise from which a chain starts."""
        return torch.randn(batch, self.plan["channels"], self.size, self.size, device=self.device)


class Ours:
    """Train and sample as `ddpm_nb.training.fit` and `ddpm_nb.sampling` do."""

    def __init__(self, case, *, compiled=False, tried=None):
        from ddpm_nb.schedules import make_schedule
        from ddpm_nb.unet import UNet

        self.case, self.compiled, p = case, compiled, case.plan
        options = {"n_res_blocks": p["blocks"], "attn_resolutions": (p["attention"],), "norm_groups": p["groups"]}
        self.network = UNet(p["size"], p["channels"], p["base"], p["mults"], **options).to(case.device)
        if tried is not None:
            TRIED[tried](self.network)
        self.schedule, self.trainers = make_schedule("linear", N_STEPS).to(case.device), {}

    def step(self, x_0, without=()):
        """Train once, without some of the means of `WITHOUT`."""
        from ddpm_nb.training import TrainConfig, Trainer

        fused = "fused optimiser" not in without
        with replaced(without):
            if fused not in self.trainers:
                config = TrainConfig(batch_size=len(x_0), precision=self.case.precision)
                self.trainers[fused] = Trainer(self.network, self.schedule, config)
            self.trainers[fused].step(x_0)

    def chain(self, batch, n_steps, hook):
        from ddpm_nb.fast import optimize_for_sampling
        from ddpm_nb.sampling import sample_ddim, sample_ddpm

        model = optimize_for_sampling(self.network, getattr(torch, self.case.precision), compile=self.compiled)
        shape, callback = self.case.noise(batch).shape, lambda *_: hook()
        if n_steps == N_STEPS:
            return sample_ddpm(model, self.schedule, shape, callback=callback)
        return sample_ddim(model, self.schedule, shape, n_steps=n_steps, callback=callback)


def fused_attention():
    """Let attention call PyTorch's fused kernel on every device."""
    import ddpm_nb.unet as module

    rows = lambda *parts: (z.mT.contiguous() for z in parts)
    return module, "attend_columns", lambda q, k, v: F.scaled_dot_product_attention(*rows(q, k, v)).mT


def repeated_pixels():
    """Let the network repeat pixels and convolve, as the paper writes it."""
    from ddpm_nb.unet import Upsample

    return Upsample, "forward", Upsample.forward.plain


def four_projections():
    """Let attention make queries, keys and values, and its output, by layers of their own."""
    from ddpm_nb.unet import SelfAttention, attend_by_products

    return SelfAttention, "forward", attend_by_products


def unfused_optimizer():
    """Let AdamW go from parameter to parameter."""
    import ddpm_nb.training as module

    def make_optimizer(model, config):
        options = {"weight_decay": config.weight_decay, "foreach": False, "fused": False}
        return torch.optim.AdamW(model.parameters(), config.lr, **options)

    return module, "make_optimizer", make_optimizer


WITHOUT = {
    "attention by matmul": fused_attention,
    "joined weights": repeated_pixels,
    "joined projections": four_projections,
    "fused optimiser": unfused_optimizer,
}


@contextmanager
def replaced(means):
    """Do without some means for a while."""
    with ExitStack() as stack:
        for name in means:
            stack.enter_context(mock.patch.object(*WITHOUT[name]()))
        yield


def compile_norms(network):
    """Let PyTorch's compiler fuse every group norm with the activation after it."""
    from ddpm_nb.unet import ResBlock

    fused = torch.compile(lambda x, norm: F.silu(F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)), dynamic=False)

    def forward(self, x, time):
        h = self.conv_1(fused(x, self.norm_1)) + self.time(time)[:, :, None, None]
        return self.skip(x) + self.conv_2(self.dropout(fused(h, self.norm_2)))

    torch._dynamo.config.recompile_limit = 64  # one for each shape
    ResBlock.forward = forward


TRIED = {
    "compiled network": lambda network: network.compile(),
    "compiled norm and SiLU": compile_norms,
    "channels-last": lambda network: network.to(memory_format=torch.channels_last),
}


class Diffusers:
    """Train as the unconditional example of diffusers does, and sample as its pipelines do."""

    def __init__(self, case):
        from diffusers import DDPMScheduler, UNet2DModel

        self.case, p, attends = case, case.plan, case.attends
        self.network = UNet2DModel(
            sample_size=p["size"],
            in_channels=p["channels"],
            out_channels=p["channels"],
            block_out_channels=[p["base"] * m for m in p["mults"]],
            down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
            up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
            layers_per_block=p["blocks"],
            norm_num_groups=p["groups"],
            downsample_padding=0,
            attention_head_dim=None,
            norm_eps=1e-6,
            flip_sin_to_cos=False,
            freq_shift=1,
        ).to(case.device)
        self.scheduler, self.adam = DDPMScheduler(N_STEPS), None

    def start(self, lr=1e-4):
        """Make the optimiser and the average of the example script."""
        from diffusers.training_utils import EMAModel

        self.adam = torch.optim.AdamW(self.network.parameters(), lr, (0.95, 0.999), weight_decay=1e-6)
        self.ema = EMAModel(self.network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        self.network.train()

    def step(self, x_0):
        if self.adam is None:
            self.start()
        eps = torch.randn_like(x_0)
        t = torch.randint(0, N_STEPS, (len(x_0),), device=x_0.device)
        x_t = self.scheduler.add_noise(x_0, eps, t)
        with self.case.autocast():
            loss = F.mse_loss(self.network(x_t, t).sample.float(), eps)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.adam.step()
        self.adam.zero_grad()
        self.ema.step(self.network.parameters())

    def draw(self, n, n_steps):
        """Sample from the average, and go back to the weights of the training."""
        self.ema.store(self.network.parameters())
        self.ema.copy_to(self.network.parameters())
        x = self.chain(n, n_steps, lambda: None)
        self.ema.restore(self.network.parameters())
        return x

    @torch.no_grad()
    def chain(self, batch, n_steps, hook):
        from diffusers import DDIMScheduler

        scheduler = self.scheduler if n_steps == N_STEPS else DDIMScheduler(N_STEPS)
        scheduler.set_timesteps(n_steps)
        network, x = self.case.sampler(self.network), self.case.noise(batch)
        for t in scheduler.timesteps:
            eps_hat = network(x.to(network.dtype), t).sample
            x = scheduler.step(eps_hat.float(), t, x).prev_sample
            hook()
        return x


class Lucidrains:
    """Train and sample as `Trainer` and `GaussianDiffusion` of denoising-diffusion-pytorch do; full attention at the same resolution."""

    def __init__(self, case):
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet

        self.case, p = case, case.plan
        fused = case.device.type == "cpu" or case.precision == "bfloat16"  # on a GPU its fused attention takes no float32
        options = {"full_attn": tuple(case.attends), "flash_attn": fused}
        self.network = Unet(p["base"], dim_mults=p["mults"], channels=p["channels"], **options).to(case.device)
        self.options = {"objective": "pred_noise", "beta_schedule": "linear"}
        self.make = lambda network, **more: GaussianDiffusion(network, image_size=p["size"], **self.options, **more).to(case.device)
        self.diffusion, self.adam = self.make(self.network), None

    def start(self, lr=1e-4):
        """Make the optimiser and the average of its `Trainer`."""
        from ema_pytorch import EMA

        self.adam = torch.optim.Adam(self.diffusion.parameters(), lr, (0.9, 0.99))
        self.ema = EMA(self.diffusion, beta=0.995, update_every=10)
        self.diffusion.train()

    def step(self, x_0):
        if self.adam is None:
            self.start()
        with self.case.autocast():
            loss = self.diffusion((x_0 + 1) / 2)  # it takes images in [0, 1]
        loss.backward()
        nn.utils.clip_grad_norm_(self.diffusion.parameters(), 1.0)
        self.adam.step()
        self.adam.zero_grad()
        self.ema.update()

    def draw(self, n, n_steps):
        """Sample from the average; return images in [-1, 1]."""
        return 2 * self.chain(n, n_steps, lambda: None, self.ema.ema_model.model) - 1

    @torch.inference_mode()
    def chain(self, batch, n_steps, hook, network=None):
        import denoising_diffusion_pytorch.denoising_diffusion_pytorch as module

        module.tqdm = lambda steps, **_: hooked(steps, hook)  # its loops have no callback, but a progress bar
        options = {} if n_steps == N_STEPS else {"sampling_timesteps": n_steps}
        with self.case.autocast():  # its embedding of time is float32
            return self.make(self.case.sampler(network or self.network), **options).eval().sample(batch)


def hooked(steps, hook):
    """Yield the steps, and call the hook after each."""
    for step in steps:
        yield step
        hook()


class Labml:
    """Train and sample as the DDPM experiment of labml-nn does; its script keeps no average and clips no gradient."""

    def __init__(self, case):
        from labml_nn.diffusion.ddpm import DenoiseDiffusion
        from labml_nn.diffusion.ddpm.unet import UNet

        self.case, p = case, case.plan
        factors = [m // before for m, before in zip(p["mults"], (1, *p["mults"]), strict=False)]  # of the level before
        self.network = UNet(p["channels"], p["base"], factors, case.attends, p["blocks"]).to(case.device)
        for module in self.network.modules():
            if isinstance(module, nn.Dropout):  # no other network of the comparison drops values
                module.p = 0.0
        self.diffusion, self.adam = DenoiseDiffusion(self.network, N_STEPS, case.device), None

    def start(self, lr=2e-5):
        """Make the optimiser of the experiment."""
        self.adam = torch.optim.Adam(self.network.parameters(), lr)

    def step(self, x_0):
        if self.adam is None:
            self.start()
        self.adam.zero_grad()
        with self.case.autocast():
            loss = self.diffusion.loss(x_0)
        loss.backward()
        self.adam.step()

    def draw(self, n, n_steps):
        """Sample with our DDIM, since this library has none for its network."""
        from ddpm_nb.sampling import sample_ddim
        from ddpm_nb.schedules import make_schedule

        schedule, network = make_schedule("linear", N_STEPS).to(self.case.device), self.case.sampler(self.network)
        with self.case.autocast():
            return sample_ddim(lambda x, t: network(x, t).float(), schedule, self.case.noise(n).shape, n_steps=n_steps)

    @torch.no_grad()
    def chain(self, batch, n_steps, hook):
        if n_steps != N_STEPS:
            raise NotImplementedError("its DDPM takes every step")
        from labml_nn.diffusion.ddpm import DenoiseDiffusion

        diffusion, x = DenoiseDiffusion(self.case.sampler(self.network), N_STEPS, self.case.device), self.case.noise(batch)
        with self.case.autocast():  # its embedding of time is float32
            for t in reversed(range(N_STEPS)):
                x = diffusion.p_sample(x, x.new_full((batch,), t, dtype=torch.long))
                hook()
        return x


LIBRARIES = {"ddpm_nb": Ours, "diffusers": Diffusers, "denoising-diffusion-pytorch": Lucidrains, "labml-nn": Labml}
