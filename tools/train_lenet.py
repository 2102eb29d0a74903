"""Train the LeNet that judges digits, once; write diffusion_book/weights/lenet.safetensors and its card.

    python tools/train_lenet.py [--epochs 15] [--seed 0] [--folder diffusion_book/weights]

Takes MNIST from the data folder (DIFFUSION_BOOK_DATA), or downloads it. Every score of the book is relative to these
weights: the tool refuses to replace them unless it is told to (--replace).
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from frozen import freeze, options
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from tqdm.auto import tqdm

from diffusion_book.core import RandomStreams
from diffusion_book.data import load
from diffusion_book.lenet import LeNet5
from diffusion_book.train import train_steps

VALIDATION, BATCH, RATE, SHIFT = 6_000, 128, 2e-3, 2


def digits(split: str) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 28, 28) uint8 and labels (n,) int64 of MNIST, "train" or "test"."""
    data = load("mnist", split)
    return data.images, data.labels


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image moved by up to SHIFT pixels each way, black where nothing was."""
    n, _, height, width = images.shape
    moves = torch.randint(0, 2 * SHIFT + 1, (2, n), generator=generator)
    rows, columns = moves[0, :, None] + torch.arange(height), moves[1, :, None] + torch.arange(width)
    padded = pad(images, (SHIFT,) * 4)[:, 0]
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]][:, None]


def batches(images: Tensor, labels: Tensor, epochs: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled, shifted batches in [0, 1], the short last one of an epoch left out."""
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: len(order) // BATCH * BATCH].split(BATCH):
            yield shifted(images[rows], generator).float() / 255, labels[rows]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images that the network names rightly."""
    right = [
        (model(x.float() / 255).argmax(1) == y) for x, y in zip(images.split(1000), labels.split(1000), strict=True)
    ]
    return float(torch.cat(right).double().mean())


def train(epochs: int, seed: int) -> tuple[LeNet5, dict[str, float]]:
    """The weights of the epoch with the best validation accuracy, and how that epoch scored."""
    streams = RandomStreams(seed)
    images, labels = digits("train")
    order = torch.randperm(len(images), generator=streams.data)
    held, kept = order[:VALIDATION], order[VALIDATION:]
    model = LeNet5(generator=streams.initialisation)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    per_epoch = len(kept) // BATCH
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    feed = batches(images[kept], labels[kept], epochs, streams.data)
    steps = train_steps(model, lambda net, b: cross_entropy(net(b[0]), b[1]), feed, optimizer, scheduler=scheduler)
    best, chosen = {"validation_accuracy": -1.0}, model.state_dict()
    for step in tqdm(steps, total=epochs * per_epoch, mininterval=5):
        if step.step % per_epoch == 0:
            score = accuracy(model, images[held], labels[held])
            tqdm.write(f"epoch {step.step // per_epoch}: validation accuracy {score:.4f}")
            if score > best["validation_accuracy"]:
                best = {"validation_accuracy": score, "epoch": step.step // per_epoch}
                chosen = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(chosen)
    return model, best


def main() -> None:
    given = options(__doc__, "lenet", epochs=15)
    torch.set_num_threads(1)  # the same sums in the same order, whatever the machine
    started = time.perf_counter()
    model, best = train(given.epochs, given.seed)
    seconds = time.perf_counter() - started
    config = {"split": "54,000 / 6,000", "batch_size": BATCH, "optimizer": "Adam", "learning_rate": RATE,
              "learning_rate_schedule": "cosine to zero", "epochs": given.epochs, "augmentation":
              f"shifts of up to {SHIFT} pixels", "selection": "the epoch with the best validation accuracy"}  # fmt: skip
    card = {
        "name": "lenet",
        "command": f"python tools/train_lenet.py --epochs {given.epochs} --seed {given.seed}",
        "parameters": sum(p.numel() for p in model.parameters()),
        **best,
        "test_accuracy": accuracy(model, *digits("test")),  # looked at once, after everything was chosen
        "seed": given.seed,
        "config": config,
        "seconds": round(seconds, 1),
    }
    freeze(given.target, model.state_dict(), card)


if __name__ == "__main__":
    main()
