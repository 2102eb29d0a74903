from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_book.diffusion import ForwardProcess
from diffusion_book.schedule import Schedule

_MAX_ENTRIES = 4_000_000  # of one block of weights: 32 MB in float64


class IdealDenoiser:
    """E[x0 | x_t] when the data are exactly these n points, each equally likely: the best answer there is.

    A denoiser that predicts x0; it computes in float64 and answers in the dtype of x.
    Raises ValueError for NaN in the data and for labels that do not fit.
    """

    def __init__(
        self,
        data: Tensor,  # (n, ...) the data set
        schedule: Schedule,
        labels: Tensor | None = None,  # (n,) classes, for conditional answers
    ) -> None:
        if len(data) == 0 or not data.isfinite().all():
            raise ValueError(f"data must be finite and hold at least one point; got shape {tuple(data.shape)}")
        if labels is not None and labels.shape != data.shape[:1]:
            raise ValueError(f"labels must have shape ({len(data)},); got {tuple(labels.shape)}")
        self.schedule = schedule
        self.labels = labels
        self.data = data.double().flatten(1)
        self.square = self.data.square().sum(1)

    def __call__(
        self,
        x: Tensor,  # (m, ...) noisy points
        t: Tensor | float,  # (m,) or one time, later than clean
        y: Tensor | None = None,  # (m,) classes: each row averages over its own class only
    ) -> Tensor:  # (m, ...)
        rows = max(1, _MAX_ENTRIES // len(self.data))
        points = x.double().flatten(1).split(rows)
        times = self.schedule.check_times(t).to(x.device).expand(len(x)).split(rows)
        classes = y.split(rows) if y is not None else [None] * len(points)
        blocks = [self._block(*block) for block in zip(points, times, classes, strict=True)]
        return torch.cat(blocks).reshape(x.shape).to(x.dtype)

    def _block(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """A softmax over the data of -|x - signal·data|² / (2 noise²): Bayes' rule with a uniform prior."""
        signal, noise = self.schedule.signal_rate(t)[:, None], self.schedule.noise_rate(t)[:, None]
        logits = (signal * (x @ self.data.T) - signal**2 / 2 * self.square) / noise**2
        if y is not None:
            logits = logits.masked_fill(self._other_class(y), -torch.inf)
        return logits.softmax(1) @ self.data

    def _other_class(self, y: Tensor) -> Tensor:
        if self.labels is None:
            raise ValueError("y was given, but this denoiser has no labels: build it with labels=")
        other = y[:, None] != self.labels[None]
        unknown = y[other.all(1)]
        if len(unknown):
            raise ValueError(f"no data with label {int(unknown[0])}; known labels: {self.labels.unique().tolist()}")
        return other


def bayes_loss(
    denoiser: Callable[..., Tensor],  # the ideal one for the data: returns x0
    schedule: Schedule,
    x0: Tensor,  # (n, ...) points of the data's distribution
    t: Tensor | int,  # (n,) or one time
    noise: Tensor,  # (n, ...) standard normal: give a network the same, and both can be compared
    prediction: str = "noise",  # what the loss is measured on: "noise", "x0" or "v"
    y: Tensor | None = None,  # (n,) classes
) -> Tensor:  # (n,) mean squared error of each point
    """The loss that no network can beat: mmse for x0, SNR·mmse for noise, mmse / noise_rate² for v."""
    factors = {
        "x0": lambda t: torch.ones((), dtype=torch.float64),
        "noise": schedule.snr,
        "v": lambda t: schedule.noise_rate(t) ** -2,
    }
    if prediction not in factors:
        raise ValueError(f"prediction must be one of {', '.join(factors)}; got {prediction!r}")
    times = schedule.check_times(t)
    xt = ForwardProcess(schedule).q_sample(x0, times, noise)
    estimate = denoiser(xt, times) if y is None else denoiser(xt, times, y)
    mmse = (estimate - x0).square().flatten(1).mean(1)
    return factors[prediction](times).to(mmse) * mmse
