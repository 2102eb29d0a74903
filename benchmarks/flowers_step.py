"""How long one training step of the flower network takes, in two precisions and two memory layouts.

    python benchmarks/flowers_step.py [--batch 32] [--size 64] [--repeats 10] [--write]
    python benchmarks/flowers_step.py --curve [--control] [--steps 200]

The network is the variant with 3x3 shortcuts, 2,638,755 parameters. The reference is plain PyTorch: float32, the default
layout. Steps of all kinds are timed in turn, so that what disturbs one disturbs all. Nothing else should run meanwhile.
`--write` stores the numbers in results/flowers_step.json. `--curve` trains twice with the same weights, images, times and
noise, plain and in bfloat16 with channels last, and prints how far the smoothed losses part; with `--write` they are kept too.
`--control` adds a third training, in float32 with channels last: it rounds in another order and does nothing else, so it
tells how far two runs part for no reason. The smaller the batch and the images, the further.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffusion_book.core import RandomStreams, environment, write_whole
from diffusion_book.data import load
from diffusion_book.diffusion import GaussianDiffusion
from diffusion_book.precision import in_precision
from diffusion_book.resunet import ResUNet
from diffusion_book.schedule import OffsetCosineSchedule
from diffusion_book.tables import count_parameters

ROOT = Path(__file__).resolve().parent.parent
PLAIN, CONTROL, FAST = ("float32", "default"), ("float32", "channels_last"), ("bf16", "channels_last")
KINDS = [PLAIN, CONTROL, ("bf16", "default"), FAST]
LAYOUTS = {"default": torch.contiguous_format, "channels_last": torch.channels_last}


def smooth_images(n: int, size: int, generator: torch.Generator) -> Tensor:
    """Coloured blobs instead of flowers, (n, 3, size, size): enlarged noise, of mean 0 and standard deviation 1."""
    small = torch.randn(n, 3, max(2, size // 8), max(2, size // 8), generator=generator)
    x = interpolate(small, size=(size, size), mode="bicubic")
    return (x - x.mean()) / x.std()


def images(n: int, size: int, generator: torch.Generator) -> tuple[str, Tensor]:
    """What to train on: the flowers where they are available, else smooth random images; normalised."""
    try:
        pixels = load("flowers102", size=size).images[:n].float()
    except (ValueError, OSError) as reason:
        print(f"smooth random images instead of flowers: {str(reason).splitlines()[0]}")
        return "smooth random images", smooth_images(n, size, generator)
    return "flowers102", (pixels - pixels.mean((0, 2, 3), keepdim=True)) / pixels.std((0, 2, 3), keepdim=True)


def training_step(kind: tuple[str, str], seed: int = 0) -> Callable[[Tensor], Tensor]:
    """Forward, backward and optimizer on a batch; returns the loss."""
    streams, (precision, layout) = RandomStreams(seed), kind
    model = ResUNet(shortcut_kernel=3, generator=streams.initialisation)
    model.memory_format = LAYOUTS[layout]
    diffusion, denoiser = GaussianDiffusion(OffsetCosineSchedule()), in_precision(model, precision)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4, fused=kind != PLAIN)

    def step(x0: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = diffusion.loss(denoiser, x0, loss="l1", generator=streams.noise)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def measure(batch: int, size: int, repeats: int) -> dict[str, object]:
    x0 = smooth_images(batch, size, RandomStreams(0).data)
    steps, found = {kind: training_step(kind) for kind in KINDS}, {kind: [] for kind in KINDS}
    for i in range(-2, repeats):  # the first two rounds do not count
        for kind, step in steps.items():
            start = time.perf_counter()
            step(x0)
            if i >= 0:
                found[kind].append(time.perf_counter() - start)
    middle = {kind: median(seconds) for kind, seconds in found.items()}
    return {
        "batch": batch,
        "size": size,
        "threads": torch.get_num_threads(),
        "parameters": count_parameters(ResUNet(shortcut_kernel=3)),
        "seconds": {
            " ".join(kind): {"median": middle[kind], "best": min(seconds), "worst": max(seconds)}
            for kind, seconds in found.items()
        },
        "speedup": {" ".join(kind): middle[PLAIN] / seconds for kind, seconds in middle.items()},
    }


def smoothed(losses: Iterable[float], share: float = 0.05) -> list[float]:
    """Running averages, each loss with a weight of `share`; the first is the first loss."""
    out: list[float] = []
    for loss in losses:
        out.append(loss if not out else (1 - share) * out[-1] + share * loss)
    return out


def curves(batch: int, size: int, steps: int, control: bool) -> dict[str, object]:
    data = RandomStreams(0).data
    name, x0 = images(64 * batch, size, data)
    rows = [torch.randperm(len(x0), generator=data)[:batch] for _ in range(steps)]
    lines: dict[str, list[float]] = {}
    for kind in [PLAIN, FAST] + [CONTROL] * control:
        step = training_step(kind)
        lines[" ".join(kind)] = smoothed(float(step(x0[chosen])) for chosen in rows)
    plain, largest = lines[" ".join(PLAIN)], {}
    for kind, line in lines.items():
        apart = [abs(other / value - 1) for value, other in zip(plain, line, strict=True)]
        largest[kind] = max(apart)
        where = f"largest relative difference {max(apart):.2%}, in step {1 + apart.index(max(apart))}"
        print(f"{name}, {kind}: smoothed loss {line[-1]:.4f} after {steps} steps; {where}", flush=True)
    rounded = {kind: [round(value, 5) for value in line] for kind, line in lines.items()}
    return {"data": name, "steps": steps, "smoothed": rounded, "largest_relative_difference": largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("batch", 32), ("size", 64), ("repeats", 10), ("steps", 200)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--curve", action="store_true", help="compare loss curves too")
    parser.add_argument("--control", action="store_true", help="with --curve, in float32 with channels last as well")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    found = measure(given.batch, given.size, given.repeats)
    print(json.dumps(found, indent=1))
    if given.curve:
        found["curve"] = curves(given.batch, given.size, given.steps, given.control)
    if given.write:
        flags = [f"--{key}" for key in ("curve", "control") if getattr(given, key)]
        options = {key: getattr(given, key) for key in ("batch", "size", "repeats", "steps")}
        called = " ".join([*(f"--{key} {value}" for key, value in options.items()), *flags])
        record = {
            "name": "flowers_step",
            "command": f"python benchmarks/flowers_step.py {called} --write",
            "sampler": None,
            "config": {"recipe": "published"} | options | {"curve": given.curve, "control": given.control},
            "environment": environment() | {"preset": "published"},
            "runs": found,
        }
        write_whole(ROOT / "results" / "flowers_step.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
