"""What the tests of training, of runs and of processes share: a tiny network, data, and short runs of both."""

import torch
from torch import nn
from torch.utils.data import Dataset

from ddpm_nb.data import ImageDataset
from ddpm_nb.gaussian import seeded_init
from ddpm_nb.runs import train
from ddpm_nb.schedules import make_schedule
from ddpm_nb.training import TrainConfig, Trainer
from ddpm_nb.unet import make_unet

TINY = {"base_channels": 8, "channel_mults": (1, 1), "attn_resolutions": (), "dropout": 0.1}
QUICK = TrainConfig(
    n_iterations=9, batch_size=8, warmup=2, ema_decay=0.9, precision="float32", log_every=2, checkpoint_every=2, seed=3
)
N_STEPS = 20
CPU = torch.device("cpu")


class Stop(Exception):
    """What a test raises inside a callback, as if the process had died there."""


class Streamed(Dataset):
    """Images that are read one at a time."""

    flip = True

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], 0


class Affine(nn.Module):
    """Scale and shift an image, whatever the step."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x, t):
        return self.scale * x + self.shift


def tiny_unet(seed=0, **changes):
    with seeded_init(seed):
        return make_unet("digits", **(TINY | changes))


def levels(n=37, seed=0):
    return torch.randint(0, 17, (n, 1, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def make_data(kind="memory", seed=0):
    """Return 37 images (four batches of eight an epoch, and five left over) in one of the ways to serve them."""
    data = ImageDataset(levels(seed=seed), torch.zeros(37), n_levels=17, classes="0", flip=True)
    images = data.images()
    return {"tensor": images, "memory": data, "streamed": Streamed(images), "workers": Streamed(images)}[kind]


def run(config=QUICK, model=None, kind="memory", data=None, **options):
    """Train a tiny network, with a folder where `out` says so."""
    options = {"progress": False, "n_workers": 2 if kind == "workers" else 0} | options
    model = tiny_unet() if model is None else model
    return train(model, make_schedule("cosine", N_STEPS), make_data(kind) if data is None else data, config, **options)


def make_trainer(config=QUICK, model=None, schedule=None):
    """Build a trainer; it seeds torch's global streams."""
    schedule = make_schedule("cosine", N_STEPS) if schedule is None else schedule
    return Trainer(tiny_unet() if model is None else model, schedule, config)


def at(*steps, act):
    """Make a callback that acts when so many steps are taken."""

    def callback(trainer):
        if trainer.n_steps in steps:
            act(trainer)

    return callback


def die(trainer):
    raise Stop


def held_out_draw(x):
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return {"t": torch.tensor([i * N_STEPS // len(x) for i in range(len(x))]), "eps": eps}


def all_equal(one, other):
    """Tell whether two sequences of tensors are equal to the last bit."""
    return all(a.equal(b) for a, b in zip(one, other, strict=True))
