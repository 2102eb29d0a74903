"""Two processes follow the curve of one; what is drawn, divided, averaged and told; what a run will cost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diffusion_book import core
from diffusion_book.processes import GlobalDraws, Processes, exchange_seconds, images_per_second, saved_bytes

TRAINING = """
import json, sys
import torch
from diffusion_book.core import RandomStreams
from diffusion_book.data import load
from diffusion_book.diffusion import GaussianDiffusion
from diffusion_book.ema import EMA
from diffusion_book.fit import fit
from diffusion_book.guards import EarlyStop
from diffusion_book.guidance import drop_labels
from diffusion_book.processes import Processes
from diffusion_book.schedule import DiscreteSchedule, cosine_beta_schedule
from diffusion_book.unet import UNet

torch.set_num_threads(1)
folder, out, epochs = sys.argv[1:4]
rank = Processes.join().rank
streams = RandomStreams(0)
diffusion = GaussianDiffusion(DiscreteSchedule(cosine_beta_schedule(100)), "v")
model = UNet(1, 8, 100, num_classes=10, generator=streams.initialisation)
if rank:
    with torch.no_grad():
        model.get_parameter("final.weight").add_(1)  # process 0 puts this right
images = load("digits").take(slice(0, 400))
optimizer = torch.optim.Adam(model.parameters(), 1e-3)
curve, calls = [], []


def loss(net, batch):
    y = drop_labels(batch[1], 0.2, model.null_label, streams.noise)
    assert len(y) == 16 // Processes.join().count
    return diffusion.loss(net, batch[0], y, generator=streams.noise)


def validate():
    calls.append(rank)
    return {"score": float(len(curve))}


options = {"batch_size": 16, "epochs": int(epochs), "max_norm": 1.0, "ema": EMA(model), "validate": validate}
options |= {"on_step": lambda done: curve.append((float(done.loss), float(done.gradient_norm)))}
history = fit(model, loss, images, optimizer, streams, folder=folder, log_every=10, **options)
weights = torch.cat([p.detach().flatten() for p in model.parameters()])
found = {"curve": curve, "history": history, "calls": calls, "weights": weights.double().norm().item()}
found["noise"] = streams.noise.get_state().tolist()[:100]
print("count", Processes.join().count)
open(f"{out}.{rank}", "w").write(json.dumps(found))
"""


def environment():
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return clean | {"OMP_NUM_THREADS": "1", "DIFFUSION_BOOK_DEVICE": "cpu"}


def launched(script: Path, count: int, *arguments: str) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    command = [sys.executable, *launcher, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same training in one process, in two, and begun by two and ended by one: what each process saw."""
    home = tmp_path_factory.mktemp("processes")
    script = home / "training.py"
    script.write_text(TRAINING)
    found = {}
    for name, count, epochs in (("one", 1, 3), ("two", 2, 2), ("mixed", 1, 3)):
        if name == "mixed":
            shutil.copytree(home / "two", home / name)
        text = launched(script, count, str(home / name), str(home / f"out-{name}"), str(epochs))
        assert text.count(f"count {count}") == count
        found[name] = [json.loads((home / f"out-{name}.{rank}").read_text()) for rank in range(count)]
    return home, found


@pytest.mark.skipif(os.name != "posix", reason="gloo and torchrun as on Linux")
def test_two_processes_follow_the_curve_of_one(runs):
    _, found = runs
    (one,), (first, _) = found["one"], found["two"]
    assert len(first["curve"]) == 50
    pairs = list(zip(one["curve"][:50], first["curve"], strict=True))
    worst = max(abs(a[0] - b[0]) for a, b in pairs)
    print(f"largest difference of the losses in 50 steps: {worst:.1e}")
    assert worst < 1e-4
    assert all(a[1] == pytest.approx(b[1], rel=1e-3) for a, b in pairs)
    assert max(loss for loss, _ in one["curve"]) - min(loss for loss, _ in one["curve"]) > 0.1, "a curve, not a line"


@pytest.mark.skipif(os.name != "posix", reason="gloo and torchrun as on Linux")
def test_both_end_with_the_same_weights_rows_and_streams(runs):
    _, found = runs
    first, second = found["two"]
    for name in ("curve", "history", "weights", "noise"):
        assert first[name] == second[name]
    assert first["calls"] == [0, 0] and second["calls"] == []
    assert first["history"][-1]["score"] == 50.0


@pytest.mark.skipif(os.name != "posix", reason="gloo and torchrun as on Linux")
def test_what_two_began_one_can_end(runs):
    _, found = runs
    (one,), (mixed,) = found["one"], found["mixed"]
    assert len(mixed["curve"]) == 25 and mixed["noise"] == one["noise"]
    assert [loss for loss, _ in mixed["curve"]] == pytest.approx([loss for loss, _ in one["curve"][50:]], abs=1e-4)
    assert mixed["history"][:2] == found["two"][0]["history"]


@pytest.mark.skipif(os.name != "posix", reason="gloo and torchrun as on Linux")
def test_only_the_first_writes(runs):
    home, _ = runs
    rows = [json.loads(line) for line in (home / "two" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 25, 30, 40, 50, 50]
    names = ["log.jsonl", "step_000000025.safetensors", "step_000000050.safetensors"]
    assert sorted(path.name for path in (home / "two").iterdir()) == names


# Draws


@pytest.mark.parametrize(
    "draw",
    [
        lambda n, g: torch.rand(n, generator=g),
        lambda n, g: torch.rand((n,), generator=g, dtype=torch.float64),
        lambda n, g: torch.rand(n, 3, generator=g),
        lambda n, g: torch.randn((n, 2, 3), generator=g),
        lambda n, g: torch.randn(torch.Size([n, 2]), generator=g),
        lambda n, g: torch.randint(1, 101, (n,), generator=g),
        lambda n, g: torch.randint(7, (n, 2), generator=g),
        lambda n, g: torch.randint(1, 9, size=(n,), generator=g),
        lambda n, g: torch.randn(size=(n, 2), generator=g),
        lambda n, g: core.randn_like(torch.zeros(n, 2), g),
    ],
)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_rows_of_all_processes_are_those_of_one(draw, count):
    whole = torch.Generator().manual_seed(0)
    expected, after = draw(4 * count, whole), whole.get_state()
    for rank in range(count):
        own = torch.Generator().manual_seed(0)
        with GlobalDraws(own, 4, rank, count):
            assert torch.equal(draw(4, own), expected[4 * rank : 4 * rank + 4])
        assert torch.equal(own.get_state(), after)


def test_other_draws_are_left_alone():
    own, other = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    with GlobalDraws(own, 4, 1, 2):
        assert torch.rand(4, generator=other).shape == (4,)
        assert torch.rand((), generator=own).shape == ()
        assert torch.rand(4).shape == (4,)
    plain = torch.Generator().manual_seed(0)
    torch.rand(4, generator=plain)
    assert torch.equal(other.get_state(), plain.get_state())


@pytest.mark.parametrize(
    "draw", [lambda g: torch.randperm(4, generator=g), lambda g: torch.empty(4).normal_(generator=g)]
)
def test_a_draw_that_cannot_be_divided_is_refused(draw):
    own = torch.Generator()
    with GlobalDraws(own, 4, 0, 2), pytest.raises(NotImplementedError, match="cannot be divided among processes"):
        draw(own)


@pytest.mark.parametrize("shape", [(3, 4), (8,), (1,), (2, 4)])
def test_a_draw_that_does_not_begin_with_the_rows_is_refused(shape):
    own = torch.Generator()
    with GlobalDraws(own, 4, 0, 2), pytest.raises(NotImplementedError, match="begins with the 4 rows of the batch"):
        torch.rand(shape, generator=own)


# One alone, and what is refused


def test_one_process_is_left_as_it_is(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = Processes.join()
    assert alone == Processes(0, 1) and not torch.distributed.is_initialized()
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert alone.prepare(net) is alone
    assert type(net[1]) is torch.nn.BatchNorm2d
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert alone.average(net, torch.tensor(2.0)).tolist() == [2.0]


class OnGpu(torch.nn.Sequential):
    """Says that its weights lie on a GPU."""

    def parameters(self, recurse=True):
        return iter([SimpleNamespace(is_cuda=True)])


def test_on_gpus_batches_are_normalised_over_all_processes(monkeypatch):
    told = []
    monkeypatch.setattr("diffusion_book.processes.dist.broadcast", lambda tensor, source: told.append((tensor, source)))
    inner = torch.nn.Sequential(torch.nn.BatchNorm2d(2), torch.nn.GroupNorm(1, 2))
    net = OnGpu(torch.nn.Conv2d(1, 2, 3), inner)
    weight, keys = inner[0].weight, list(net.state_dict())
    inner[0].running_mean.fill_(3)
    Processes(1, 2).prepare(net)
    assert type(inner[0]) is torch.nn.SyncBatchNorm and type(inner[1]) is torch.nn.GroupNorm
    assert inner[0].weight is weight  # the optimizer holds it
    assert inner[0].running_mean.tolist() == [3, 3] and list(net.state_dict()) == keys
    assert [source for _, source in told] == [0] * len(keys)  # every weight and every buffer comes from process 0


def test_a_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 processes; got 8"):
        next(Processes(0, 3).divide(iter([(torch.zeros(8),)])))


# What it will cost


def test_what_a_forward_pass_keeps_is_counted_once():
    a, b = torch.randn(10, requires_grad=True), torch.randn(10, requires_grad=True)
    assert saved_bytes(lambda: a * b) == 80  # both factors
    assert saved_bytes(lambda: a * b, a) == 40
    assert saved_bytes(lambda: a * a) == 40
    assert saved_bytes(lambda: a + b) == 0
    assert saved_bytes(lambda: (a * 1.0).sigmoid()) == 40  # its result


def test_speed_is_images_over_the_time_of_a_step(monkeypatch):
    clock = iter(x / 10 for x in range(10_000))  # every look at the clock is a tenth later
    monkeypatch.setattr("diffusion_book.processes.time.perf_counter", lambda: next(clock))
    calls = []
    assert images_per_second(lambda: calls.append(1), 8, seconds=1) == pytest.approx(80)
    assert len(calls) >= 10


@pytest.mark.parametrize(("processes", "expected"), [(1, 0.0), (2, 1.02), (4, 1.56), (1000, 2 * 999 * (1e-3 + 0.01))])
def test_a_ring_sends_almost_two_times_the_bytes(processes, expected):
    assert exchange_seconds(1e9, processes, 1e9, 0.01) == pytest.approx(expected)


@pytest.mark.parametrize("arguments", [(1.0, 0, 1.0), (1.0, 2, 0.0)])
def test_impossible_numbers_are_refused(arguments):
    with pytest.raises(ValueError, match="need processes >= 1 and bandwidth > 0"):
        exchange_seconds(*arguments)
