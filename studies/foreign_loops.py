"""Put our networks into other people's loops: samplers of k-diffusion, GaussianDiffusion of lucidrains, Lightning, the Trainer of transformers.

Run `pip install k-diffusion "setuptools<80" denoising-diffusion-pytorch lightning "transformers[torch]"`, in an environment of its own
(k-diffusion imports what newer setuptools lack), and then
`python studies/foreign_loops.py` (a few minutes). Each part asserts what it is about; one whose package is missing says so. None of them is
needed for the book or its tests; loops whose packages are (torch, Accelerate, diffusers) are in tests/test_other_peoples_code.py.
"""

import argparse
import importlib.util
import tempfile

import torch
from torch import nn

from ddpm_nb.data import load_images
from ddpm_nb.elbo import simple_loss
from ddpm_nb.evaluation import classifier_features, frechet_distance, load_classifier
from ddpm_nb.gaussian import seeded, seeded_init
from ddpm_nb.hub import load_pretrained
from ddpm_nb.schedules import make_schedule
from ddpm_nb.unet import UNet

N = 500


def distance(x):
    """Measure samples of digits against the training digits."""
    judge = load_classifier("digits")
    return frechet_distance(classifier_features(judge, load_images("digits")), classifier_features(judge, x.float()))


def new_unet():
    """Build a small network for the digits."""
    with seeded_init(0):
        return UNet(8, 1, 16, (1, 2), 1, (4,), norm_groups=8)


def try_k_diffusion():
    """Draw by its solvers, over the levels of Karras et al. up to 80; the schedule's own largest level ruins all of them."""
    from k_diffusion import external, sampling

    network, schedule = load_pretrained("digits")
    for quantize in (False, True):
        model = external.DiscreteEpsDDPMDenoiser(network, schedule.alpha_bars, quantize)
        sigmas = sampling.get_sigmas_karras(20, float(model.sigma_min), 80.0)
        x = 80 * torch.randn(N, 1, 8, 8, generator=seeded(0))
        for name in ("sample_euler", "sample_heun", "sample_dpmpp_2m", "sample_lms"):
            value = distance(getattr(sampling, name)(model, x, sigmas, disable=True))
            print(f"   {name}, quantize={quantize}: distance {value:.1f}")
            assert value < 100
    sigmas = model.get_sigmas(20)
    x = sigmas[0] * torch.randn(N, 1, 8, 8, generator=seeded(0))
    value = distance(sampling.sample_euler(model, x, sigmas, disable=True))
    print(f"   sample_euler with get_sigmas, from {float(sigmas[0]):.0f}: distance {value:.1f}")
    assert value > 200


class ForLucidrains(nn.Module):
    """Give a network of ours what GaussianDiffusion asks of its own."""

    def __init__(self, network):
        super().__init__()
        self.network, self.self_condition = network, False
        self.channels = self.out_dim = network.in_channels

    def forward(self, x, t, x_self_cond=None):
        return self.network(x, t)


def try_denoising_diffusion_pytorch():
    """Train a step and draw with its loss and its DDIM; its cosine betas are ours."""
    from denoising_diffusion_pytorch import GaussianDiffusion

    network, schedule = load_pretrained("digits")
    options = {"image_size": 8, "timesteps": 1000, "sampling_timesteps": 50, "objective": "pred_noise", "beta_schedule": "cosine"}
    diffusion = GaussianDiffusion(ForLucidrains(network), **options)
    torch.testing.assert_close(diffusion.betas, schedule.betas, rtol=1e-4, atol=1e-7)
    assert diffusion((load_images("digits")[:16] + 1) / 2).isfinite()
    with torch.no_grad():
        torch.manual_seed(0)
        value = distance(diffusion.sample(N) * 2 - 1)
    print(f"   distance {value:.1f}")
    assert value < 100


def try_lightning():
    """Train in several precisions, keep the weights, load them."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network, self.schedule = new_unet(), make_schedule("cosine", 100)

        def training_step(self, batch, i):
            return simple_loss(self.network, self.schedule, batch)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.network.parameters(), 1e-3)

    for precision in ("32-true", "bf16-mixed", "bf16-true", "64-true"):
        dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
        loader = torch.utils.data.DataLoader(load_images("digits")[:64].to(dtype), 16)
        with tempfile.TemporaryDirectory() as folder:
            quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
            trainer = lightning.Trainer(max_steps=4, precision=precision, accelerator="cpu", default_root_dir=folder, **quiet)
            module = Module()
            trainer.fit(module, loader)
            trainer.save_checkpoint(f"{folder}/it.ckpt")
            again = Module.load_from_checkpoint(f"{folder}/it.ckpt")
        assert all(a.float().equal(b.float()) for a, b in zip(again.parameters(), module.parameters(), strict=True))
        print(f"   {precision}: trained, kept and loaded")


def try_transformers():
    """Train with its Trainer, save, go on."""
    import transformers

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.network, self.schedule = new_unet(), make_schedule("cosine", 100)

        def forward(self, images):
            return {"loss": simple_loss(self.network, self.schedule, images)}

    data = [{"images": image} for image in load_images("digits")[:64]]
    with tempfile.TemporaryDirectory() as folder:
        options = {"per_device_train_batch_size": 16, "report_to": [], "use_cpu": True, "save_steps": 4, "disable_tqdm": True}
        for n_steps, resume in ((4, False), (8, True)):
            arguments = transformers.TrainingArguments(folder, max_steps=n_steps, remove_unused_columns=False, **options)
            trainer = transformers.Trainer(Model(), arguments, train_dataset=data)
            trainer.train(resume_from_checkpoint=resume)
            assert trainer.state.global_step == n_steps
    print("   trained, kept and resumed")


def main():
    """Try each package that is there."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for name in ("k_diffusion", "denoising_diffusion_pytorch", "lightning", "transformers"):
        if importlib.util.find_spec(name) is None:
            print(f"{name}: not installed")
            continue
        print(f"{name}:")
        globals()[f"try_{name}"]()


if __name__ == "__main__":
    main()
