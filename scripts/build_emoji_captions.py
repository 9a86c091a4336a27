"""Make the training set of `pixart-emoji`: Noto emoji as 32x32 images, their names as encoded captions.

    python scripts/build_emoji_captions.py --emoji FOLDER --encoder FOLDER --out FOLDER

--emoji is the unpacked npm package emoji-datasource-google (images: Noto Emoji, Apache-2.0; names and groups: MIT),
--encoder a folder with all-MiniLM-L6-v2 in transformers' layout (Apache-2.0). Two caption datasets come out, `train`
and `held-out`: a tenth of the names, with all their skin tones, is never trained on. Each has a `groups.json` beside
its captions: the emoji's group (one of nine) by row.
"""

from __future__ import annotations

import argparse
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grafting.data import text
from grafting.formats import weights

SIDE = 32
TONES = {"1F3FB": "light", "1F3FD": "medium", "1F3FF": "dark"}  # of five; else most images would be people
SHARD = 512


@dataclass(frozen=True)
class Emoji:
    """One image and what it is called."""

    file: Path
    caption: str
    group: str
    held_out: bool


def read_emoji(package: Path) -> list[Emoji]:
    """All emoji that the set has an image of, in the order of the data file."""
    images = package / "img" / "google" / "64"
    found = []
    for entry in json.loads((package / "emoji.json").read_text(encoding="utf-8")):
        if entry["category"] == "Component":
            continue
        name = (entry["name"] or entry["short_name"].replace("_", " ").replace("-", " ")).lower()
        held_out = zlib.crc32(name.encode()) % 10 == 0
        if entry["has_img_google"]:
            found.append(Emoji(images / entry["image"], name, entry["category"], held_out))
        for tones, variation in entry.get("skin_variations", {}).items():
            if tones not in TONES or not variation["has_img_google"]:
                continue
            caption = f"{name}, {TONES[tones]} skin tone"
            found.append(Emoji(images / variation["image"], caption, entry["category"], held_out))
    return [emoji for emoji in found if emoji.file.is_file()]


def read_image(path: Path) -> Tensor:
    """[3, 32, 32] in [-1, 1], on white."""
    from PIL import Image

    image = Image.open(path).convert("RGBA")
    page = Image.new("RGBA", image.size, "white")
    small = Image.alpha_composite(page, image).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(small, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1)


class Encoder:
    """Per-token embeddings of MiniLM."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """embeds [n, T, 384] in fp16, mask [n, T]."""
        tokens = self.tokenizer(captions, padding=True, return_tensors="pt")
        embeds = self.model(**tokens).last_hidden_state
        return embeds.half(), tokens["attention_mask"].to(torch.uint8)


def write(emoji: list[Emoji], encoder: Encoder, out: Path) -> None:
    """A caption dataset of these emoji."""
    captions = [item.caption for item in emoji]
    lengths, files = [1], {}
    null_embeds, null_mask = encoder([""])
    tensors: dict[str, Any] = {"embeds": null_embeds[0], "mask": null_mask[0]}
    weights.write_safetensors(out / "null.safetensors", tensors)
    for shard, start in enumerate(range(0, len(emoji), SHARD)):
        part = emoji[start : start + SHARD]
        embeds, mask = encoder([item.caption for item in part])
        lengths.append(int(mask.sum(1).max()))
        weights.write_safetensors(out / text.text_file(shard), text.pack_captions(embeds, mask))
        x = torch.stack([read_image(item.file) for item in part])
        weights.write_safetensors(out / text.latents_file(shard), {"x": x})
    lines = "".join(json.dumps({"caption": caption}) + "\n" for caption in captions)
    weights.write_bytes(out / "captions.jsonl", lines.encode())
    weights.write_json(out / "groups.json", {"groups": [item.group for item in emoji]})
    for path in [*sorted(out.glob("*.safetensors")), out / "captions.jsonl"]:
        files[path.name] = text.file_digest(path)
    tokens = max(max(lengths), len(null_mask[0]))
    weights.write_json(out / text.MANIFEST, {
        "format": text.FORMAT, "version": text.VERSION, "num": len(emoji), "shape": [3, SIDE, SIDE],
        "caption_width": embeds.shape[-1], "num_tokens": tokens, "files": files, "complete": True,
        "protocol": {"what": "Noto emoji on white and their names", "encoder": "all-MiniLM-L6-v2", "shard_size": SHARD},
    })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--emoji", type=Path, required=True, help="unpacked package of images and names")
    parser.add_argument("--encoder", type=Path, required=True, help="folder of the text encoder")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    emoji, encoder = read_emoji(arguments.emoji), Encoder(arguments.encoder)
    for name, held_out in (("train", False), ("held-out", True)):
        part = [item for item in emoji if item.held_out is held_out]
        write(part, encoder, arguments.out / name)
        groups = {
            group: sum(item.group == group for item in part) for group in sorted({i.group for i in part})
        }
        print(name, len(part), groups)


if __name__ == "__main__":
    main()
