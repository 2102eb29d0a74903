"""The table of speeds compares networks of one size, and its ratios are those of the seconds that were measured."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import peers


@pytest.mark.parametrize("package", ["diffusers", "denoising-diffusion-pytorch"])
def test_a_peer_is_of_our_size(package):
    if not find_spec(package.replace("-", "_")):
        pytest.skip(f"{package} is installed by `make bench`")
    ours, theirs = (peers.sizes(peers.PACKAGES[name]("float32", "cpu"), "cpu") for name in ("ours", package))
    assert ours["parameters"] == 602_705
    assert theirs["parameters"] == pytest.approx(ours["parameters"], rel=0.05)
    assert theirs["multiply_adds"] == pytest.approx(ours["multiply_adds"], rel=0.10)


def test_ratios_compare_the_times_of_one_round():
    seconds = {"ours, a": [1.0, 2.0, 4.0], "ours, b": [0.5, 0.5, 0.5], "peer": [2.0, 6.0, 4.0]}
    told = peers.compared(seconds, items=8)
    assert told["per_second"] == {"ours, a": 4.0, "ours, b": 16.0, "peer": 2.0}
    assert told["times_as_fast"]["ours, a / peer"]["median"] == 2.0  # of 2, 3 and 1
    assert told["times_as_fast"]["ours, b / peer"]["median"] == 8.0
    assert set(told["times_as_fast"]) == {"ours, a / peer", "ours, b / peer"}


def test_every_round_times_each_once_in_turn():
    called = []
    calls = {name: lambda name=name: called.append(name) for name in "ab"}
    found = peers.rounds(calls, count=3, warm_up=2, device="cpu")
    assert called == list("ab") * 5 and {name: len(times) for name, times in found.items()} == {"a": 3, "b": 3}
