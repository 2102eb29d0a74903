"""A checkpoint holds everything, bit for bit; no kill, full disk or wrong file costs more than the last steps."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from diffusion_book import checkpoint
from diffusion_book.checkpoint import CheckpointError, GlobalRandom, latest, load_checkpoint, save_checkpoint
from diffusion_book.core import RandomStreams, derive_seed
from diffusion_book.diffusion import GaussianDiffusion
from diffusion_book.mlp import TimeMLP
from diffusion_book.schedule import DiscreteSchedule, cosine_beta_schedule
from diffusion_book.toy import spiral
from diffusion_book.train import point_batches, train_steps

CONFIG = {"seed": 3, "steps": 100, "batch_size": 64, "rate": 0.02}
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL and forks")


class Holder:
    """A part whose state is whatever it is given."""

    def __init__(self, state: Any = None) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def equal(a: Any, b: Any) -> bool:
    """Equal in type, structure and every bit; a NaN equals itself."""
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        raw = [x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b)] if same and a.numel() else [a, b]
        return same and torch.equal(*raw)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a.hex() == b.hex() if isinstance(a, float) else a == b


def build(config: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Data and parts of a run as on its first day."""
    streams = RandomStreams(config["seed"])
    points = spiral(500, streams.data)
    model = TimeMLP(50, hidden=16, generator=streams.initialisation)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["rate"])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, config["rate"], total_steps=config["steps"])
    return points, {"model": model, "optimizer": optimizer, "scheduler": scheduler, "streams": streams}


def advance(config: dict, points: torch.Tensor, run: dict, start: int = 0, until: int | None = None) -> Iterator[int]:
    """Train from one step to another; the steps done."""
    diffusion = GaussianDiffusion(DiscreteSchedule(cosine_beta_schedule(50)))
    order = torch.Generator().manual_seed(derive_seed(config["seed"], "order"))
    batches = point_batches(points, config["batch_size"], order, until or config["steps"], start)
    for item in train_steps(
        run["model"],
        lambda net, x: diffusion.loss(net, x, generator=run["streams"].noise),
        batches,
        run["optimizer"],
        scheduler=run["scheduler"],
        start=start,
    ):
        yield item.step


def whole_run(folder: Path, every: int = 1) -> None:
    """Start or go on, with a checkpoint every few steps, to the end. Runs in processes that are killed."""
    torch.set_num_threads(1)
    points, run = build(CONFIG)
    start = load_checkpoint(folder, config=CONFIG, **run)["step"] if latest(folder) else 0
    for step in advance(CONFIG, points, run, start):
        if step % every == 0:
            save_checkpoint(folder, step=step, config=CONFIG, **run)


def write_for_ever(folder: Path) -> None:
    """Checkpoints of a megabyte as fast as they go, each filled with its step."""
    model, step = nn.Linear(500, 500), 0
    found = latest(folder)
    step = int(found.stem[5:]) if found else 0
    while True:
        step += 1
        with torch.no_grad():
            model.weight.fill_(step)
        save_checkpoint(folder, model=model, step=step, config={})


def stop_at(folder: Path, stage: str) -> None:
    """Write one good checkpoint; then stand still half-way through the next write, or before the rename."""
    model = nn.Linear(300, 300)
    save_checkpoint(folder, model=model, step=1, config={})
    if stage == "half":
        whole = checkpoint.write_whole

        def half(target: Path, payload: bytes) -> None:
            os.fsync = lambda _: time.sleep(600)
            whole(target, payload[: len(payload) // 2])

        checkpoint.write_whole = half
    else:
        os.replace = lambda *_: time.sleep(600)
    save_checkpoint(folder, model=model, step=2, config={})


@pytest.fixture(scope="module")
def processes() -> Any:
    """Fresh processes that start in milliseconds: forks of one that has only imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch._dynamo", "numpy", "safetensors.torch", "diffusion_book.checkpoint", __name__]
    )
    return context


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited for a minute"
        time.sleep(0.002)


def same_run(a: dict, b: dict) -> bool:
    return all(
        equal(a[name].state_dict(), b[name].state_dict()) for name in ("optimizer", "scheduler", "streams")
    ) and all(map(equal, a["model"].state_dict().values(), b["model"].state_dict().values()))


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    points, run = build(CONFIG)
    for _ in advance(CONFIG, points, run):
        pass
    torch.set_num_threads(threads)
    return run


# Exact


@pytest.mark.parametrize(
    "state",
    [
        {"a": torch.tensor(1.5), "b": torch.zeros(0, 3), "c": torch.tensor([True, False]), "d": torch.tensor(-7)},
        {"bf16": torch.randn(5).bfloat16(), "half": torch.randn(5).half(), "double": torch.randn(3).double()},
        {"nan": torch.tensor([math.nan, math.inf, -0.0]), "payload": torch.tensor([2143289999]).int().view(torch.float32)},
        {"bytes": torch.arange(256).to(torch.uint8), "int32": torch.tensor([2**31 - 1]).int()},
        {"t": torch.arange(6.0).reshape(2, 3).t(), "last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)},
        {0: {"step": torch.tensor(3.0)}, "0": {"step": torch.tensor(4.0)}, "a/b": torch.ones(1), "a": {"b": torch.zeros(1)}},
        {"betas": (0.9, 0.999), "nested": [{"x": [1, (2, [3.5, None])]}, True], (1, "two"): "three", None: 1, 2.5: 2},
        {"lr": 0.1 + 0.2, "tiny": 5e-324, "inf": math.inf, "minus": -math.inf, "nan": math.nan, "zero": -0.0},
        {"!": ["tensor", "x"], "big": 10**40, "text": 'é "\\ \n 0' + "0" * 70, "empty": {}, "none": []},
        {"pairs": {"!": {"!": 1}}, "deep": [[], [[]], (), ((),)]},
    ],
)  # fmt: skip
def test_round_trip_is_exact(tmp_path: Path, state: dict) -> None:
    save_checkpoint(tmp_path, model=nn.Linear(1, 1), step=0, config={}, other=Holder(state), extra={"also": state})
    other = Holder()
    found = load_checkpoint(tmp_path, model=nn.Linear(1, 1), other=other)
    assert equal(other.state, state)
    assert equal(found["extra"], {"also": state})


def test_a_slice_and_an_expanded_tensor_come_back_with_their_values(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "slice": base[:, ::2],
        "expanded": torch.ones(1).expand(3),
        "again": base[:, ::2],
        "conj": torch.tensor([1j]).conj(),
    }
    save_checkpoint(tmp_path, model=nn.Linear(1, 1), step=0, config={}, extra=state)
    found = load_checkpoint(tmp_path)["extra"]
    assert all(torch.equal(found[k], state[k]) for k in state)
    found["slice"] += 1
    assert torch.equal(found["again"], base[:, ::2]), "each has memory of its own"


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    def tied(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        net[1].weight = net[0].weight
        return net

    one, two = tied(0), tied(1)
    save_checkpoint(tmp_path, model=one, step=0, config={})
    load_checkpoint(tmp_path, model=two)
    assert two[1].weight is two[0].weight and torch.equal(two[0].weight, one[0].weight)


OPTIMIZERS: dict[str, Callable] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "groups": lambda p: torch.optim.AdamW([{"params": p[:1], "lr": 0.1}, {"params": p[1:]}], lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
}
lrs = torch.optim.lr_scheduler
SCHEDULERS: dict[str, Callable] = {
    "one-cycle": lambda o: lrs.OneCycleLR(o, 0.1, total_steps=40),
    "cosine": lambda o: lrs.CosineAnnealingWarmRestarts(o, 5, T_mult=2),
    "milestones": lambda o: lrs.MultiStepLR(o, [3, 3, 7], gamma=0.5),
    "lambda": lambda o: lrs.LambdaLR(o, lambda step: 1 / (1 + step)),
    "chain": lambda o: lrs.SequentialLR(o, [lrs.LinearLR(o, 0.1, total_iters=4), lrs.ExponentialLR(o, 0.9)], [4]),
}


def steps(model: nn.Module, optimizer: Any, scheduler: Any, first: int, last: int) -> None:
    for i in range(first, last):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [*((name, None) for name in OPTIMIZERS), *(("adamw", name) for name in SCHEDULERS), ("momentum", "one-cycle")],
)
def test_every_optimizer_and_scheduler_goes_on_exactly(tmp_path: Path, optimizer: str, scheduler: str | None) -> None:
    def make(seed: int) -> tuple:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        live = OPTIMIZERS[optimizer](list(model.parameters()))
        return model, live, SCHEDULERS[scheduler](live) if scheduler else None

    straight, before, after = make(0), make(0), make(1)
    steps(*straight, 0, 20)
    steps(*before, 0, 9)
    names = ("model", "optimizer", "scheduler")
    save_checkpoint(tmp_path, step=9, config={}, **dict(zip(names, before, strict=True)))
    load_checkpoint(tmp_path, **dict(zip(names, after, strict=True)))
    steps(*after, 9, 20)
    for a, b in zip(straight, after, strict=True):
        if a is not None:
            states = [x.state_dict() for x in (a, b)]
            if scheduler == "milestones" and "milestones" in states[1]:
                states[0]["milestones"] = dict(states[0]["milestones"])  # a Counter comes back as a dict
            assert equal(*map(dict, states))


def test_weights_come_back_on_the_live_dtype_and_ema_too(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    ema.update_parameters(nn.Linear(4, 4))
    save_checkpoint(tmp_path, model=model, ema=ema, step=1, config={})
    half, fresh = nn.Linear(4, 4).bfloat16(), torch.optim.swa_utils.AveragedModel(nn.Linear(4, 4))
    load_checkpoint(tmp_path, model=half, ema=fresh)
    assert half.weight.dtype == torch.bfloat16 and torch.equal(half.weight, model.weight.bfloat16())
    assert torch.equal(fresh.module.weight, ema.module.weight) and int(fresh.n_averaged) == int(ema.n_averaged) == 1


def test_hidden_generators_go_on(tmp_path: Path) -> None:
    def draw() -> list:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), *torch.rand(3).tolist()]

    draw()
    save_checkpoint(tmp_path, model=nn.Linear(1, 1), step=0, config={}, hidden=GlobalRandom())
    first = draw()
    assert draw() != first
    load_checkpoint(tmp_path, model=nn.Linear(1, 1), hidden=GlobalRandom())
    assert draw() == first


def test_a_compiled_module_is_stored_as_the_module_it_was(tmp_path: Path) -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    save_checkpoint(tmp_path, model=torch.compile(model), step=0, config={})
    load_checkpoint(tmp_path, model=other)
    assert torch.equal(model.weight, other.weight)


def test_others_can_read_the_file(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    path = save_checkpoint(tmp_path, model=model, step=5, config={"width": 3})
    assert torch.equal(load_file(path)["model/weight"], model.weight)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["checkpoint"])
    assert header["step"] == 5 and header["config"] == {"width": 3} and "torch" in header["made_with"]
    assert save_checkpoint(tmp_path / "b", model=model, step=5, config={"width": 3}).read_bytes() == path.read_bytes()


# Resume, and kills


def test_resume_in_the_middle_of_an_epoch_is_bit_equal(tmp_path: Path, undisturbed: dict) -> None:
    torch.set_num_threads(1)
    points, run = build(CONFIG)
    for step in advance(CONFIG, points, run, until=51):
        pass
    save_checkpoint(tmp_path, step=step, config=CONFIG, **run)
    points, run = build(CONFIG)
    assert not same_run(run, undisturbed)
    start = load_checkpoint(tmp_path, config=CONFIG, **run)["step"]
    for _ in advance(CONFIG, points, run, start):
        pass
    assert start == 51 and same_run(run, undisturbed)


@POSIX
def test_killed_ten_times_and_resumed_ends_bit_equal(tmp_path: Path, processes: Any, undisturbed: dict) -> None:
    chance = random.Random(0)
    reached = [0]
    for kill in range(10):
        process = processes.Process(target=whole_run, args=(tmp_path,))
        process.start()
        goal = min(reached[-1] + chance.randint(1, 8), CONFIG["steps"] - 10 + kill)
        wait_for(lambda goal=goal: (path := latest(tmp_path)) and int(path.stem[5:]) >= goal)
        time.sleep(chance.random() * 0.005)
        process.kill()
        process.join()
        assert process.exitcode == -9
        reached.append(load_checkpoint(tmp_path)["step"])
    assert reached[-1] < CONFIG["steps"] and reached == sorted(set(reached))
    process = processes.Process(target=whole_run, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    _, run = build(CONFIG)
    assert load_checkpoint(tmp_path, config=CONFIG, **run)["step"] == CONFIG["steps"]
    assert same_run(run, undisturbed)


@POSIX
def test_a_writer_killed_at_any_moment_leaves_a_loadable_latest(tmp_path: Path, processes: Any) -> None:
    chance, last = random.Random(1), 0
    for _ in range(12):
        process = processes.Process(target=write_for_ever, args=(tmp_path,))
        process.start()
        wait_for(lambda last=last: (path := latest(tmp_path)) and int(path.stem[5:]) > last)
        time.sleep(chance.random() * 0.05)
        process.kill()
        process.join()
        model = nn.Linear(500, 500)
        step = load_checkpoint(tmp_path, model=model)["step"]
        assert step > last and bool((model.weight == step).all())
        assert len(list(tmp_path.glob("step_*"))) <= 4, "the last three, and one more before the oldest is removed"
        last = step


@POSIX
@pytest.mark.parametrize("stage", ["half", "before the rename"])
def test_killed_during_a_write(tmp_path: Path, processes: Any, stage: str) -> None:
    process = processes.Process(target=stop_at, args=(tmp_path, stage))
    process.start()
    wait_for(lambda: list(tmp_path.glob(".step_000000002*.part")))
    time.sleep(0.1)
    process.kill()
    process.join()
    assert list(tmp_path.glob(".step_000000002*.part")), "killed inside the write"
    assert load_checkpoint(tmp_path, model=nn.Linear(300, 300))["step"] == 1
    save_checkpoint(tmp_path, model=nn.Linear(300, 300), step=2, config={})
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"step_{i:09d}.safetensors" for i in (1, 2)]


# Trouble with the disk


def before_and_after(folder: Path) -> Path:
    return save_checkpoint(folder, model=nn.Linear(4, 4), step=1, config={})


def test_a_full_disk_is_told_and_costs_nothing(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    first = before_and_after(tmp_path)
    part = tmp_path / f".step_000000002.safetensors.{threading.get_native_id()}.part"
    part.symlink_to("/dev/full")  # every write there fails as on a full disk
    with pytest.raises(OSError, match=r"No space left.*what was there before is untouched.*step_000000002") as caught:
        save_checkpoint(tmp_path, model=nn.Linear(4, 4), step=2, config={})
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == [first] and load_checkpoint(tmp_path, model=nn.Linear(4, 4))["step"] == 1


@POSIX
def test_a_disk_that_fills_up_in_the_middle_of_a_file(tmp_path: Path) -> None:
    code = f"""
import resource, signal, torch
from diffusion_book.checkpoint import load_checkpoint, save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save_checkpoint({str(tmp_path)!r}, model=torch.nn.Linear(9, 9), step=1, config={{}})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    save_checkpoint({str(tmp_path)!r}, model=torch.nn.Linear(200, 200), step=2, config={{}})
except OSError as error:
    print(error)
print(load_checkpoint({str(tmp_path)!r}, model=torch.nn.Linear(9, 9))["step"])
"""
    told, step = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert "File too large; not written, what was there before is untouched" in told and step == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000001.safetensors"]


def test_a_folder_without_permission() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        before_and_after(folder)
        folder.chmod(0o555)
        root = hasattr(os, "geteuid") and os.geteuid() == 0
        try:
            if root:
                os.seteuid(65534)
            with pytest.raises(PermissionError, match="what was there before is untouched"):
                save_checkpoint(folder, model=nn.Linear(4, 4), step=2, config={})
            assert load_checkpoint(folder, model=nn.Linear(4, 4))["step"] == 1
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o755)


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("not a folder")
    with pytest.raises(FileExistsError):
        save_checkpoint(tmp_path / "runs", model=nn.Linear(1, 1), step=0, config={})
    assert (tmp_path / "runs").read_text() == "not a folder"


def test_an_interrupt_during_a_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = before_and_after(tmp_path)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, model=nn.Linear(4, 4), step=2, config={})
    assert list(tmp_path.iterdir()) == [first]


# Wrong files


def test_every_altered_byte_and_every_truncation_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, model=nn.Linear(2, 1), step=1, config={})
    data = path.read_bytes()
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        with pytest.raises(CheckpointError, match=r"step_000000001.safetensors is truncated, altered or no checkpoint"):
            load_checkpoint(path)
    for length in [*range(0, len(data), 7), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="is truncated, altered or no checkpoint"):
            load_checkpoint(tmp_path)
    path.write_bytes(data)
    assert load_checkpoint(tmp_path)["step"] == 1


class Danger:
    """What runs when a pickle is opened."""

    opened = 0

    def __reduce__(self) -> tuple:
        return _run, ()


def _run() -> None:
    Danger.opened += 1


@pytest.mark.parametrize("kind", ["torch", "legacy", 2, 3, 4, 5])
def test_a_pickle_is_named_and_never_opened(tmp_path: Path, kind: Any) -> None:
    path = tmp_path / "step_000000001.safetensors"
    if isinstance(kind, int):
        path.write_bytes(pickle.dumps(Danger(), protocol=kind))
    else:
        torch.save(Danger(), path, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(CheckpointError, match="is a pickle, or an archive of one"):
        load_checkpoint(tmp_path, model=nn.Linear(1, 1))
    assert Danger.opened == 0
    pickle.loads(pickle.dumps(Danger()))
    assert Danger.opened == 1, "it would have run"
    Danger.opened = 0


@pytest.mark.parametrize(
    "data", [b"", b"text, not tensors", b"\x00" * 100, pickle.dumps([1], protocol=0), b"\x02" + b"\0" * 7 + b"{}"]
)
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"a.safetensors is truncated, altered or no checkpoint"):
        load_checkpoint(path)


def test_weights_alone_are_no_checkpoint(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "w.safetensors", {"checkpoint": '{"sha256": ""}'})
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_checkpoint(tmp_path / "w.safetensors")


def test_nothing_there(tmp_path: Path) -> None:
    assert latest(tmp_path) is None and latest(tmp_path / "absent") is None
    for path in (tmp_path, tmp_path / "absent", tmp_path / "a.safetensors"):
        with pytest.raises(FileNotFoundError, match=path.name):
            load_checkpoint(path)


# What does not fit


CONFIGS = [
    ({"seed": 4}, "config/seed: given 4, stored 3"),
    ({"steps": None}, "config/steps: given None, stored 100"),
    ({"new": {"a": [1, 2]}}, "config/new/a/0: given 1, stored nothing; config/new/a/1: given 2, stored nothing"),
    ({"rate": 0.1, "seed": 1}, "config/seed: given 1, stored 3; config/rate: given 0.1, stored 0.02"),
]


@pytest.mark.parametrize(("change", "told"), CONFIGS)
def test_another_configuration_is_refused_with_its_differences(tmp_path: Path, change: dict, told: str) -> None:
    _, run = build(CONFIG)
    save_checkpoint(tmp_path, step=0, config=CONFIG, **run)
    _, other = build(CONFIG | {"seed": 9})
    before = {name: value.clone() for name, value in other["model"].state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path, config=CONFIG | change, **other)
    assert str(caught.value).endswith(f"does not fit: {told}")
    assert all(torch.equal(before[name], value) for name, value in other["model"].state_dict().items())


def test_a_setting_left_out_is_a_difference_and_equal_ones_are_none(tmp_path: Path) -> None:
    config = {"widths": (1, 2), "rate": math.nan, "deep": {"a": [None, "x"]}}
    save_checkpoint(tmp_path, model=nn.Linear(1, 1), step=0, config=config)
    found = load_checkpoint(tmp_path, config={"widths": [1, 2], "rate": math.nan, "deep": {"a": [None, "x"]}})
    assert equal(found["config"], config)
    with pytest.raises(CheckpointError, match="config/rate: given nothing, stored nan"):
        load_checkpoint(tmp_path, config={"widths": (1, 2), "deep": {"a": [None, "x"]}})


MISFITS: dict[str, tuple[Callable[[dict], dict], str]] = {
    "missing tensor": (lambda run: run | {"model": Mixed(True, False)}, "model/b: given shape .3,., stored nothing"),
    "unexpected tensor": (lambda run: run | {"model": Mixed(False, True)}, "model/a: given nothing, stored shape .2,."),
    "shape": (lambda run: run | {"model": Mixed(False, False, 5)}, "model/a: given shape .5,., stored shape .2,."),
    "class": (lambda run: run | {"model": nn.Linear(2, 2)}, "model: given 'Linear', stored 'Mixed'"),
    "optimizer": (
        lambda run: run | {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(2))])},
        "given 'SGD', stored 'AdamW'",
    ),
    "half a run": (
        lambda run: {k: run[k] for k in ("model", "optimizer")},
        "holds model, optimizer, streams; asked for model",
    ),
    "more than there is": (
        lambda run: run | {"ema": nn.Linear(1, 1)},
        "holds model, optimizer, streams; asked for .*ema",
    ),
    "streams": (lambda run: run | {"streams": Streams()}, "streams: given 'Streams', stored 'RandomStreams'"),
}


class Streams(RandomStreams):
    """Another class."""

    def __init__(self) -> None:
        super().__init__(0)


class Mixed(nn.Module):
    """A parameter a, another b, or both."""

    def __init__(self, second: bool, without: bool, size: int = 2) -> None:
        super().__init__()
        if not without:
            self.a = nn.Parameter(torch.ones(size))
        if second or without:
            self.b = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_named_and_nothing_changes(tmp_path: Path, case: str) -> None:
    def make() -> dict[str, Any]:
        model = Mixed(False, False)
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters()), "streams": RandomStreams(0)}

    stored = make()
    with torch.no_grad():
        stored["model"].a.fill_(7)
    save_checkpoint(tmp_path, step=0, config={}, **stored)
    change, told = MISFITS[case]
    live = change(make())
    before = [value.clone() for value in live["model"].state_dict().values()]
    with pytest.raises(CheckpointError, match=told):
        load_checkpoint(tmp_path, **live)
    assert all(map(torch.equal, before, live["model"].state_dict().values()))
    fresh = make()
    load_checkpoint(tmp_path, **fresh)
    assert bool((fresh["model"].a == 7).all())


def test_another_number_of_parameters_in_a_group_changes_nothing(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    save_checkpoint(tmp_path, model=model, optimizer=torch.optim.AdamW(model.parameters()), step=0, config={})
    other = nn.Linear(2, 2)
    before = other.weight.clone()
    with pytest.raises(ValueError, match="parameter group"):
        load_checkpoint(tmp_path, model=other, optimizer=torch.optim.AdamW([other.weight]))
    assert torch.equal(before, other.weight)


def test_weights_alone_can_be_loaded_from_a_whole_run(tmp_path: Path) -> None:
    _, run = build(CONFIG)
    save_checkpoint(tmp_path, step=7, config=CONFIG, extra={"epoch": 2}, **run)
    _, other = build(CONFIG | {"seed": 9})
    found = load_checkpoint(latest(tmp_path), model=other["model"])
    assert found["step"] == 7 and found["extra"] == {"epoch": 2} and found["config"] == CONFIG
    assert equal(dict(other["model"].state_dict()), dict(run["model"].state_dict()))


# Folders


def test_the_last_k_are_kept_and_sort_by_step(tmp_path: Path) -> None:
    for step in (8, 9, 10, 99, 100, 1000):
        path = save_checkpoint(tmp_path, model=nn.Linear(1, 1), step=step, config={}, keep=4)
        assert latest(tmp_path) == path
    (tmp_path / "step_final.safetensors").write_text("something else")
    assert [load_checkpoint(p)["step"] for p in sorted(tmp_path.glob("step_0*"))] == [10, 99, 100, 1000]
    save_checkpoint(tmp_path, model=nn.Linear(1, 1), step=1000, config={}, keep=1)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step_000001000.safetensors", "step_final.safetensors"]


def test_a_folder_with_later_steps_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, model=nn.Linear(1, 1), step=10, config={})
    with pytest.raises(CheckpointError, match="is later than step 9: a folder holds one run"):
        save_checkpoint(tmp_path, model=nn.Linear(1, 1), step=9, config={})
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("wrong", [{"step": -1}, {"step": 10**9}, {"keep": 0}, {"model": None}])
def test_arguments_out_of_range(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"need a model, step in 0\.\.999999999, keep >= 1"):
        save_checkpoint(tmp_path, **({"model": nn.Linear(1, 1), "step": 1, "config": {}} | wrong))


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ({"extra": {"a": {"b": {1, 2}}}}, "extra/a/b is of type set"),
        ({"extra": {"path": Path("x")}}, "extra/path is of type"),
        ({"extra": {"t": torch.eye(2).to_sparse()}}, "extra/t is of type Tensor"),
        ({"extra": {"t": torch.empty(2, device="meta")}}, "extra/t is of type Tensor"),
        ({"config": {"mean": torch.zeros(1)}}, "config/mean is of type Tensor, which a config cannot hold"),
        ({"other": Holder({"f": len})}, "other/f is of type builtin_function_or_method"),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_named(tmp_path: Path, where: dict, told: str) -> None:
    with pytest.raises(TypeError, match=told):
        save_checkpoint(tmp_path, **({"model": nn.Linear(1, 1), "step": 1, "config": {}} | where))
    assert not list(tmp_path.iterdir())


def test_importing_needs_torch_alone() -> None:
    code = """
import sys
for name in ("safetensors", "numpy"):
    sys.modules[name] = None
import diffusion_book.checkpoint as c
print(c.latest("/nowhere"))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout == "None\n", done.stderr
