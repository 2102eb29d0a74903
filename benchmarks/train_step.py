"""How long one training step of the MNIST U-Net takes, in float32 and bfloat16, and how much of the processor it uses.

    python benchmarks/train_step.py [--batch 128] [--repeats 20] [--write]

Operations are counted (multiply-adds of all convolutions and matrix products, three times for forward and backward).
The peak is the best of a large matrix product and a large convolution, in bfloat16, measured in the same run.
Nothing else should run meanwhile. On processors with matrix units (AMX) `ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16`
shows what the vector units alone would give. `--write` stores the numbers in results/train_step.json.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn

from diffusion_book.core import RandomStreams, environment, write_whole
from diffusion_book.digits import digits_card, digits_config
from diffusion_book.precision import in_precision
from diffusion_book.tables import multiply_adds
from diffusion_book.weights import Pretrained

ROOT = Path(__file__).resolve().parent.parent


def seconds(call: Callable[[], object], repeats: int) -> list[float]:
    """Times of single calls, after three that do not count."""
    found = []
    for i in range(-3, repeats):
        start = time.perf_counter()
        call()
        if i >= 0:
            found.append(time.perf_counter() - start)
    return found


def network() -> Pretrained:
    return Pretrained.fresh(digits_card(digits_config("published", "published"), 0), RandomStreams(0).initialisation)


def training_step(precision: str, batch: int) -> Callable[[], None]:
    """Forward, backward and optimizer, on images that are already there."""
    trained, streams = network(), RandomStreams(0)
    optimizer = torch.optim.Adam(trained.model.parameters(), lr=1e-3, fused=True)
    x0 = torch.rand(batch, 1, 28, 28, generator=streams.data) * 2 - 1
    denoiser = in_precision(trained.model, precision)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        trained.diffusion.loss(denoiser, x0, generator=streams.noise).backward()
        optimizer.step()

    return step


def peak(repeats: int) -> dict[str, float]:
    """Operations per second of a matrix product and of a convolution in bfloat16, the best of several calls."""
    n, c, side, images = 4096, 256, 28, 32
    a, b = torch.randn(2, n, n).bfloat16()
    conv = nn.Conv2d(c, c, 3, padding=1).bfloat16().to(memory_format=torch.channels_last)
    x = torch.randn(images, c, side, side).bfloat16().to(memory_format=torch.channels_last)
    with torch.no_grad():
        product, convolution = min(seconds(lambda: a @ b, repeats)), min(seconds(lambda: conv(x), repeats))
    return {"matrix product": 2 * n**3 / product, "convolution": 2 * images * side**2 * 9 * c**2 / convolution}


def measure(batch: int, repeats: int) -> dict[str, object]:
    count = multiply_adds(network().model, torch.zeros(1, 1, 28, 28), torch.ones(1, dtype=torch.long))[""]
    operations, best = 2 * 3 * count * batch, peak(repeats)
    steps = {name: seconds(training_step(name, batch), repeats) for name in ("float32", "bf16")}
    middle = {name: median(found) for name, found in steps.items()}
    return {
        "batch": batch,
        "operations": operations,
        "seconds": {
            name: {"median": middle[name], "best": min(found), "worst": max(found)} for name, found in steps.items()
        },
        "speedup": middle["float32"] / middle["bf16"],
        "peak": best,
        "share_of_peak": operations / middle["bf16"] / max(best.values()),
        "instructions": os.environ.get("ONEDNN_MAX_CPU_ISA", "all"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    found = measure(given.batch, given.repeats)
    print(json.dumps(found, indent=1))
    if given.write:
        record = {
            "name": "train_step",
            "command": f"python benchmarks/train_step.py --batch {given.batch} --repeats {given.repeats} --write",
            "sampler": None,
            "config": {"recipe": "published", "batch": given.batch, "repeats": given.repeats},
            "environment": environment() | {"preset": "published"},
            "runs": found,
        }
        write_whole(ROOT / "results" / "train_step.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
