"""Put what `pixart-emoji` needs into the package: its weights, and encoded captions.

    python scripts/build_emoji_assets.py weights --pretrained FOLDER
    python scripts/build_emoji_assets.py captions --data FOLDER [--num 1000]

`weights` takes what scripts/pretrain_pixart_emoji.py left: `transformer/` and `pretraining.json`, or of a pretraining
that still runs the averaged weights of its last checkpoint. `captions` takes what scripts/build_emoji_captions.py made:
`--num` names that were trained on, and all that were not; without skin tones, which would make most of them people.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from grafting.data import text
from grafting.evaluation.emoji_classifier import GROUPS
from grafting.formats import weights

ASSETS = Path(__file__).resolve().parents[1] / "src" / "grafting" / "assets" / "pixart-emoji"
_FILES = ("config.json", "diffusion_pytorch_model.safetensors")


def build_weights(pretrained: Path) -> None:
    ASSETS.mkdir(parents=True, exist_ok=True)
    finished = pretrained / "pretraining.json"
    if not finished.is_file():
        state = torch.load(pretrained / "checkpoint.pt", map_location="cpu", weights_only=True)
        print(f"the pretraining is not done: the average of step {state['step']}")
        export(state)
        return
    for name in _FILES:
        shutil.copyfile(pretrained / "transformer" / name, ASSETS / name)
    shutil.copyfile(finished, ASSETS / "pretraining.json")


def export(state: dict[str, Any]) -> None:
    """The averaged weights of a checkpoint in diffusers' layout, in fp16."""
    from diffusers import PixArtTransformer2DModel

    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from pretrain_pixart_emoji import ARCHITECTURE

    model: Any = PixArtTransformer2DModel(**ARCHITECTURE)
    model.load_state_dict({**state["model"], **state["ema"]})
    model.half().save_pretrained(ASSETS)
    weights.write_json(
        ASSETS / "pretraining.json", {"image_visits": 64 * state["step"], "steps": state["step"]}
    )


def build_captions(data: Path, num: int) -> None:
    texts: dict[str, Any] = {"encoder": "all-MiniLM-L6-v2", "groups": list(GROUPS)}
    tensors, tokens = {}, 0
    for part, most in (("train", num), ("held-out", None)):
        captions = text.CaptionDataset(data / part)
        names = json.loads((data / part / "groups.json").read_text(encoding="utf-8"))["groups"]
        chosen, rows = interleaved(captions.captions, [GROUPS.index(name) for name in names], most)
        cond = captions.conditions(chosen)
        packed = text.pack_captions(cond.embeds, cond.mask)
        tensors |= {f"{part}.embeds": packed["embeds"], f"{part}.offsets": packed["offsets"]}
        texts[part] = {
            "captions": [captions.captions[i] for i in chosen],
            "groups": [GROUPS.index(names[i]) for i in chosen], "rows": rows,
        }  # fmt: skip
        tensors["null.embeds"] = cond.null_embeds[0, : int(cond.null_mask[0].sum())].clone()
        tokens = max(tokens, captions.num_tokens)
    weights.write_safetensors(ASSETS / "captions.safetensors", tensors)
    weights.write_json(ASSETS / "captions.json", {**texts, "num_tokens": tokens})


def interleaved(captions: list[str], groups: list[int], most: int | None) -> tuple[list[int], list[int]]:
    """(which captions are kept, the order of prompts as positions among them).

    Round the groups: first the first of each, then the second. With `most`, each caption once and no more than that;
    without, the names of small groups come again until the largest is through.
    """
    plain = [i for i, caption in enumerate(captions) if "skin tone" not in caption]
    by_group = [[i for i in plain if groups[i] == group] for group in range(len(GROUPS))]
    # Spread over a group, whose names are sorted by meaning.
    spread = [[held[(k * 7919) % len(held)] for k in range(len(held))] for held in by_group]
    order = []
    for k in range(max(map(len, spread))):
        order += [held[k % len(held)] for held in spread if k < len(held) or most is None]
    order = order[:most]
    kept = sorted(set(order))
    return kept, [kept.index(i) for i in order]


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the packaged files of pixart-emoji.")
    parser.add_argument("what", choices=["weights", "captions"])
    parser.add_argument("--pretrained", type=Path, help="folder of scripts/pretrain_pixart_emoji.py")
    parser.add_argument("--data", type=Path, help="folder of scripts/build_emoji_captions.py")
    parser.add_argument("--num", type=int, default=1000, help="training names to ship")
    arguments = parser.parse_args()
    if arguments.what == "weights":
        build_weights(arguments.pretrained)
    else:
        build_captions(arguments.data, arguments.num)
    for path in sorted(ASSETS.iterdir()):
        path.chmod(0o644)
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
