"""Records of a run: whole after every kill, no row lost or doubled, and pictures from the same noise."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffusion_book.core import derive_seed
from diffusion_book.monitor import JsonLog, Monitor, SampleGrids, card_grids, tensorboard_writer
from diffusion_book.train import TrainStep


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_in_the_file_when_write_returns(tmp_path):
    log = JsonLog(tmp_path / "log.jsonl")
    assert not log.path.exists()
    log.write({"step": 1, "loss": 0.5, "parts": torch.tensor([1.0, 2.0])})
    assert rows_of(log.path) == [{"step": 1, "loss": 0.5, "parts": [1.0, 2.0]}]


@pytest.mark.parametrize("cut", range(0, 200, 3))
def test_cut_anywhere_it_goes_on_without_loss_or_double(tmp_path, cut):
    whole, history = JsonLog(tmp_path / "whole"), []
    for step in range(1, 7):
        whole.write({"step": step, "loss": 1.0})
        if step % 2 == 0:
            history.append({"epoch": step // 2, "step": step, "loss": 1.0})
            whole.write(history[-1])
    text = whole.path.read_bytes()
    path = tmp_path / "log.jsonl"
    path.write_bytes(text[: min(cut, len(text))])
    kept = [row for row in rows_of_whole_lines(path) if row["step"] <= 4 and "epoch" not in row]
    log = JsonLog(path, 4, history[:2])
    rows = rows_of(path)
    assert [row for row in rows if "epoch" in row] == history[:2]
    assert [row for row in rows if "epoch" not in row] == kept
    log.write({"step": 5, "loss": 1.0})
    assert rows_of(path)[-1]["step"] == 5


def rows_of_whole_lines(path):
    lines = path.read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def test_a_log_with_nothing_to_drop_is_left_alone(tmp_path):
    log = JsonLog(tmp_path / "log.jsonl")
    log.write({"step": 1})
    log.write({"epoch": 1, "step": 1, "loss": 0.1 + 0.2})
    stamp = log.path.stat().st_mtime_ns, log.path.stat().st_ino
    JsonLog(log.path, 1, [{"epoch": 1, "step": 1, "loss": 0.1 + 0.2}])
    assert (log.path.stat().st_mtime_ns, log.path.stat().st_ino) == stamp


def test_lines_that_are_no_rows_are_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\nnonsense\n[1]\n{"loss": 2}\n3\n{"step": "x"}\n')
    JsonLog(path, 5)
    assert rows_of(path) == [{"step": 1}]


def done(step, norm=None):
    return TrainStep(step, torch.tensor(1 / step), 0.1, norm if norm is None else torch.tensor(norm))


def test_a_monitor_writes_steps_epochs_and_lines(tmp_path, capsys):
    monitor = Monitor(tmp_path, log_every=2, lines=True)
    for step in range(1, 5):
        monitor.step(done(step, 2.0))
    monitor.epoch({"epoch": 1, "step": 4, "loss": 0.5, "by_time": [1, 2]})
    rows = rows_of(tmp_path / "log.jsonl")
    assert rows[0] == {"step": 2, "loss": 0.5, "learning_rate": 0.1, "gradient_norm": 2.0}
    assert [row["step"] for row in rows] == [2, 4, 4] and rows[-1]["by_time"] == [1, 2]
    assert capsys.readouterr().err == "epoch 1  step 4  loss 0.5\n"


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monitor = Monitor(None, log_every=1)
    monitor.step(done(1))
    monitor.epoch({"epoch": 1, "step": 1, "loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_tensorboard_gets_the_numbers(tmp_path, monkeypatch):
    seen = []

    class Writer:
        def __init__(self, folder, purge_step):
            seen.append((folder, purge_step))

        def add_scalar(self, *given):
            seen.append(given)

        def flush(self):
            pass

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monitor = Monitor(None, 7, tensorboard=tmp_path, log_every=1)
    monitor.step(done(8))
    monitor.epoch({"epoch": 2, "step": 8, "loss": 0.5})
    assert seen == [(str(tmp_path), 8), ("step/loss", 0.125, 8), ("step/learning_rate", 0.1, 8), ("epoch/loss", 0.5, 8)]


def test_tensorboard_reads_what_was_written_and_hides_what_came_too_late(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, steps in ((0, range(1, 6)), (3, range(4, 7))):  # killed after step 5, gone on from step 3
        monitor = Monitor(None, start, tensorboard=tmp_path, log_every=1)
        for step in steps:
            monitor.step(done(step))
        monitor.board.close()
    seen = reader.EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in seen.Scalars("step/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in seen.Scalars("step/loss")] == pytest.approx([1 / step for step in range(1, 7)])


def test_without_tensorboard_there_is_a_warning_and_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.warns(UserWarning, match="TensorBoard is not installed"):
        assert tensorboard_writer(tmp_path) is None
    with pytest.warns(UserWarning, match="nothing is written"):
        Monitor(None, tensorboard=tmp_path).epoch({"epoch": 1, "step": 1, "loss": 1.0})


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))


def test_grids_begin_with_the_same_noise_and_leave_the_mode_alone(tmp_path):
    net, seen = Net(), []

    def draw(net, noise, generator):
        seen.append((noise, torch.randn(3, generator=generator), net.training, torch.is_grad_enabled()))
        return net.gain * noise

    grids = SampleGrids(net, draw, (4, 1, 8, 8), tmp_path / "grids", every=2, columns=2)
    state = torch.get_rng_state()
    assert [grids(epoch) and grids(epoch).name for epoch in (1, 2, 3, 4)] == [
        None,
        "epoch_0002.png",
        None,
        "epoch_0004.png",
    ]
    assert torch.equal(state, torch.get_rng_state()) and net.training
    assert all(torch.equal(a, seen[0][0]) and torch.equal(b, seen[0][1]) for a, b, *_ in seen)
    assert {(item[2], item[3]) for item in seen} == {(False, False)}
    assert Image.open(tmp_path / "grids" / "epoch_0002.png").size == (19, 19)  # 2 images of 8, 3 borders


def test_a_drawing_that_fails_gives_the_mode_back(tmp_path):
    net = Net()
    with pytest.raises(ZeroDivisionError):
        SampleGrids(net, lambda *_: 1 / 0, (1, 1, 8, 8), tmp_path)(1)
    assert net.training


@dataclass
class Drawer:
    """What a grid asks of a trained network: its sampler makes two moves, and denormalises from [-1, 1]."""

    model: nn.Module
    card: dict

    def sampler(self, noise, generator):
        assert not self.model.training
        for _ in range(2):
            yield SimpleNamespace(x=self.model.gain * noise)

    def denormalise(self, x):
        return (x / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("average", [None, 0.25])
def test_grids_of_a_card_show_the_last_move_of_its_sampler(tmp_path, average):
    trained, other = Drawer(Net(), {"data": {"shape": [1, 8, 8]}}), Net()
    other.gain.data.fill_(average or 1.0)
    grids = card_grids(trained, tmp_path, 3, model=None if average is None else other, n=4, columns=2)
    assert grids(2) is None
    found = np.asarray(Image.open(grids(3)).convert("L"))
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(derive_seed(0, "grid")))
    expected = ((average or 0.5) * noise[3, 0]).clamp(-1, 1) * 127.5 + 127.5
    assert np.abs(found[10:18, 10:18] - expected.numpy()).max() <= 1
