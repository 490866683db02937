"""What the pages train, counted in operations instead of seconds: the same on every machine, whatever else it does.

A step of the digits' U-Net with 64 images is 6.2 GFLOP, and one core of an x86-64 server with AVX-512 takes 0.19 s for it: 32 GFLOP/s.
(Smaller networks get 16 to 23, larger batches 44.) A slow core has half of that speed, so two of them together do 32 GFLOP/s at best,
and in the 120 seconds that a cell may take (`tools/slow.py`) 3,800 GFLOP.
"""

import ast
import re

import pytest
import rules
import slow
import torch
from torch.utils.flop_counter import FlopCounterMode

from ddpm_nb.training import TrainConfig
from ddpm_nb.unet import ResNetBaseline, UNet, make_unet

GFLOPS = 32  # a second, by two slow cores
MOST = GFLOPS * slow.LONGEST_CELL  # GFLOP in a cell
BOOK = {nb.name[:2]: nb for nb in rules.read_book()}


def page(chapter):
    """Return the code of a chapter that its page runs."""
    return "\n".join(cell.code for cell in BOOK[chapter].code if not cell.exported)


def number(chapter, pattern):
    """Read a number from the code of a page, where it stands once."""
    (found,) = re.findall(pattern, page(chapter))
    return int(found)


def settings(chapter, *words):
    """Return the settings of the training on a page whose call holds the given words."""
    calls = [node for node in ast.walk(ast.parse(page(chapter))) if isinstance(node, ast.Call) and ast.unparse(node.func) == "TrainConfig"]
    (call,) = [node for node in calls if all(word in ast.unparse(node) for word in words)]
    given = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg in ("n_iterations", "batch_size")}
    return TrainConfig(**given)


def gflop(network, batch, *, trains=True):
    """Count the operations of one step, forward and backward, or of one call alone; nothing is computed."""
    network = network.to("meta")
    x, t = torch.zeros(batch, 1, 8, 8, device="meta"), torch.zeros(batch, dtype=torch.long, device="meta")
    with torch.device("meta"), torch.set_grad_enabled(trains), FlopCounterMode(display=False) as counter:
        output = network(x, t)
        if trains:
            output.square().mean().backward()
    return counter.get_total_flops() / 1e9


def first_network():
    """Build the network that the first page writes out."""
    space = {}
    for cell in BOOK["00"].code:
        if cell.code.startswith(("import", "from", "class Block")) and "ddpm_nb" not in cell.code:
            exec(cell.code, space)
    return space["Denoiser"]()


def of_the_first_page():
    """Count the loop of the first page, with the looks that it takes on the way."""
    steps = number("00", r"(?m)^n_iterations(?:, \w+)? = (\d+)")
    batch = number("00", r"torch\.randint\(len\(digits\), \((\d+),\)\)")
    looks, drawn = re.findall(r"(?m)^    if i \+ 1 in \((.*)\):\n        .*sample\(network, (\d+)\)", page("00"))[0]
    calls = len(re.findall(r"\d+", looks)) * number("00", r"(?m)^T = (\d+)")
    return steps * gflop(first_network(), batch) + calls * gflop(first_network(), int(drawn), trains=False)


def trained(config, *networks):
    """Count the trainings of some networks with the same settings."""
    return sum(config.n_iterations * gflop(network, config.batch_size) for network in networks)


def of_the_comparison():
    """Build the network of the comparison in chapter 12."""
    return UNet(8, 1, 16, channel_mults=(1, 2), n_res_blocks=1, attn_resolutions=(4,), norm_groups=4)


TRAININGS = {
    "00, the loop": of_the_first_page,
    "00, the package": lambda: trained(settings("00", "n_iterations"), make_unet("digits")),
    "09, the loop": lambda: number("09", r"(?m)^for _ in range\((\d+)\):\n    x_0 = ") * gflop(make_unet("digits"), number("09", r"t = torch\.randint\(schedule\.n_steps, \((\d+),\)\)")),
    "09, one of the recipes": lambda: trained(settings("09", "**nothing"), make_unet("digits", base_channels=16, norm_groups=4)),
    "09, watched": lambda: trained(settings("09", "ema_decay=0.98"), make_unet("digits")),
    "12, two variants": lambda: trained(settings("12", "warmup=25"), of_the_comparison(), of_the_comparison()),
    "12, four networks": lambda: trained(
        settings("12", "seed=0"), ResNetBaseline(1, channels=1, n_blocks=1), ResNetBaseline(1), make_unet("digits"), make_unet("digits")
    ),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_two_slow_cores_train_what_a_cell_trains_in_two_minutes(name):
    assert 10 < TRAININGS[name]() < MOST


def test_a_step_is_counted():
    """Forward and backward are three times a call, but for the images, which need no gradient."""
    step, call = gflop(make_unet("digits"), 64), gflop(make_unet("digits"), 64, trains=False)
    assert step == pytest.approx(6.21, abs=0.05)
    assert 2.9 * call < step < 3 * call
