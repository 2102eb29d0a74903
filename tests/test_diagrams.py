"""Networks drawn from a run: every stage in its order, bridges by their numbers, and a picture that can be parsed."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn

from diffusion_book.diagrams import trace_stages, unet_diagram
from diffusion_book.unet import UNet, UNetFixed


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Crossed(nn.Module):
    """Three convolutions; the last one sees the first, in front of or behind the second."""

    def __init__(self, front: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.three, self.front = nn.Conv2d(8, 2, 1), front

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        first = self.one(x)
        second = self.two(first)
        return self.three(torch.cat([first, second] if self.front else [second, first], 1))


@pytest.mark.parametrize("front", [True, False])
def test_a_bridge_is_found_by_its_numbers(front: bool) -> None:
    stages = trace_stages(Crossed(front), torch.randn(2, 1, 6, 6, generator=generator()), torch.ones(2))
    assert [(stage.name, stage.kind, stage.channels, stage.side) for stage in stages] == [
        ("one", "Conv2d", 4, 6),
        ("two", "Conv2d", 4, 6),
        ("three", "Conv2d", 2, 6),
    ]
    assert [stage.bridge for stage in stages] == [None, None, 0]


@pytest.mark.parametrize("levels", [(1, 2), (1, 2, 4), (1, 2, 2, 3)])
def test_a_unet_has_a_bridge_for_each_level(levels: tuple[int, ...]) -> None:
    network = UNet(1, 8, 100, levels, generator=generator())
    stages = trace_stages(network, torch.randn(1, 1, 16, 16, generator=generator()), torch.tensor([5]))
    found = {stage.name: stages[stage.bridge].name for stage in stages if stage.bridge is not None}
    assert found == {f"up_{i}": f"down_{i}" for i in range(1, len(levels) + 1)}
    assert all(stage.bridge is None or stages[stage.bridge].side == stage.side for stage in stages)


def test_the_same_network_written_twice_is_the_same_picture() -> None:
    images, times = torch.randn(1, 1, 28, 28, generator=generator()), torch.tensor([5])
    nested, flat = UNet(1, 8, 100, generator=generator()), UNetFixed(1, 8, 100, generator=generator())
    kinds = [[(s.kind, s.channels, s.side, s.bridge) for s in trace_stages(n, images, times)] for n in (nested, flat)]
    assert kinds[0] == kinds[1]


def test_a_picture_is_svg_with_a_box_for_each_stage() -> None:
    network, x = Crossed(True), torch.randn(1, 1, 6, 6, generator=generator())
    tree = ElementTree.fromstring(unet_diagram(network, x, torch.ones(1)))
    space = "{http://www.w3.org/2000/svg}"
    assert tree.tag == f"{space}svg" and tree.get("role") == "img"
    assert tree.find(f"{space}title").text == "Crossed: 3 stages, 1 bridges"
    titles = [title.text for title in tree.findall(f"{space}rect/{space}title")]
    assert titles == ["one: Conv2d, 4 channels", "two: Conv2d, 4 channels", "three: Conv2d, 2 channels"]
    assert len(tree.findall(f"{space}path")) == 1


def test_nothing_changes_and_no_hook_stays_even_after_an_error() -> None:
    network, x = Crossed(True), torch.randn(1, 1, 6, 6, generator=generator())
    before: Any = network(x, torch.ones(1))
    with pytest.raises(RuntimeError):
        trace_stages(network, torch.randn(1, 3, 6, 6), torch.ones(1))
    assert not any(child._forward_hooks for child in network.children())
    assert torch.equal(network(x, torch.ones(1)), before)


def test_a_network_without_images_is_refused() -> None:
    with pytest.raises(ValueError, match="no child of Sequential returns images"):
        trace_stages(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2))
