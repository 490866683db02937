"""Print the rate of the fastest 3x3 convolution, forward and backward, in GFLOP/s: the practical peak of this machine."""

import json
import statistics
import sys
import time

import torch
from torch import nn

SHAPES = ((64, 64, 64, 32), (64, 128, 128, 16), (64, 256, 256, 16), (32, 256, 256, 32))  # batch, channels in and out, side


def rate(shape, dtype, device, n=7):
    """Return GFLOP/s of the median of n passes forward and backward."""
    batch, c_in, c_out, side = shape
    conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False).to(device, dtype)
    x = torch.randn(batch, c_in, side, side, device=device, dtype=dtype, requires_grad=True)
    y = torch.randn(batch, c_out, side, side, device=device, dtype=dtype)
    seconds = []
    for _ in range(n + 2):
        start = time.perf_counter()
        conv(x).backward(y)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 3 * 2 * 9 * batch * c_in * c_out * side**2 / statistics.median(seconds[2:]) / 1e9


def main():
    """Measure the shapes and print the fastest."""
    device, precision, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    rates = {str(list(shape)): round(rate(shape, getattr(torch, precision), torch.device(device)), 1) for shape in SHAPES}
    print(json.dumps({"gflops": max(rates.values()), "shapes": rates}))


if __name__ == "__main__":
    main()
