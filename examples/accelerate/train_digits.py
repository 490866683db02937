"""Train a small network on the digits in all processes that were started, and write what came out."""

import os
import sys

import torch
from safetensors.torch import save_file

from ddpm_nb.data import load_images
from ddpm_nb.processes import Processes
from ddpm_nb.schedules import make_schedule
from ddpm_nb.training import TrainConfig, fit
from ddpm_nb.unet import make_unet

path = sys.argv[1]
processes = Processes(sys.argv[2])  # "cpu", or "cuda": a GPU for each process of a machine
torch.set_num_threads(1)
torch.manual_seed(0)  # the same first weights in every process
model = make_unet("digits", base_channels=8, norm_groups=2).to(processes.device)
config = TrainConfig(n_iterations=30, batch_size=32, lr=2e-3, warmup=10, precision="float32")
rates = []
result = fit(
    model,
    make_schedule("cosine", 300),
    load_images("digits"),
    config,
    callback=lambda run: rates.append(run.optimizer.param_groups[0]["lr"]),
    progress=False,
    processes=processes,
)
tensors = {f"ema.{name}": value for name, value in result.ema.state_dict().items()}
tensors |= {"losses": result.losses, "rates": torch.tensor(rates, dtype=torch.float64)}
save_file(tensors, f"{path}-{os.environ.get('RANK', 0)}.safetensors")
