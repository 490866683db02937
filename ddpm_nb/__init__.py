"""Denoising diffusion, derived and run: `from ddpm_nb import NAME` offers the names below, each loaded when it is first used."""

__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and type checkers, which do not run `__getattr__`
    from .bound import VLBTerms, optimal_denoiser, rate_distortion, vlb_terms
    from .convert import unet_from_diffusers, unet_to_diffusers
    from .data import ImageDataset, load_dataset, load_images
    from .elbo import predict_noise, simple_loss
    from .embeddings import sinusoidal_embedding
    from .evaluation import bits_per_dim, frechet_distance, kernel_distance, load_classifier
    from .fast import optimize_for_sampling
    from .forward import NoiseSchedule, predict_eps, predict_x_0, q_mean_variance, q_posterior, q_sample, q_step
    from .gaussian import GaussianMixture, discretized_gaussian_log_likelihood, normal_kl, reparameterize
    from .hub import load_pretrained, save_pretrained
    from .pictures import FolderDataset
    from .pipeline import TextToImage
    from .plots import image_slider, plot_curves, show_images
    from .runs import train
    from .sampling import ddim_invert, ddim_step, ddpm_step, inpaint, p_sample
    from .sampling import sample_ddim, sample_ddpm, sample_dpm_solver
    from .schedules import cosine_betas, linear_betas, make_schedule, sigmoid_betas
    from .score import flow_log_likelihood, sample_sde
    from .training import EMA, TrainConfig, TrainResult, fit
    from .unet import UNet, make_unet

# module -> the names that it offers here; a test compares this with the imports above
_OFFERED = {
    "bound": "VLBTerms optimal_denoiser rate_distortion vlb_terms",
    "convert": "unet_from_diffusers unet_to_diffusers",
    "data": "ImageDataset load_dataset load_images",
    "elbo": "predict_noise simple_loss",
    "embeddings": "sinusoidal_embedding",
    "evaluation": "bits_per_dim frechet_distance kernel_distance load_classifier",
    "fast": "optimize_for_sampling",
    "forward": "NoiseSchedule predict_eps predict_x_0 q_mean_variance q_posterior q_sample q_step",
    "gaussian": "GaussianMixture discretized_gaussian_log_likelihood normal_kl reparameterize",
    "hub": "load_pretrained save_pretrained",
    "pictures": "FolderDataset",
    "pipeline": "TextToImage",
    "plots": "image_slider plot_curves show_images",
    "runs": "train",
    "sampling": "ddim_invert ddim_step ddpm_step inpaint p_sample sample_ddim sample_ddpm sample_dpm_solver",
    "schedules": "cosine_betas linear_betas make_schedule sigmoid_betas",
    "score": "flow_log_likelihood sample_sde",
    "training": "EMA TrainConfig TrainResult fit",
    "unet": "UNet make_unet",
}
_HOME = {name: module for module, names in _OFFERED.items() for name in names.split()}
__all__ = sorted(_HOME)


def __getattr__(name):
    """Load a name when it is first used, and keep it."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    """List the offered names for whoever completes them."""
    return sorted({*globals(), *__all__})
