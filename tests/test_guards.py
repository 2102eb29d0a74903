"""Stop at the step that broke, where nothing gets better, and when asked: not earlier, not later, and with reasons."""

from __future__ import annotations

import math
import os
import signal
import threading

import pytest
import torch

from diffusion_book import guards
from diffusion_book.guards import EarlyStop, Interruption, NanGuard, Trouble
from diffusion_book.train import TrainStep


def step(n, loss=0.5, norm=0.1, device="cpu"):
    norm = None if norm is None else torch.tensor(norm, device=device)
    return TrainStep(n, torch.tensor(loss, device=device), 1e-3, norm)


@pytest.mark.parametrize(
    ("loss", "norm", "what"),
    [(math.nan, 0.1, "loss"), (math.inf, 0.1, "loss"), (-math.inf, None, "loss"), (math.nan, None, "loss"), (0.5, math.inf, "gradient norm"), (0.5, math.nan, "gradient norm"), (math.nan, math.nan, "loss")],
)  # fmt: skip
def test_the_first_step_that_is_not_finite_is_named(loss, norm, what):
    guard = NanGuard()
    assert not any(guard.note(step(n)) for n in range(1, 60))
    found = guard.note(step(60, loss, norm))
    assert (found.step, found.what) == (60, what) and not math.isfinite(found.value)
    assert found.before == pytest.approx([0.5] * 5)


class Far(torch.Tensor):
    """A number that says it lies on another device, and counts how often somebody waits for it."""

    waits = 0

    @property
    def device(self):
        return torch.device("cuda")

    def __float__(self):
        Far.waits += 1
        return float(self.as_subclass(torch.Tensor))


@pytest.mark.parametrize("broken", [1, 7, 49, 50])
def test_elsewhere_it_waits_for_the_device_now_and_then_and_names_the_step_all_the_same(broken):
    guard, found, Far.waits = NanGuard(every=50), None, 0
    for n in range(101, 151):
        loss = math.nan if n >= 100 + broken else 0.5
        assert found is None and Far.waits == 0
        found = guard.note(TrainStep(n, torch.tensor(loss).as_subclass(Far), 1e-3, None))
    assert found.step == 100 + broken and Far.waits > 0


def test_a_look_before_a_checkpoint_finds_what_was_not_looked_at_yet():
    guard = NanGuard(every=50)
    assert guard.note(TrainStep(1, torch.tensor(math.nan).as_subclass(Far), 1e-3, None)) is None
    assert guard.look().step == 1
    assert NanGuard().look() is None


def test_the_norm_can_be_left_out():
    assert NanGuard(norm=False).note(step(1, norm=math.inf)) is None


def test_large_finite_losses_are_no_trouble():
    guard = NanGuard(every=50)
    for n in range(1, 6):
        guard.note(TrainStep(n, torch.tensor(3e38).as_subclass(Far), 1e-3, None))
    assert guard.look() is None


def test_the_reasons_follow_from_what_was_seen(tmp_path):
    grew = Trouble(9, "loss", math.inf, [1.0, 3.0, 40.0], 0.25)
    assert "grew (1, 3, 40)" in grew.causes() and "learning rate (0.25)" in grew.causes()
    sudden = Trouble(9, "loss", math.nan, [1.0, 0.9, 0.95], 0.25)
    assert "grew" not in sudden.causes() and "float16 without a scaler" in sudden.causes()
    assert "step 9: the loss of epoch 2 is nan: nothing was saved" in sudden.told(2, None, None)
    told = sudden.told(2, tmp_path, tmp_path / "step_000000006.safetensors")
    assert f"the checkpoints in {tmp_path} are from before, the last good one is step_000000006.safetensors" in told


def test_weights_that_broke_while_the_loss_was_fine_are_found_before_they_are_saved():
    guard, weights = NanGuard(), [torch.ones(3), torch.ones(2, 2)]
    assert guard.note(step(7, 0.25, None)) is None
    assert guard.inspect(weights) is None
    weights[1][0, 1] = math.nan
    found = guard.inspect(weights)
    assert (found.step, found.what, found.before) == (7, "sum of the weights", [0.25]) and math.isnan(found.value)
    assert "the sum of the weights of epoch 1 is nan" in found.told(1, None, None)
    assert NanGuard().inspect(weights) is None  # no step of this guard has moved them


# No better


@pytest.mark.parametrize(
    ("losses", "patience", "ends"),
    [([3, 2, 1, 0], 1, None), ([3, 2, 2.5], 1, 3), ([3, 2, 2.5, 2.6], 2, 4), ([3, 2, 2.5, 1.9, 2, 2], 2, 6), ([1, 1, 1], 2, 3), ([1, 2], 2, None), ([3, math.nan, 2, 2], 2, None), ([math.nan, 2, 3], 1, 3)],
)  # fmt: skip
def test_it_ends_so_many_epochs_after_the_best(losses, patience, ends):
    rows, stop = [{"a": loss} for loss in losses], EarlyStop(patience, "a")
    over = [n for n in range(len(rows) + 1) if stop.over(rows[:n])]
    assert (over[0] if over else None) == ends
    assert stop.best(rows) == losses.index(min(loss for loss in losses if not math.isnan(loss)))


def test_what_cannot_be_watched_is_refused():
    with pytest.raises(ValueError, match=r"need patience >= 1 and an item of every row \(a\); got 2, 'b'"):
        EarlyStop(2, "b").over([{"a": 1}])
    with pytest.raises(ValueError, match="need patience >= 1"):
        EarlyStop(0).over([])


# When asked


def test_the_first_ctrl_c_leaves_a_note_and_the_handler_comes_back(capsys):
    before = signal.getsignal(signal.SIGINT)
    with Interruption() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.asked
        os.kill(os.getpid(), signal.SIGINT)  # passed on by a launcher: the same Ctrl-C
    assert signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().err.count("stopping after this step") == 1


def test_a_later_one_stops_at_once(monkeypatch):
    clock = iter([0.0, 2.5])
    monkeypatch.setattr(guards.time, "monotonic", lambda: next(clock))
    with pytest.raises(KeyboardInterrupt, match="nothing saved"), Interruption():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_in_another_thread_it_is_harmless():
    found = []

    def inside():
        with Interruption() as asked:
            found.append(asked.asked)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [False]
