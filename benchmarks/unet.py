"""Time the U-Net against diffusers' on the same architecture, step by step in turn.

Both networks get the same inputs. One round runs a step of each, in alternating order, so that whatever else the machine does
falls on both alike. Medians of the paired ratios are what to read; CPU seconds ignore time in which another process had the core.
"""

import argparse
import json
import platform
import statistics
import time

import torch
from diffusers import UNet2DModel

from ddpm_nb.unet import UNet


def ours(args):
    """Build our network."""
    mults, size = tuple(args.mults), args.image_size
    return UNet(size, 1, args.channels, mults, attn_resolutions=(args.attention,))


def theirs(args):
    """Build diffusers' network of the same layers."""
    sizes = [args.image_size // 2**i for i in range(len(args.mults))]
    attends = [size == args.attention for size in sizes]
    return UNet2DModel(
        sample_size=args.image_size,
        in_channels=1,
        out_channels=1,
        block_out_channels=[args.channels * m for m in args.mults],
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        layers_per_block=2,
        downsample_padding=0,
        attention_head_dim=None,
        norm_eps=1e-6,
        flip_sin_to_cos=False,
        freq_shift=1,
    )


def step(model, x, t, backward):
    """Run the network once; with `backward`, also its gradients."""
    with torch.set_grad_enabled(backward):
        y = model(x, t)
        y = y if isinstance(y, torch.Tensor) else y.sample
        if backward:
            y.square().mean().backward()
            model.zero_grad(set_to_none=True)


def timed(function, device):
    """Return wall and CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(models, args, device):
    """Run the models in turn and return the (wall, CPU) seconds of every round of each."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(args.batch, 1, args.image_size, args.image_size, generator=generator).to(device)
    t = torch.randint(0, 1000, (args.batch,), generator=generator).to(device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    times = {name: [] for name in models}
    for i in range(args.warmup + args.rounds):
        for name in list(models) if i % 2 else list(models)[::-1]:
            with autocast:
                pair = timed(lambda name=name: step(models[name], x, t, not args.forward), device)
            if i >= args.warmup:
                times[name].append(pair)
    return times


def summarize(times):
    """Reduce the rounds to medians in milliseconds and the median of the paired ratios."""
    result = {}
    for column, clock in enumerate(("wall", "cpu")):
        values = {name: [pair[column] for pair in pairs] for name, pairs in times.items()}
        ratios = [a / b for a, b in zip(values["ddpm_nb"], values["diffusers"], strict=True)]
        result[clock] = {name: round(1000 * statistics.median(v), 2) for name, v in values.items()}
        result[clock]["ratio"] = round(statistics.median(ratios), 4)
        result[clock]["ratio_quartiles"] = [round(q, 4) for q in statistics.quantiles(ratios, n=4)[::2]]
    return result


def parse():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--mults", type=int, nargs="+", default=[1, 2, 2])
    parser.add_argument("--attention", type=int, default=16, help="resolution that attends")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice without")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--forward", action="store_true", help="forward only, without gradients")
    parser.add_argument("--json", metavar="FILE", help="also write the result here")
    return parser.parse_args()


def main():
    """Measure and print."""
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    models = {"ddpm_nb": ours(args).to(device), "diffusers": theirs(args).to(device)}
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert len(set(sizes.values())) == 1, f"the networks differ: {sizes}"
    result = {"parameters": sizes["ddpm_nb"], "torch": torch.__version__, "machine": platform.machine(), **vars(args)}
    result |= {"threads": torch.get_num_threads(), **summarize(measure(models, args, device))}
    for clock in ("wall", "cpu"):
        row = result[clock]
        low, high = row["ratio_quartiles"]
        times = "  ".join(f"{name} {row[name]:8.1f} ms" for name in models)
        print(f"{clock:5}{times}  ratio {row['ratio']:.3f} ({low:.3f} to {high:.3f})")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
