"""What the tests of encoding share: a tiny VAE in diffusers' layout, and generated images."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch

CLASSES = ("ant", "bee", "cow")


def save_vae(folder: Path, seed: int = 0, scaling: float = 0.5) -> Path:
    """A random AutoencoderKL of 15k parameters that shrinks by 2."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, norm_num_groups=4,
            scaling_factor=scaling,
        )  # fmt: skip
        for parameter in vae.quant_conv.parameters():  # a posterior with some width
            torch.nn.init.normal_(parameter, std=0.5)
    vae.save_pretrained(folder)
    return folder


def pixels(number: int, width: int = 24, height: int = 20) -> np.ndarray:
    """A smooth RGB image uint8 [height, width, 3] that differs by number."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x * (0.2 + 0.05 * number) + k) + np.cos(y * (0.3 + 0.03 * number) - k) for k in range(3)]
    return ((np.stack(waves, axis=-1) + 2) * 63).astype(np.uint8)


def image_bytes(number: int, kind: str = "PNG", width: int = 24, height: int = 20) -> bytes:
    """The same as a file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels(number, width, height)).save(buffer, kind)
    return buffer.getvalue()


def save_images(root: Path, per_class: int = 4) -> Path:
    """A folder of class folders."""
    endings = (("PNG", ".png"), ("JPEG", ".JPEG"), ("WEBP", ".webp"))
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            kind, ending = endings[number % 3]
            (root / name / f"{number:03d}{ending}").write_bytes(image_bytes(label * per_class + number, kind))
    return root


class Killer:
    """A folder of images in which reading image `at` kills the process."""

    def __init__(self, root: Path, at: int) -> None:
        from grafting.data.images import ImageFolder

        self._folder, self._at = ImageFolder(root), at
        self.kind, self.name = self._folder.kind, self._folder.name
        self.labels, self.class_names = self._folder.labels, self._folder.class_names
        self.fingerprint = self._folder.fingerprint

    def __len__(self) -> int:
        return len(self._folder)

    def path(self, index: int) -> str:
        return self._folder.path(index)

    def read(self, index: int) -> object:
        if index == self._at:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._folder.read(index)


def make_world(root: Path) -> Path:
    """vae/, images/ (twelve in three classes, number 5 cut short), and whole/: their latents."""
    from grafting.data import encode_images

    save_vae(root / "vae")
    damaged = save_images(root / "images") / "bee" / "001.JPEG"
    damaged.write_bytes(damaged.read_bytes()[:300])
    encode_images(root / "images", root / "whole", config(root))
    return root


def config(root: Path, **changes: Any) -> Any:
    """Settings for that VAE: three shards."""
    from grafting.data import EncodeConfig

    given = {"vae": str(root / "vae"), "size": 16, "shard_size": 5, "batch_size": 4, "flip": True, **changes}
    return EncodeConfig(**given)


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    found = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if path.is_file()}
