"""Compiled networks: where they pay, that they answer alike, and how often they are compiled."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from diffusion_book.attunet import AttentionUNet
from diffusion_book.compiled import Verdict, choose_compile, compiled
from diffusion_book.ddim import ddim
from diffusion_book.diffusion import GaussianDiffusion
from diffusion_book.guidance import Guided
from diffusion_book.mlp import TimeMLP
from diffusion_book.precision import in_precision
from diffusion_book.resunet import ResUNet
from diffusion_book.sampling import sample
from diffusion_book.schedule import DiscreteSchedule, cosine_beta_schedule
from diffusion_book.unet import UNet


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing that another test compiled is left."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Recorder:
    """A backend that runs what it is given as it is, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return graph.forward


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# The choice


@pytest.mark.parametrize(
    ("capability", "pays"), [((6, 1), False), ((7, 0), True), ((7, 5), True), ((8, 0), True), ((12, 0), True)]
)
def test_gpus_are_judged_by_their_capability(monkeypatch, capability, pays):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    found = choose_compile("cuda:0")
    assert found.pays == pays and f"{capability[0]}.{capability[1]}" in found.why


def test_without_triton_it_does_not_pay(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", asked.append)
    assert choose_compile("cuda") == Verdict(False, "Triton is not installed") and asked == ["triton"]


@pytest.mark.parametrize("device", ["cpu", "mps", "meta"])
def test_elsewhere_it_does_not_pay(device):
    assert not choose_compile(device).pays


def test_auto_asks_about_the_device_of_the_weights(monkeypatch):
    asked = []

    def say_yes(device):
        asked.append(device)
        return Verdict(True, "because")

    monkeypatch.setattr("diffusion_book.compiled.choose_compile", say_yes)
    model = TimeMLP(10, hidden=4)
    assert compiled(model, backend=Recorder()) is not model and asked == [torch.device("cpu")]
    assert compiled(model, "off") is model and compiled(nn.Identity()) is not None and len(asked) == 1


def test_off_and_a_network_without_weights_are_left_alone():
    model, bare = TimeMLP(10, hidden=4), nn.Identity()
    assert compiled(model, "off") is model and compiled(model) is model and compiled(bare) is bare


@pytest.mark.parametrize("when", ["yes", "", "Auto", None, True])
def test_unknown_choices_are_refused(when):
    with pytest.raises(ValueError, match="when must be one of auto, on, off; got"):
        compiled(TimeMLP(10, hidden=4), when)


# The program

NETWORKS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "mlp": (TimeMLP(20, hidden=8, num_classes=3, generator=generator()), (2,)),
    "unet": (UNet(1, 8, 20, channel_multipliers=(1, 2), num_classes=3, generator=generator()), (1, 8, 8)),
    "attention": (AttentionUNet(1, 1, 16, num_classes=3, widths=(8, 8), heads=2, generator=generator()), (1, 8, 8)),
    "resunet": (ResUNet(widths=(8, 16), block_depth=1, generator=generator()), (3, 8, 8)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_each_network_is_one_graph_for_all_times_and_two_for_all_batches(name):
    """`fullgraph` makes it an error to fall back to Python anywhere in the network."""
    model, shape = NETWORKS[name]
    recorder = Recorder()
    program = compiled(model.eval(), "on", backend=recorder, fullgraph=True)
    for n, expected in ((4, 1), (4, 1), (3, 2), (6, 2)):
        x = torch.randn(n, *shape, generator=generator())
        t = torch.rand(n) if name == "resunet" else torch.randint(1, 21, (n,))
        told = () if name == "resunet" else (torch.arange(n) % 4,)
        with torch.no_grad():
            assert torch.allclose(program(x, t, *told), model(x, t, *told), rtol=0, atol=1e-6)
        assert recorder.count == expected


def test_gradients_and_a_step_are_those_of_the_network():
    ends = []
    for when in ("off", "on"):
        model = TimeMLP(20, hidden=8, generator=generator())
        program, optimizer = compiled(model, when, backend=Recorder()), torch.optim.SGD(model.parameters(), 0.1)
        for seed in range(3):
            x = torch.randn(5, 2, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            program(x, torch.arange(1, 6)).square().mean().backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*ends, rtol=1e-5, atol=1e-7) and not torch.equal(ends[0], torch.zeros_like(ends[0]))


def test_what_wraps_a_network_wraps_a_program():
    model, shape = NETWORKS["unet"]
    program = compiled(model.eval().requires_grad_(False), "on", backend=Recorder())
    x, t, y = torch.randn(3, *shape, generator=generator()), torch.tensor([1, 9, 20]), torch.tensor([0, 1, 3])
    assert program.null_label == model.null_label == 3
    assert torch.allclose(Guided(program, 3.0)(x, t, y), Guided(model, 3.0)(x, t, y), rtol=0, atol=1e-5)
    half = in_precision(program, "bf16")(x, t, y)
    assert torch.allclose(half, in_precision(model, "bf16")(x, t, y), rtol=0, atol=1e-6)
    assert not torch.equal(half, model(x, t, y))


def test_a_sampler_of_any_number_of_steps_compiles_once():
    model, recorder = NETWORKS["mlp"][0].eval().requires_grad_(False), Recorder()
    diffusion = GaussianDiffusion(DiscreteSchedule(cosine_beta_schedule(20)), "v")
    program, x = compiled(model, "on", backend=recorder), torch.randn(7, 2, generator=generator())
    for steps in (2, 5, 20):
        ours, theirs = (sample(ddim(diffusion, m, x, steps=steps), progress=False) for m in (program, model))
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)
    assert recorder.count == 1
