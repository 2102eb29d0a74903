"""A run of `fit` killed with SIGKILL at ten moments, some inside a write, ends as if nothing had happened."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_book.checkpoint import latest, load_checkpoint
from diffusion_book.core import RandomStreams
from diffusion_book.data import load
from diffusion_book.diffusion import GaussianDiffusion
from diffusion_book.ema import EMA
from diffusion_book.fit import fit
from diffusion_book.guards import EarlyStop
from diffusion_book.schedule import DiscreteSchedule, cosine_beta_schedule
from diffusion_book.train import warmup_cosine

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
EPOCHS, PER_EPOCH = 12, 10


class Little(torch.nn.Module):
    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(0.1 * torch.randn(1, 1, 3, 3, generator=generator))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(x, self.weight, padding=1)


def whole_run(folder: Path, on_step: Any = None) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Train from wherever the folder stands to the end."""
    torch.set_num_threads(1)
    streams = RandomStreams(0)
    model = Little(streams.initialisation)
    diffusion = GaussianDiffusion(DiscreteSchedule(cosine_beta_schedule(50)))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    ema, images = EMA(model, 0.9), load("digits").take(slice(0, 10 * PER_EPOCH))
    options: dict[str, Any] = {"scheduler": warmup_cosine(optimizer, EPOCHS * PER_EPOCH, 20), "ema": ema}
    options |= {"folder": folder, "save_every": 3, "log_every": 4, "on_step": on_step, "max_norm": 1.0}
    options |= {"validate": lambda: {"score": float(model.weight.detach().norm())}, "progress": False}
    history = fit(
        model,
        lambda net, batch: diffusion.loss(net, batch[0], generator=streams.noise),
        images,
        optimizer,
        streams,
        batch_size=10,
        epochs=EPOCHS,
        early_stop=EarlyStop(EPOCHS, "score"),
        **options,
    )
    return model, ema, history


def killed_run(folder: Path, kind: str, moment: float) -> None:
    """A process that kills itself: after some milliseconds of training, or inside its n-th write."""
    kill, writes = (lambda *_: os.kill(os.getpid(), signal.SIGKILL)), {"n": 0}
    if kind == "time":

        def begin(_: Any) -> None:
            if not writes["n"]:
                writes["n"] = 1
                threading.Timer(moment, kill).start()

        whole_run(folder, begin)
    else:
        before = {"fsync": os.fsync, "replace": os.replace}[kind]

        def dying(*given: Any) -> None:
            writes["n"] += 1
            if writes["n"] >= moment:
                kill()
            before(*given)

        setattr(os, kind, dying)
        whole_run(folder)


@pytest.fixture(scope="module")
def processes() -> Any:
    """Fresh processes that start in milliseconds: forks of one that has only imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "numpy", "safetensors.torch", "sklearn.datasets", __name__])
    return context


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in found]


def test_killed_ten_times_it_ends_bit_equal(tmp_path: Path, processes: Any) -> None:
    seed = random.randrange(10**6)
    print(f"seed of the moments: {seed}")
    chance = random.Random(seed)
    model, ema, history = whole_run(tmp_path / "whole")
    moments: list[tuple[str, float]] = [("time", chance.uniform(0, 0.08)) for _ in range(6)]
    moments += [(kind, chance.randint(1, 6)) for kind in ("fsync", "replace") for _ in range(2)]
    chance.shuffle(moments)
    folder, reached = tmp_path / "cut", [0]
    for kind, moment in moments:
        process = processes.Process(target=killed_run, args=(folder, kind, moment))
        process.start()
        process.join()
        found = latest(folder)
        reached.append(load_checkpoint(folder)["step"] if found else 0)
        print(f"{kind} {moment:.3g}: exit {process.exitcode}, step {reached[-1]}")
        assert process.exitcode == -signal.SIGKILL or reached[-1] == EPOCHS * PER_EPOCH
    assert reached == sorted(reached)
    again, averaged, resumed = whole_run(folder)
    assert torch.equal(again.weight, model.weight) and torch.equal(averaged.module.weight, ema.module.weight)
    assert [row["loss"] for row in resumed] == [row["loss"] for row in history]
    assert rows(folder) == rows(tmp_path / "whole")
    assert latest(folder / "best").name == latest(tmp_path / "whole" / "best").name
    assert not list(folder.glob(".*.part"))


def test_a_full_disk_leaves_the_last_checkpoint_usable_and_says_so(tmp_path: Path, monkeypatch: Any) -> None:
    model, _, history = whole_run(tmp_path / "whole")
    real, writes = os.fsync, {"n": 0}

    def full(descriptor: int) -> None:
        writes["n"] += 1
        if writes["n"] == 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device; not written, what was there before is untouched"):
        whole_run(tmp_path / "full")
    monkeypatch.undo()
    kept = load_checkpoint(tmp_path / "full")
    assert 0 < kept["step"] < EPOCHS * PER_EPOCH
    again, _, resumed = whole_run(tmp_path / "full")
    assert torch.equal(again.weight, model.weight)
    assert [row["loss"] for row in resumed] == [row["loss"] for row in history]
    assert rows(tmp_path / "full") == rows(tmp_path / "whole")
