from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from diffusion_book.core import randn_like
from diffusion_book.diffusion import GaussianDiffusion, Step

Denoiser = Callable[..., Tensor]

_VARIANCES = ("posterior", "forward")


class StepIterator(Iterator[Step]):
    """An iterator over a sampler's moves that knows how many are left, so that a bar can show them."""

    def __init__(
        self,
        steps: Iterator[Step],
        length: int,  # number of moves
    ) -> None:
        self._steps = steps
        self._left = length

    def __len__(self) -> int:
        return self._left

    def __next__(self) -> Step:
        step = next(self._steps)
        self._left -= 1
        return step


def _check_start(x: Tensor, y: Tensor | None) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, such as torch.randn(n, ...); got {x.dtype}")
    if y is not None and y.shape != x.shape[:1]:
        raise ValueError(f"y must hold one label per row of x, ({len(x)},); got shape {tuple(y.shape)}")


def call_denoiser(
    model: Denoiser,  # (x, t) or (x, t, y) to a tensor like x
    x: Tensor,  # (n, ...)
    t: Tensor,  # one time, ()
    y: Tensor | None,  # (n,) labels, or None
) -> Tensor:  # (n, ...)
    """Ask a denoiser about a whole batch at one time, without building a graph."""
    times = t.to(x.device).expand(len(x))
    with torch.no_grad():
        return model(x, times) if y is None else model(x, times, y)


def ddpm(
    diffusion: GaussianDiffusion,
    model: Denoiser,  # (x, t) or (x, t, y) to what `diffusion.prediction` says
    x: Tensor,  # (n, ...) the start, a draw from N(0, I)
    *,
    y: Tensor | None = None,  # (n,) labels
    steps: int | None = None,  # moves; T on a discrete schedule if not given, fewer respace it
    variance: str = "posterior",  # of each move: "posterior" (β̃, the smaller) or "forward" (β, the larger)
    clip: tuple[float, float] | None = None,  # bounds for the estimate of x0
    generator: torch.Generator | None = None,  # for the noise of the moves
) -> StepIterator:
    """Ancestral sampling: estimate x0, draw x_s from q(x_s | x_t, x0), repeat (Ho et al. 2020, algorithm 2).

    The move to clean data adds no noise. Raises ValueError for arguments that do not fit, before the first call.
    """
    _check_start(x, y)
    if variance not in _VARIANCES:
        raise ValueError(f"variance must be one of {', '.join(_VARIANCES)}; got {variance!r}")
    if steps is None and not hasattr(diffusion.schedule, "T"):
        raise ValueError("steps must be given on a continuous schedule")
    grid = diffusion.schedule.grid(int(diffusion.schedule.end) if steps is None else steps)
    return StepIterator(_ddpm_moves(diffusion, model, x, y, grid, variance, clip, generator), len(grid) - 1)


def _ddpm_moves(
    diffusion: GaussianDiffusion,
    model: Denoiser,
    x: Tensor,
    y: Tensor | None,
    grid: Tensor,
    variance: str,
    clip: tuple[float, float] | None,
    generator: torch.Generator | None,
) -> Iterator[Step]:
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        x0, _ = diffusion.predict(call_denoiser(model, x, t, y), x, t, clip)
        x, spread = diffusion.q_posterior(x0, x, t, s)
        if s > diffusion.schedule.clean:
            if variance == "forward":
                spread = _forward_variance(diffusion, t, s).to(x)
            x = x + spread.sqrt() * randn_like(x, generator)
        yield Step(s.item(), x, x0)


def _forward_variance(diffusion: GaussianDiffusion, t: Tensor, s: Tensor) -> Tensor:
    """Variance that the forward process adds between s and t: β_t where they are neighbours."""
    schedule = diffusion.schedule
    kept = schedule.signal_rate(t) / schedule.signal_rate(s)
    return schedule.noise_rate(t) ** 2 - (kept * schedule.noise_rate(s)) ** 2


def sample(
    iterator: StepIterator,  # such as ddpm(...)
    progress: bool = True,  # show a bar
) -> Tensor:  # (n, ...) the last x
    """Run a sampler to its end. Raises ValueError where there is no move left."""
    step = None
    for step in _with_bar(iterator, progress):
        pass
    if step is None:
        raise ValueError("the iterator has no moves left: build a new one, a sampler runs once")
    return step.x


def trajectory(
    iterator: StepIterator,  # such as ddpm(...)
    frames: int = 50,  # keep at most so many moves, evenly spaced, the last among them
    progress: bool = False,  # show a bar
) -> list[Step]:  # on the CPU
    """Run a sampler and keep some of its moves: memory grows with `frames`, not with the number of moves."""
    if frames < 1:
        raise ValueError(f"frames must be at least 1; got {frames}")
    moves = len(iterator)
    count = min(frames, moves)
    kept = {moves - 1 - i * moves // count for i in range(count)}
    steps = enumerate(_with_bar(iterator, progress))
    return [Step(step.t, step.x.cpu(), step.x0.cpu()) for i, step in steps if i in kept]


def _with_bar(iterator: StepIterator, progress: bool) -> Iterator[Step]:
    if not progress:
        return iterator
    from tqdm.auto import tqdm  # only when a bar is wanted: importing the library stays light

    return iter(tqdm(iterator, desc="sampling", leave=False))
