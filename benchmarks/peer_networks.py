"""The networks of other packages, at the size of our MNIST U-Net."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import nn

SIZE = 28  # pixels a side


def diffusers_network() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        block_out_channels=(12, 24, 68),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        attention_head_dim=17,  # four heads in the middle, as ours has
    )


def _stand_in(name: str, **content: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__dict__.update(content)
    sys.modules[name] = module


def _without_torchvision() -> None:
    """Empty modules where the package imports what it needs for files and for FID only."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        for name in ("torchvision.transforms", "torchvision.utils"):
            _stand_in(name)
        _stand_in("torchvision", **{k: sys.modules[f"torchvision.{k}"] for k in ("transforms", "utils")})


def lucidrains_network(timesteps: int, steps: int) -> tuple[nn.Module, nn.Module]:
    """The U-Net, and the diffusion around it."""
    import diffusers  # noqa: F401  (looks for torchvision when it is imported: before the stand-in is there)

    _without_torchvision()
    from denoising_diffusion_pytorch.denoising_diffusion_pytorch import GaussianDiffusion, Unet

    network = Unet(dim=12, dim_mults=(1, 2, 6), channels=1, attn_heads=4, attn_dim_head=8)
    whole = GaussianDiffusion(
        network,
        image_size=SIZE,
        timesteps=timesteps,
        sampling_timesteps=steps,
        beta_schedule="cosine",
        objective="pred_v",
    )
    return network, whole
