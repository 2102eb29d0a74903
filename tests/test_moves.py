"""What all samplers share: the iterator with a length, the question to a denoiser, the check of the start."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import diffusion_book.sampling
from diffusion_book.diffusion import Step
from diffusion_book.moves import StepIterator, call_denoiser, check_start


def numbered(n: int) -> StepIterator:
    return StepIterator((Step(t, torch.full((1,), t), torch.zeros(1)) for t in range(n)), n)


def test_the_length_counts_down_to_nothing() -> None:
    moves = numbered(3)
    lengths = [len(moves)]
    for step in moves:
        lengths.append(len(moves))
    assert lengths == [3, 2, 1, 0] and step.t == 2
    with pytest.raises(StopIteration):
        next(moves)
    assert len(moves) == 0 and list(numbered(0)) == []


def test_an_error_of_the_sampler_is_no_move() -> None:
    def broken():  # type: ignore[no-untyped-def]
        raise RuntimeError("out of memory")
        yield

    moves = StepIterator(broken(), 4)
    with pytest.raises(RuntimeError, match="out of memory"):
        next(moves)
    assert len(moves) == 4


def test_one_time_for_every_row_and_no_graph() -> None:
    seen: list[Tensor] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return 2 * x

    x = torch.ones(3, 2, requires_grad=True)
    out = call_denoiser(model, x, torch.tensor(0.25, dtype=torch.float64), None)
    assert not out.requires_grad and torch.equal(out, torch.full((3, 2), 2.0))
    assert seen[0].tolist() == [0.25] * 3 and seen[0].dtype == torch.float64


def test_labels_are_the_third_argument() -> None:
    labels = torch.tensor([5, 6])
    out = call_denoiser(lambda x, t, y: y[:, None] + t[:, None], torch.zeros(2, 1), torch.tensor(10), labels)
    assert out.tolist() == [[15], [16]]


@pytest.mark.parametrize(
    ("x", "y", "kind", "message"),
    [
        (torch.arange(3), None, TypeError, r"x must be floating point.*got torch.int64"),
        (torch.ones(3), torch.zeros(2), ValueError, r"one label per row of x, \(3,\); got shape \(2,\)"),
        (torch.ones(3, 2), torch.zeros(3, 2), ValueError, r"one label per row of x, \(3,\); got shape \(3, 2\)"),
    ],
)
def test_starts_that_do_not_fit(x: Tensor, y: Tensor | None, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        check_start(x, y)


def test_starts_that_fit() -> None:
    check_start(torch.ones(3, 2))
    check_start(torch.ones(3, 2, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int64))


def test_the_ancestral_sampler_hands_the_same_names_on() -> None:
    assert diffusion_book.sampling.StepIterator is StepIterator
    assert diffusion_book.sampling.call_denoiser is call_denoiser
