"""Run one variant in a process of its own: read orders as lines of JSON, answer each with a line of JSON.

An order is timed from its first to its last operation; between orders the process waits and uses no processor.
"""

import json
import os
import resource
import sys
import time

import torch
from peers import LIBRARIES, Case
from torch.utils.flop_counter import FlopCounterMode

OUT = os.fdopen(os.dup(1), "w")  # for the answers alone: whatever a library prints goes elsewhere
os.dup2(2, 1)


def synchronize(device):
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Measure wall and processor seconds since it was started."""

    def __init__(self, device):
        self.device = device
        self.start()

    def start(self):
        synchronize(self.device)
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self):
        synchronize(self.device)
        return {"wall": time.perf_counter() - self.wall, "cpu": time.process_time() - self.cpu}


def receive():
    """Wait for an order; without one, end."""
    return json.loads(line) if (line := sys.stdin.readline()) else sys.exit()


def answer(**facts):
    """Send what was measured."""
    print(json.dumps(facts), file=OUT, flush=True)


def peak_bytes(device):
    """Return the largest memory held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe(variant, case):
    """Count parameters and the operations of one forward pass for one image of a batch."""
    n = 4
    x, t = case.noise(n), torch.zeros(n, dtype=torch.long, device=case.device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        variant.network(x, t)
    return {"parameters": sum(p.numel() for p in variant.network.parameters()), "flops": counter.get_total_flops() // n}


def train(variant, case, order):
    """Take training steps on images that are on the device."""
    p = case.plan
    x_0 = torch.rand(order["batch"], p["channels"], case.size, case.size, device=case.device) * 2 - 1
    clock, options = Clock(case.device), {"without": order["without"]} if "without" in order else {}
    for _ in range(order["n"]):
        variant.step(x_0, **options)
    answer(**clock.read(), n=order["n"], peak_bytes=peak_bytes(case.device))


def chain(variant, case, order):
    """Walk a chain in pieces: after each, answer and wait for the next order, so that variants take turns."""
    clock, done = Clock(case.device), 0

    def hook():
        nonlocal done
        done += 1
        if done % order["piece"] == 0:
            answer(**clock.read(), n=order["piece"], peak_bytes=peak_bytes(case.device))
            receive()
            clock.start()

    variant.chain(order["batch"], order["n_steps"], hook)
    answer(done=True)


def main():
    """Set up the variant and follow orders."""
    given = json.loads(sys.argv[1])
    if given.get("allocator"):
        from ddpm_nb.fast import keep_freed_memory

        assert keep_freed_memory(), "the allocator's setting was refused"
    device = torch.device(given["device"])
    torch.set_num_threads(given["threads"])
    torch.manual_seed(0)
    case = Case(given["network"], given["size"], given["precision"], device)
    options = {name: given[name] for name in ("compiled", "tried") if name in given}
    variant = LIBRARIES[given["library"]](case, **options)
    answer(**describe(variant, case), base_bytes=peak_bytes(device))
    while True:
        order = receive()
        {"train": train, "chain": chain}[order["do"]](variant, case, order)


if __name__ == "__main__":
    main()
