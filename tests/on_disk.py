"""What the tests of files, models and conversions share."""

import json
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import torch

from ddpm_nb.files import CONFIG_FILE, WEIGHTS_FILE, checksum

SMALL = {"image_size": 8, "in_channels": 1, "base_channels": 8, "channel_mults": (1, 2), "n_res_blocks": 1, "attn_resolutions": (4,)}
SMALL["norm_groups"] = 4


def randomize(network, seed=0):
    """Give every weight a random value, the ones that begin at zero too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            scale, centre = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.5, float("norm" in name)
            tensor.copy_(centre + scale * torch.randn(tensor.shape, generator=generator))
    return network.eval()


def same_weights(a, b):
    """Tell whether two networks have the same tensors, to the last bit."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def contents(folder):
    """Read all files of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def read(folder):
    """Read what a folder says of its model."""
    return json.loads((folder / CONFIG_FILE).read_text())


def seal(path, config=None, weights=None):
    """Write a model with a correct checksum, as somebody would who changes both files on purpose."""
    config = read(path) if config is None else config
    weights = (path / WEIGHTS_FILE).read_bytes() if weights is None else weights
    (path / WEIGHTS_FILE).write_bytes(weights)
    (path / CONFIG_FILE).write_text(json.dumps(config | {"sha256": checksum(config, weights)}))


@contextmanager
def as_nobody():
    """Run without the rights of root, for whom no folder is unwritable."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def full_disk(n_bytes):
    """Let every write beyond the first `n_bytes` of a file fail."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class Bomb:
    """Leave a trace when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)
