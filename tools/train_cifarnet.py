"""Train the classifier that judges small colour pictures, once; write diffusion_book/weights/cifarnet.safetensors and its card.

    python tools/train_cifarnet.py [--epochs 12] [--seed 0] [--folder diffusion_book/weights]

Takes CIFAR-10 from the data folder (DIFFUSION_BOOK_DATA), or downloads it: the training images teach, the test images
are looked at once, after everything was chosen. The weights are frozen: the tool refuses to replace them unless it is
told to (--replace).
"""

from __future__ import annotations

import time

import torch
from frozen import freeze, options
from torch import Tensor
from torch.nn.functional import pad
from train_flowernet import SMOOTHING, accuracy, train

from diffusion_book.cifarnet import CifarNet
from diffusion_book.data import flip, load

EPOCHS, BATCH, RATE, DECAY, SHIFT = 12, 128, 4e-3, 0.05, 3


def moved(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrored or not, and moved by at most SHIFT whole pixels each way; what comes in is the image mirrored at its border."""
    side = torch.arange(pixels.shape[-1])
    rows, columns = (torch.randint(2 * SHIFT + 1, (len(pixels), 1), generator=generator) + side for _ in range(2))
    wide = pad(flip(pixels, generator).float(), (SHIFT,) * 4, mode="reflect").permute(0, 2, 3, 1)
    image = torch.arange(len(pixels))[:, None, None]
    return wide[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def main() -> None:
    given = options(__doc__, "cifarnet", epochs=EPOCHS)
    torch.set_num_threads(1)
    started = time.perf_counter()
    images, test = load("cifar10", "train"), load("cifar10", "test")
    model = train(
        images, given.epochs, given.seed, network=CifarNet, augment=moved, batch_size=BATCH, rate=RATE, decay=DECAY
    )
    seconds = time.perf_counter() - started
    halves = {name: value.clone() for name, value in model.half().state_dict().items()}
    model.float()  # judged as it is shipped: rounded to half precision
    config = {"split": "the official one", "batch_size": BATCH, "optimizer": "AdamW", "learning_rate": RATE,
              "weight_decay": DECAY, "learning_rate_schedule": "one cycle", "epochs": given.epochs,
              "label_smoothing": SMOOTHING, "augmentation": f"mirrored, moved by at most {SHIFT} pixels",
              "precision": "bfloat16 in training, stored in float16", "selection": "the last epoch"}  # fmt: skip
    card = {
        "name": "cifarnet",
        "command": f"python tools/train_cifarnet.py --epochs {given.epochs} --seed {given.seed}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_images": len(images),
        "training_accuracy": accuracy(model, images)[0],
        "test_images": len(test),
        "test_accuracy": accuracy(model, test)[0],  # looked at once, after everything was chosen
        "seed": given.seed,
        "config": config,
        "seconds": round(seconds, 1),
    }
    freeze(given.target, halves, card)


if __name__ == "__main__":
    main()
