import pytest
import torch

from diffusion_book.petals import _KNOBS, draw_petals

PLAIN = {name: 0.5 for name in _KNOBS} | {"tilt": 0.0, "second": 0.0, "vein": 0.0}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [1, 7, 32, 65])
def test_shape_and_kind(size):
    x = draw_petals(torch.arange(6), size, seeded(0))
    assert x.shape == (6, 3, size, size) and x.dtype == torch.uint8


def test_chance_comes_from_the_generator_alone():
    labels = torch.arange(20) % 6
    torch.manual_seed(1)
    first = draw_petals(labels, 16, seeded(5))
    torch.manual_seed(2)
    assert torch.equal(first, draw_petals(labels, 16, seeded(5)))
    assert not torch.equal(first, draw_petals(labels, 16, seeded(6)))
    assert torch.equal(first[:7], draw_petals(labels[:7], 16, seeded(5))), "a flower does not depend on its neighbours"


@pytest.mark.parametrize("label", range(6))
def test_petals_are_counted_by_fourier(label):
    """Around a circle through the petals, the strongest frequency is their number."""
    x = draw_petals(torch.tensor([label]), 256, **PLAIN).double().mean(1)[0]
    theta = torch.arange(720, dtype=torch.float64) * 2 * torch.pi / 720
    radius = 0.62 * 0.735 * 128
    row, column = (127.5 + radius * f(theta) for f in (torch.sin, torch.cos))
    around = x[row.round().long(), column.round().long()]
    power = torch.fft.rfft(around).abs()[2:20]
    assert int(power.argmax()) + 2 == label + 3


@pytest.mark.parametrize("label", range(6))
def test_turned_by_one_petal(label):
    start, one, half = (
        draw_petals(torch.tensor([label]), 48, **PLAIN | {"angle": a / (label + 3)}).int() for a in (0, 1, 0.5)
    )
    assert (start - one).abs().max() <= 1
    assert (start - half).abs().float().mean() > 1


def test_same_flower_at_every_size():
    labels = torch.arange(12) % 6
    small, large = (draw_petals(labels, size, seeded(3)).float() for size in (24, 96))
    mean = large.unflatten(2, (24, 4)).unflatten(4, (24, 4)).mean((3, 5))
    assert (mean - small).abs().mean() < 2.5
    assert (mean.roll(1, 0) - small).abs().mean() > 20


def test_edges_are_soft():
    """A shift by a fraction of a pixel moves the picture by little, so no pixel jumps."""
    x = [draw_petals(torch.tensor([2]), 32, **PLAIN | {"x": 0.5 + d}).float() for d in (0, 0.005)]
    assert 0 < (x[0] - x[1]).abs().max() < 40


def test_knobs_may_differ_from_flower_to_flower():
    light = draw_petals(torch.zeros(5, dtype=torch.long), 16, **PLAIN | {"dusk": torch.linspace(0, 1, 5)})
    corner = light[:, :, 0, 0].float().mean(1)
    assert (corner.diff() > 0).all()


def test_empty():
    assert draw_petals(torch.empty(0, dtype=torch.long), 8).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"labels": torch.tensor([0, 6])}, r"labels must lie in 0\.\.5 .*got 0 to 6"),
        ({"labels": torch.tensor([-1])}, r"labels .* got -1 to -1"),
        ({"size": 0}, "size must be .*got 0"),
        ({"size": 8.0}, r"size must be .*got 8\.0"),
        ({"colour": 0.1}, "knobs must be among angle, .*got colour"),
        ({"hue": 1.5}, r"hue must lie in \[0, 1\]; got 1.5 to 1.5"),
        ({"hue": float("nan")}, r"hue must lie in \[0, 1\]; got nan"),
    ],
)
def test_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        draw_petals(**{"labels": torch.tensor([0])} | arguments)
