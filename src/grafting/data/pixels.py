"""From the bytes of an image file to the square uint8 pixels that a VAE is given.

The crop is the one that ADM and DiT were trained with (guided-diffusion's data loader): with m = min(width, height),
halve both sides (rounded down) by a box filter while m >= 2 size; resize to round(side * size / m) by a bicubic
filter; cut the central size x size, offsets rounded down. No rotation by EXIF.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

FORMATS = ("JPEG", "PNG", "WEBP")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
MAX_FILE_BYTES = 64 << 20
MAX_PIXELS = 100_000_000  # of an image as stored, and on its way to the crop


@dataclass(frozen=True)
class Skipped:
    """Why an image was left out."""

    reason: str


def center_crop(image: PILImage, size: int) -> PILImage:
    """The central `size` x `size` pixels of `image`, its shorter side scaled to `size` (ADM's way)."""
    from PIL.Image import Resampling

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def decode_image(content: bytes, size: int) -> np.ndarray | Skipped:
    """Decode a JPEG, PNG or WebP file to uint8 [size, size, 3] (RGB, cropped), or say why it can't be.

    A file that claims more than `MAX_PIXELS` pixels, or whose shape would need them on the way to the crop, is
    refused by its header, before it is decoded.
    """
    from PIL import Image

    if not content:
        return Skipped("the file is empty")
    if len(content) > MAX_FILE_BYTES:
        return Skipped(f"the file has {len(content)} bytes, the limit is {MAX_FILE_BYTES}")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            longest, shortest = max(image.size), min(image.size)
            if shortest < 1:
                return Skipped(f"the image has {width} x {height} pixels")
            scaled = longest * size / shortest * size  # pixels after the shorter side has become `size`
            if width * height > MAX_PIXELS or scaled > MAX_PIXELS:
                return Skipped(
                    f"{width} x {height} pixels are more than the limit of {MAX_PIXELS} at size {size}"
                )
            return np.array(center_crop(image.convert("RGB"), size))
    except Image.DecompressionBombError:
        return Skipped(f"the image claims more pixels than the limit of {MAX_PIXELS}")
    except Image.UnidentifiedImageError:
        return Skipped("not a JPEG, PNG or WebP image, or its header is damaged")
    except MemoryError:
        raise
    except (
        Exception
    ) as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error...
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return Skipped(f"can't be decoded: {reason}")


@contextmanager
def quiet_decoding() -> Iterator[None]:
    """Silence Pillow's warnings about odd files: what can't be read is reported by `decode_image`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        from PIL.Image import DecompressionBombWarning

        warnings.simplefilter("ignore", DecompressionBombWarning)
        yield


def preprocessing(size: int) -> dict[str, object]:
    """What was done to the pixels, for a manifest."""
    return {"size": size, "crop": "adm-center", "range": "uint8 / 127.5 - 1", "color": "RGB"}
