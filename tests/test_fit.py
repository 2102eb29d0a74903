"""Long trainings: comparable losses, exact places in the data, exact resuming, averages, and a stop before harm."""

from __future__ import annotations

import copy
import io
import json
import re
import signal
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from diffusion_book import fit as fitting
from diffusion_book.checkpoint import CheckpointError, latest, load_checkpoint
from diffusion_book.core import RandomStreams
from diffusion_book.data import load
from diffusion_book.diffusion import GaussianDiffusion
from diffusion_book.ema import EMA, EMAs
from diffusion_book.fit import absolute_errors, epoch_batches, fit, recipe_optimizer, recipe_options, validation_loss
from diffusion_book.guards import EarlyStop
from diffusion_book.monitor import SampleGrids
from diffusion_book.schedule import DiscreteSchedule, OffsetCosineSchedule, cosine_beta_schedule

DIFFUSION = GaussianDiffusion(DiscreteSchedule(cosine_beta_schedule(50)), "noise")
DIGITS = load("digits").take(slice(0, 100))


class Little(torch.nn.Module):
    """One convolution that is told the time; dropout uses the hidden generator, so it must not be needed here."""

    def __init__(self, generator):
        super().__init__()
        self.weight = torch.nn.Parameter(0.1 * torch.randn(1, 1, 3, 3, generator=generator))
        self.on_time = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, t):
        return torch.nn.functional.conv2d(x, self.weight, padding=1) + self.on_time * t[:, None, None, None] / 50


def parts(seed=0, learning_rate=1e-2, steps=40):
    streams = RandomStreams(seed)
    model = Little(streams.initialisation)
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    return model, optimizer, streams, torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps)


def run(model, optimizer, streams, scheduler, epochs=4, images=DIGITS, **options):
    def loss(net, batch):
        return DIFFUSION.loss(net, batch[0], generator=streams.noise)

    options = {"batch_size": 10, "scheduler": scheduler, "progress": False} | options
    return fit(model, loss, images, optimizer, streams, epochs=epochs, **options)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# The loss that can be compared


def test_validation_loss_is_the_mean_over_equal_parts_of_time():
    x = torch.randn(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    seen = []

    def model(xt, t):
        seen.append(t)
        return torch.zeros_like(xt)

    four = validation_loss(DIFFUSION, model, x, bins=4, batch_size=7)
    times = torch.cat(seen)
    assert times.tolist() == [-(-(2 * i + 1) * 50 // 80) for i in range(40)]  # ceil((i + 1/2) / 40 * 50)
    one = validation_loss(DIFFUSION, model, x, bins=1)
    assert four.mean() == pytest.approx(one.item(), rel=1e-12)
    assert one.item() == pytest.approx(1, abs=4 * (2 / x.numel()) ** 0.5)  # the mean square of the noise


def test_validation_loss_of_a_perfect_answer_is_zero():
    x = torch.zeros(20, 1, 4, 4)  # x_t is noise alone, so the answer can be computed from it
    perfect = validation_loss(
        DIFFUSION, lambda xt, t: xt / DIFFUSION.schedule.noise_rate(t)[:, None, None, None].float(), x
    )
    assert perfect.max() < 1e-10


def test_validation_loss_depends_on_its_seed_and_on_no_other_state():
    x = torch.randn(20, 1, 4, 4)
    model = Little(torch.Generator().manual_seed(0))
    first = validation_loss(DIFFUSION, model, x)
    state = torch.get_rng_state()
    assert torch.equal(first, validation_loss(DIFFUSION, model, x, batch_size=20))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, validation_loss(DIFFUSION, model, x, seed=1))


def test_validation_loss_on_a_continuous_schedule():
    diffusion = GaussianDiffusion(OffsetCosineSchedule(), "v")
    found = validation_loss(diffusion, lambda xt, t: torch.zeros_like(xt), torch.zeros(1000, 1, 4, 4), bins=5)
    t = (torch.arange(5, dtype=torch.float64) + 0.5) / 5
    expected = diffusion.schedule.signal_rate(t) ** 2  # v = signal * noise for images of zeros
    assert torch.allclose(found, expected, rtol=0.1, atol=0.01)


@pytest.mark.parametrize("bins", [0, 21])
def test_bins_out_of_range_are_refused(bins):
    with pytest.raises(ValueError, match=rf"bins must lie in 1..20 \(the rows of x\); got {bins}"):
        validation_loss(DIFFUSION, lambda x, t: x, torch.zeros(20, 1, 2, 2), bins=bins)


def test_labels_reach_the_network_row_by_row():
    x, y, seen = torch.zeros(1000, 1, 4, 4, dtype=torch.float64), torch.arange(1000) % 3, []

    def model(xt, t, told):
        seen.append(told)
        return told.to(xt)[:, None, None, None].expand_as(xt)

    found = validation_loss(DIFFUSION, model, x, y, bins=1, batch_size=300)
    assert [len(told) for told in seen] == [300, 300, 300, 100] and torch.equal(torch.cat(seen), y)
    expected = float((y.double() ** 2).mean()) + 1  # the mean of (label - noise)²
    assert found.item() == pytest.approx(expected, abs=4 * (6 / 1000) ** 0.5)
    small = validation_loss(DIFFUSION, model, x, y, bins=1, batch_size=7)
    assert small.item() == pytest.approx(found.item(), rel=1e-12)


def test_without_labels_the_network_is_called_without():
    calls = []
    validation_loss(DIFFUSION, lambda *given: calls.append(len(given)) or given[0], torch.zeros(20, 1, 2, 2))
    assert calls == [2]


def test_labels_change_neither_times_nor_noise():
    x, seen = torch.randn(20, 1, 4, 4), []

    def model(xt, t, y=None):
        seen.append((xt, t))
        return torch.zeros_like(xt)

    validation_loss(DIFFUSION, model, x)
    validation_loss(DIFFUSION, model, x, torch.zeros(20, dtype=torch.int64))
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))


@pytest.mark.parametrize("shape", [(19,), (21,), (500,), (20, 1), ()])
def test_labels_of_another_shape_are_refused(shape):
    y = torch.zeros(shape, dtype=torch.int64)
    message = rf"y must hold one label per row of x, \(20,\); got shape {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=message):
        validation_loss(DIFFUSION, lambda x, t, y: x, torch.zeros(20, 1, 2, 2), y, batch_size=10)


# The place in the data


@pytest.mark.parametrize("start", [0, 1, 9, 10, 11, 25, 29, 30])
def test_batches_go_on_from_any_step(start):
    whole = [x for x, _ in epoch_batches(DIGITS, 10, seed=1, epochs=3)]
    late = [x for x, _ in epoch_batches(DIGITS, 10, seed=1, epochs=3, start=start)]
    assert len(late) == 30 - start and all(torch.equal(a, b) for a, b in zip(late, whole[start:], strict=True))


def test_each_epoch_sees_every_image_once_in_an_order_of_its_own():
    images = DIGITS.take(slice(0, 20))
    x = torch.cat([x for x, _ in epoch_batches(images, 5, seed=0, epochs=2)]).flatten(1)
    first, second = x[:20], x[20:]
    assert not torch.equal(first, second)
    assert torch.equal(torch.sort(first.sum(1))[0], torch.sort(second.sum(1))[0])


# Going on


@pytest.mark.parametrize("cut", [1, 3, 10, 14, 20, 39])
def test_a_run_that_was_cut_off_ends_bit_equal(tmp_path, cut):
    undisturbed = parts()
    rows = run(*undisturbed)

    class Cut(Exception):
        pass

    def loss(net, batch):
        if seen["steps"] == cut:
            raise Cut
        seen["steps"] += 1
        return DIFFUSION.loss(net, batch[0], generator=first[2].noise)

    seen, first = {"steps": 0}, parts()
    options = {"batch_size": 10, "epochs": 4, "folder": tmp_path, "save_every": 3, "progress": False}
    with pytest.raises(Cut):
        fit(first[0], loss, DIGITS, first[1], first[2], scheduler=first[3], **options)
    second = parts()
    again = run(*second, folder=tmp_path, save_every=3)
    assert torch.equal(weights(second[0]), weights(undisturbed[0]))
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]
    assert [row["step"] for row in again] == [10, 20, 30, 40]


def test_a_finished_run_trains_no_further(tmp_path):
    first, second = parts(), parts()
    rows = run(*first, folder=tmp_path)
    stamp = latest(tmp_path).stat().st_mtime_ns
    assert run(*second, folder=tmp_path) == rows
    assert torch.equal(weights(first[0]), weights(second[0])) and latest(tmp_path).stat().st_mtime_ns == stamp


def test_another_configuration_is_refused(tmp_path):
    run(*parts(), folder=tmp_path, config={"learning_rate": 1e-2})
    with pytest.raises(CheckpointError, match=r"config/learning_rate: given 0\.02, stored 0\.01"):
        run(*parts(), folder=tmp_path, config={"learning_rate": 2e-2})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 20}, "config/data order/batch_size: given 20, stored 10"),
        ({"images": DIGITS.take(slice(0, 90))}, "config/data order/images: given 90, stored 100"),
    ],
    ids=["batch size", "images"],
)
def test_other_places_in_the_data_are_refused(tmp_path, change, message):
    run(*parts(), epochs=1, folder=tmp_path)
    with pytest.raises(CheckpointError, match=message):
        run(*parts(), folder=tmp_path, **change)


def test_another_seed_is_refused(tmp_path):
    run(*parts(), epochs=1, folder=tmp_path)
    with pytest.raises(CheckpointError, match="config/data order/seed: given 1, stored 0"):
        run(*parts(seed=1), folder=tmp_path)


def test_an_option_that_does_not_exist_is_refused():
    with pytest.raises(TypeError, match="save_evry"):
        run(*parts(), save_evry=3)


def test_as_many_checkpoints_stay_as_were_asked_for(tmp_path):
    run(*parts(), epochs=2, folder=tmp_path, save_every=2, keep=4)
    assert [int(path.stem[5:]) for path in sorted(tmp_path.glob("step_*"))] == [14, 16, 18, 20]


def test_float16_goes_on_with_its_scale(tmp_path):
    """The scale is a part of the run: it doubles every third step here, and comes back as it was."""

    def scaled(epochs, folder=None):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
        made = parts()
        run(*made, epochs=epochs, folder=folder, scaler=scaler)
        return weights(made[0]), scaler.get_scale()

    whole, scale = scaled(4)
    scaled(2, tmp_path)
    resumed, again = scaled(4, tmp_path)
    assert torch.equal(whole, resumed) and scale == again == 4.0 * 2**13


def test_time_spent_goes_on_and_leaves_validation_out(tmp_path):
    def slow():
        torch.randn(2_000_000).sort()
        return {"score": 1.5}

    rows = run(*parts(), folder=tmp_path, validate=slow)
    assert all(row["score"] == 1.5 for row in rows)
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds) and seconds[-1] > 0 and all(row["cpu_seconds"] > 0 for row in rows)


def test_validation_does_not_change_the_training():
    plain, watched = parts(), parts()
    run(*plain)
    x = DIGITS.normalise(DIGITS.images)
    run(*watched, validate=lambda: {"loss_by_time": validation_loss(DIFFUSION, watched[0], x).tolist()})
    assert torch.equal(weights(plain[0]), weights(watched[0]))


# Averages


def averages(ema):
    """All weights of an EMA, or of several, in one row."""
    several = ema.values() if isinstance(ema, EMAs) else [ema]
    return torch.cat([weights(one.module) for one in several])


MAKERS = [lambda model: EMA(model, 0.8), lambda model: EMAs(model, (2, 20), "unbiased")]


def test_the_average_follows_every_step():
    model, optimizer, streams, scheduler = parts()
    by_hand = {"average": None, "updates": 0}

    def note(*_):  # called by the optimizer, after its step
        now, n = weights(model).double(), by_hand["updates"]
        kept = 0.0 if n == 0 else min(0.8, (1 + n) / (10 + n))
        by_hand["average"] = now if n == 0 else kept * by_hand["average"] + (1 - kept) * now
        by_hand["updates"] += 1

    optimizer.register_step_post_hook(note)
    ema = EMA(model, 0.8)
    run(model, optimizer, streams, scheduler, ema=ema)
    assert ema.updates == by_hand["updates"] == 40
    torch.testing.assert_close(weights(ema.module).double(), by_hand["average"], rtol=1e-5, atol=1e-6)
    assert (weights(ema.module) - weights(model)).abs().max() > 1e-4


def test_an_average_does_not_change_the_training():
    plain, averaged = parts(), parts()
    rows = run(*plain)
    again = run(*averaged, ema=EMAs(averaged[0], (3, 30)))
    assert torch.equal(weights(plain[0]), weights(averaged[0]))
    assert [row["loss"] for row in rows] == [row["loss"] for row in again]


def test_validation_sees_the_average_of_the_whole_epoch():
    model, *rest = parts()
    ema, seen = EMA(model), []
    run(model, *rest, ema=ema, validate=lambda: seen.append(ema.updates) or {})
    assert seen == [10, 20, 30, 40]


@pytest.mark.parametrize("make", MAKERS, ids=["one", "several"])
@pytest.mark.parametrize("cut", [2, 10, 14, 39])
def test_averages_of_a_run_that_was_cut_off_are_bit_equal(tmp_path, make, cut):
    whole = parts()
    kept = make(whole[0])
    run(*whole, ema=kept)

    class Cut(Exception):
        pass

    def loss(net, batch):
        if seen["steps"] == cut:
            raise Cut
        seen["steps"] += 1
        return DIFFUSION.loss(net, batch[0], generator=first[2].noise)

    seen, first, second = {"steps": 0}, parts(), parts()
    options = {"batch_size": 10, "epochs": 4, "folder": tmp_path, "save_every": 3, "progress": False}
    with pytest.raises(Cut):
        fit(first[0], loss, DIGITS, first[1], first[2], scheduler=first[3], ema=make(first[0]), **options)
    again = make(second[0])
    run(*second, folder=tmp_path, save_every=3, ema=again)
    assert torch.equal(weights(second[0]), weights(whole[0]))
    assert torch.equal(averages(again), averages(kept))
    assert {one.updates for one in (again.values() if isinstance(again, EMAs) else [again])} == {40}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (None, EMA, "holds model, optimizer, scheduler, streams, hidden; asked for model, optimizer, scheduler, ema,"),
        (
            EMA,
            None,
            "holds model, optimizer, scheduler, ema, streams, hidden; asked for model, optimizer, scheduler, s",
        ),
        (EMA, lambda model: EMAs(model, (2,)), "ema: given 'EMAs', stored 'EMA'"),
        (
            lambda model: EMAs(model, (2,)),
            lambda model: EMAs(model, (3,)),
            r"ema/3\.0/.*given shape .*, stored nothing",
        ),
    ],
    ids=["none, then one", "one, then none", "one, then several", "other half-lives"],
)
def test_a_run_goes_on_with_the_averages_that_it_began_with(tmp_path, before, after, message):
    first, second = parts(), parts()
    run(*first, epochs=2, folder=tmp_path, ema=before and before(first[0]))
    untouched = weights(second[0])
    with pytest.raises(CheckpointError, match=message):
        run(*second, folder=tmp_path, ema=after and after(second[0]))
    assert torch.equal(weights(second[0]), untouched)


def test_a_broken_step_leaves_the_saved_average_alone(tmp_path):
    first = parts()
    run(*first, epochs=2, folder=tmp_path, ema=EMA(first[0]))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken = parts()

    def loss(net, batch):
        return DIFFUSION.loss(net, batch[0], generator=broken[2].noise) * float("nan")

    options = {"scheduler": broken[3], "ema": EMA(broken[0]), "folder": tmp_path, "save_every": 3, "progress": False}
    with pytest.raises(FloatingPointError, match="epoch 3 is nan"):
        fit(broken[0], loss, DIGITS, broken[1], broken[2], batch_size=10, epochs=4, **options)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# Stopping


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_checkpoint(tmp_path):
    model, optimizer, streams, scheduler = parts()
    run(model, optimizer, streams, scheduler, epochs=2, folder=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken = parts()
    count = {"steps": 0}

    def loss(net, batch):
        count["steps"] += 1
        value = DIFFUSION.loss(net, batch[0], generator=broken[2].noise)
        return value * float("nan") if count["steps"] > 3 else value

    with pytest.raises(FloatingPointError, match=r"epoch 3 is nan: the checkpoints in .* are from before"):
        fit(
            broken[0],
            loss,
            DIGITS,
            broken[1],
            broken[2],
            batch_size=10,
            epochs=4,
            scheduler=broken[3],
            folder=tmp_path,
            save_every=5,
            progress=False,
        )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_weights_that_broke_while_the_loss_was_fine_are_not_saved(tmp_path):
    model, optimizer, streams, scheduler = parts()

    def break_weights(*_):  # as a gradient does that is not finite, in a step whose loss was
        steps["n"] += 1
        if steps["n"] == 20:
            with torch.no_grad():
                model.weight[0, 0, 1, 1] = torch.nan

    steps = {"n": 0}
    optimizer.register_step_post_hook(break_weights)
    with pytest.raises(FloatingPointError, match=r"step 20: the sum of the weights of epoch 2 is nan.*step_000000018"):
        run(model, optimizer, streams, scheduler, folder=tmp_path, save_every=3)
    assert latest(tmp_path).name == "step_000000018.safetensors"
    assert all(tensor.isfinite().all() for tensor in stored_weights(latest(tmp_path)))


def stored_weights(path):
    model = parts()[0]
    load_checkpoint(path, model=model)
    return [p.detach() for p in model.parameters()]


def interrupted_at(step):
    def interrupt(done):
        if done.step == step:
            signal.raise_signal(signal.SIGINT)

    return interrupt


@pytest.mark.parametrize("step", [1, 10, 17])
def test_ctrl_c_saves_the_step_and_says_how_to_go_on(tmp_path, capsys, step):
    whole, first, second = parts(), parts(), parts()
    run(*whole)
    with pytest.raises(KeyboardInterrupt, match=rf"stopped after step {step}: .* holds it, the same call goes on"):
        run(*first, folder=tmp_path, on_step=interrupted_at(step))
    assert f"stopped after step {step}: {tmp_path} holds it, the same call goes on" in capsys.readouterr().err
    assert latest(tmp_path).name == f"step_{step:09d}.safetensors"
    run(*second, folder=tmp_path)
    assert torch.equal(weights(second[0]), weights(whole[0]))


def test_ctrl_c_without_a_folder_says_that_nothing_is_left():
    with pytest.raises(KeyboardInterrupt, match="stopped after step 3: nothing was saved"):
        run(*parts(), on_step=interrupted_at(3))


def test_no_better_ends_the_run_and_the_best_is_kept(tmp_path):
    model, *rest = parts()
    scores, seen = iter([3.0, 1.0, 2.0, 2.5, 0.5]), []

    def validate():
        seen.append(weights(model))
        return {"score": next(scores)}

    options = {"folder": tmp_path, "early_stop": EarlyStop(2, "score"), "epochs": 8}
    rows = run(model, *rest, validate=validate, **options)
    assert [row["score"] for row in rows] == [3.0, 1.0, 2.0, 2.5]
    best = parts()[0]
    assert load_checkpoint(tmp_path / "best", model=best)["step"] == 20
    assert torch.equal(weights(best), seen[1]) and not torch.equal(seen[1], seen[3])
    assert run(*parts(), validate=lambda: {"score": 0.0}, **options) == rows  # over is over


# Records


def test_without_a_terminal_each_epoch_is_a_line(capsys, monkeypatch):
    monkeypatch.setattr(fitting, "_terminal", lambda: False)
    rows = run(*parts(), progress=True, validate=lambda: {"score": 0.125})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(rows) == 4
    assert lines[0].startswith(f"epoch 1  step 10  loss {rows[0]['loss']:.5g}") and lines[0].endswith("score 0.125")
    run(*parts())
    assert capsys.readouterr().err == ""


def test_on_a_terminal_there_is_a_bar_from_where_it_stands(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(fitting, "_terminal", lambda: True)
    run(*parts(), epochs=2, folder=tmp_path)
    capsys.readouterr()
    run(*parts(), folder=tmp_path, progress=True)
    told = capsys.readouterr().err
    assert "20/40" in told and "40/40" in told and "epoch 3" not in told


def test_all_that_can_be_recorded_changes_nothing(tmp_path):
    plain, watched = parts(), parts()
    run(*plain)
    grids = SampleGrids(watched[0], lambda net, noise, _: net(noise, torch.ones(4)), (4, 1, 8, 8), tmp_path, every=2)
    options = {"folder": tmp_path / "run", "tensorboard": tmp_path / "board", "log_every": 4, "grids": grids}
    seen = []
    rows = run(*watched, on_step=seen.append, **options)
    assert torch.equal(weights(plain[0]), weights(watched[0]))
    assert [done.step for done in seen] == list(range(1, 41))
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row for row in log if "epoch" in row] == rows
    steps = [row for row in log if "epoch" not in row]
    assert [row["step"] for row in steps] == list(range(4, 41, 4))
    assert steps[0]["loss"] == float(seen[3].loss) and steps[0]["learning_rate"] == seen[3].learning_rate
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["epoch_0002.png", "epoch_0004.png"]
    assert len(list((tmp_path / "board").glob("events*"))) == 1


# What a recipe tells


@dataclass(frozen=True)
class Recipe:
    precision: str = "float32"
    batch_size: int = 10
    epochs: int = 2


def test_a_recipe_tells_its_sizes_and_itself(tmp_path):
    told = recipe_options(Recipe(), None, 7, tmp_path, log_every=3, progress=False)
    assert told == {
        "batch_size": 10,
        "epochs": 2,
        "folder": tmp_path,
        "config": {"seed": 7, "precision": "float32", "batch_size": 10, "epochs": 2},
        "scaler": None,
        "log_every": 3,
        "progress": False,
    }
    assert isinstance(recipe_options(Recipe("fp16"), None, 0, None)["scaler"], torch.amp.GradScaler)
    assert recipe_options(Recipe("auto"), None, 0, None)["config"]["precision"] == "auto"


@pytest.mark.parametrize(("folder", "grids"), [(None, 1), ("runs", 0)])
def test_grids_that_cannot_be_are_refused(folder, grids):
    with pytest.raises(ValueError, match="grids need a folder to lie in, and at least 1 epoch between two"):
        recipe_options(Recipe(), None, 0, folder, grids=grids)


def test_without_a_folder_nothing_is_written_and_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(*parts())
    with pytest.raises(FloatingPointError, match="nothing was saved"):
        run(*parts(learning_rate=1e30))
    assert not list(tmp_path.iterdir())


def test_more_images_per_batch_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"batch_size must lie in 1\.\.100"):
        run(*parts(), batch_size=101)


def test_max_norm_is_passed_on():
    free, held = parts(), parts()
    run(*free, epochs=1)
    held_optimizer = torch.optim.SGD(held[0].parameters(), 1.0)
    before = weights(held[0])
    run(held[0], held_optimizer, held[2], None, epochs=1, max_norm=1e-4)
    assert (weights(held[0]) - before).norm() <= 10 * 1e-4 * (1 + 1e-5)


def test_the_model_is_trained_in_place():
    model, *rest = parts()
    before = copy.deepcopy(model)
    run(model, *rest, epochs=1)
    assert not torch.equal(weights(model), weights(before))


# Two errors for every network


@pytest.mark.parametrize("schedule", [DiscreteSchedule(cosine_beta_schedule(20)), OffsetCosineSchedule()])
@pytest.mark.parametrize("prediction", ["noise", "v", "x0"])
def test_absolute_errors_of_a_network_that_knows_the_mean_are_in_a_fixed_ratio(schedule, prediction):
    x = torch.randn(60, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    diffusion = GaussianDiffusion(schedule, prediction)

    def answer(xt, t):  # the estimate of x0 is zero, whatever the network predicts
        signal, sigma = (rate[:, None, None, None] for rate in (schedule.signal_rate(t), schedule.noise_rate(t)))
        return {"noise": xt / sigma, "v": signal * xt / sigma, "x0": torch.zeros_like(xt)}[prediction]

    found = absolute_errors(diffusion, answer, x, batch_size=7)
    assert found["image_l1"] == pytest.approx(float(x.abs().mean()), rel=1e-9)
    place = (torch.arange(60, dtype=torch.float64) + 0.5) / 60
    times = (place * 20).ceil().long() if isinstance(schedule.end, int) else place
    ratio = schedule.signal_rate(times) / schedule.noise_rate(times)  # of the error of the noise to that of the image
    assert found["noise_l1"] == pytest.approx(float((x.abs().mean((1, 2, 3)) * ratio).mean()), rel=1e-9)


def test_absolute_errors_do_not_depend_on_the_batch_size():
    x, diffusion = (
        torch.randn(30, 1, 4, 4, generator=torch.Generator().manual_seed(1)),
        GaussianDiffusion(OffsetCosineSchedule()),
    )
    one, other = (absolute_errors(diffusion, lambda xt, t: 0.5 * xt, x, batch_size=n) for n in (30, 8))
    assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize(("shell", "watched"), [(None, False), (object(), True)])
def test_only_a_notebook_is_a_notebook(monkeypatch, shell, watched):
    """A process that has merely imported the tools of notebooks writes lines, as any log does."""
    monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert fitting._terminal() is watched


@pytest.mark.parametrize("decay", [None, 0.02])
def test_a_recipe_s_rate_goes_up_and_down_to_nothing(decay):
    wanted = SimpleNamespace(learning_rate=0.01, one_cycle=True, epochs=10, batch_size=64)
    if decay is not None:
        wanted.weight_decay = decay
    optimizer, scheduler = recipe_optimizer(wanted, torch.nn.Linear(2, 2), images=700)  # ten steps an epoch, and a rest
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert max(rates) == pytest.approx(0.01) and rates.index(max(rates)) in (9, 10)
    assert rates[0] < 0.001 and rates[-1] < 1e-5
    assert isinstance(optimizer, torch.optim.AdamW) == (decay is not None)
    assert optimizer.param_groups[0]["weight_decay"] == (decay or 0)
    assert decay is None or optimizer.param_groups[0]["betas"] == (0.9, 0.999)  # the momentum of AdamW stays as it is


def test_a_recipe_without_a_cycle_has_no_schedule_and_few_images_one_step():
    wanted = SimpleNamespace(learning_rate=0.01, one_cycle=False, epochs=10, batch_size=64)
    optimizer, scheduler = recipe_optimizer(wanted, torch.nn.Linear(2, 2), images=700)
    assert scheduler is None and optimizer.param_groups[0]["lr"] == 0.01
    wanted.one_cycle = True
    assert recipe_optimizer(wanted, torch.nn.Linear(2, 2), images=3)[1].total_steps == 1
