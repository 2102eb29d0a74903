"""A run of `fit` killed with SIGKILL at ten moments, some inside a write, ends as if nothing had happened."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable
from functools import partial
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
KINDS = ("while it computes", "before the file is on the disk", "before it gets its name")


class Little(torch.nn.Module):
    """One convolution, and dropout, which draws from the hidden generator."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(0.1 * torch.randn(1, 1, 3, 3, generator=generator))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.dropout(x, 0.1, self.training)
        return torch.nn.functional.conv2d(hidden, self.weight, padding=1)


def whole_run(folder: Path, on_step: Any = None) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Train from wherever the folder stands to the end."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
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


def killed_run(folder: Path, kind: str, step: int, delay: float) -> None:
    """A process that kills itself, some time after a step or in the first write after it."""

    def kill(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def on_step(done: Any) -> None:
        if done.step != step:
            return
        if kind == KINDS[0]:
            threading.Timer(delay, kill).start()
        else:
            setattr(os, {KINDS[1]: "fsync", KINDS[2]: "replace"}[kind], kill)

    whole_run(folder, on_step)


@pytest.fixture(scope="module")
def processes() -> Any:
    """Fresh processes that start in milliseconds: forks of one that has only imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "numpy", "safetensors.torch", "sklearn.datasets", __name__])
    return context


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in found]


def check_equal(folder: Path, undisturbed: Path) -> None:
    """Finish the run in one folder: bit for bit what the other one holds."""
    model, ema, history = whole_run(folder)
    other, average, expected = whole_run(undisturbed)  # it is over: only read
    assert torch.equal(model.weight, other.weight) and torch.equal(ema.module.weight, average.module.weight)
    assert [row["loss"] for row in history] == [row["loss"] for row in expected]
    assert rows(folder) == rows(undisturbed)
    assert latest(folder / "best").name == latest(undisturbed / "best").name  # type: ignore[union-attr]
    assert not list(folder.rglob("*.part"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    whole_run(folder)
    assert load_checkpoint(folder)["step"] == EPOCHS * PER_EPOCH
    return folder


def test_killed_ten_times_it_ends_bit_equal(tmp_path: Path, processes: Any, undisturbed: Path) -> None:
    seed = random.randrange(10**6)
    print(f"seed of the moments: {seed}")
    chance = random.Random(seed)
    kinds = [*KINDS, *(chance.choice(KINDS) for _ in range(7))]
    chance.shuffle(kinds)
    reached = [0]
    for i, kind in enumerate(kinds):  # a moment in each tenth of the run, which the last one has not passed
        step, delay = chance.randint(12 * i + 1, 12 * i + 8), chance.uniform(0, 0.01)
        process = processes.Process(target=killed_run, args=(tmp_path, kind, step, delay))
        process.start()
        process.join()
        found = latest(tmp_path)
        reached.append(load_checkpoint(found)["step"] if found else 0)
        print(f"killed {kind}, after step {step}: the last checkpoint is of step {reached[-1]}")
        assert process.exitcode == -signal.SIGKILL
    assert reached == sorted(reached) and 100 < reached[-1] < EPOCHS * PER_EPOCH
    check_equal(tmp_path, undisturbed)


# A disk that is full


def fail_at(n: int, real: Callable[[int], None], writes: dict[str, int], descriptor: int) -> None:
    writes["n"] += 1
    if writes["n"] == n:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real(descriptor)


@pytest.mark.parametrize("n", [1, 2, 9, 20])
def test_a_full_disk_leaves_the_last_checkpoint_usable_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Path, n: int
) -> None:
    monkeypatch.setattr(os, "fsync", partial(fail_at, n, os.fsync, {"n": 0}))
    with pytest.raises(
        OSError, match=r"No space left on device; not written, what was there .* is untouched"
    ) as caught:
        whole_run(tmp_path)
    monkeypatch.undo()
    if n == 1:
        assert "none was saved" in str(caught.value) and latest(tmp_path) is None
    else:
        kept = load_checkpoint(tmp_path)
        assert f"the last checkpoint is {kept['path'].name}, and the same call goes on" in str(caught.value)
        assert 0 < kept["step"] < EPOCHS * PER_EPOCH
    check_equal(tmp_path, undisturbed)


def limited_run(folder: Path, told: Path) -> None:
    """No file may grow any more after step 31: what the system does, not what we make of it."""
    import resource

    def on_step(done: Any) -> None:
        if done.step == 31:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (8000, resource.RLIM_INFINITY))

    try:
        whole_run(folder, on_step)
    except OSError as error:
        told.write_text(str(error))


def test_files_that_cannot_grow_leave_the_last_checkpoint_usable(
    tmp_path: Path, processes: Any, undisturbed: Path
) -> None:
    process = processes.Process(target=limited_run, args=(tmp_path / "run", tmp_path / "told"))
    process.start()
    process.join()
    assert process.exitcode == 0
    told = (tmp_path / "told").read_text()
    assert "File too large; not written" in told and "the last checkpoint is step_000000030.safetensors" in told
    check_equal(tmp_path / "run", undisturbed)
