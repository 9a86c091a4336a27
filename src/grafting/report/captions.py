"""The quality page of synthetic pairs: what came out, with its prompt beneath, and the numbers of the latents."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from grafting.data.text import CaptionDataset
from grafting.families.codec import decoder
from grafting.formats.weights import write_bytes
from grafting.report.html import Column, data_table, document, el, figure, section
from grafting.report.images import strip
from grafting.report.style import CSS

NUM_SHOWN = 48
_GRID = """
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem; }
.pairs figure { margin: 0; } .pairs img { width: 100%; height: auto; image-rendering: auto; }
.pairs figcaption { overflow-wrap: anywhere; font-size: .85rem; }
"""


def write_quality_page(data: CaptionDataset, model: nn.Module, path: Path, pipeline: Path | None) -> None:
    """Decode a spread of the latents and write the page."""
    shown = torch.linspace(0, len(data) - 1, min(NUM_SHOWN, len(data))).round().long().unique()
    vae = str(pipeline / "vae") if pipeline and (pipeline / "vae").is_dir() else None
    decode = decoder(model, vae, next(model.parameters()).device)
    figures, means, deviations = [], [], []
    for row in shown.tolist():
        x, _ = data.batch([row])
        means.append(x.mean(dim=(0, 2, 3)))
        deviations.append(x.std(dim=(0, 2, 3)))
        uri, width, height = strip(decode(x))
        image = el("img", src=uri, width=width, height=height, alt=f"sample {row}")
        figures.append(figure(image, data.captions[row]))
    mean, deviation = torch.stack(means).mean(dim=0), torch.stack(deviations).mean(dim=0)
    flat = sum(bool((deviation_of < 0.05).all()) for deviation_of in deviations)
    numbers = data_table(
        "Latents of the pairs shown, per channel",
        [Column("channel", text=True), Column("mean"), Column("deviation within an image")],
        [[str(c), f"{mean[c]:.3f}", f"{deviation[c]:.3f}"] for c in range(len(mean))],
    )
    facts = data_table(
        "How they were made", [Column("what", text=True), Column("value", text=True)],
        [[key, str(value)] for key, value in data.protocol.items()],
    )  # fmt: skip
    words = (
        f"{len(data):,} pairs of {data.shape[0]}x{data.shape[1]}x{data.shape[2]} latents, "
        f"{len(set(data.captions)):,} different prompts; {len(figures)} pairs are shown, evenly spread. "
        f"{flat} of them are flat (deviation below 0.05 in every channel)."
    )
    page = document(
        f"Synthetic pairs: {data.name}", CSS + _GRID, el("h1", f"Synthetic pairs: {data.name}"), el("p", words),
        section("pairs", "What came out", el("div", figures, class_="pairs")),
        section("numbers", "Numbers", numbers, facts),
    )  # fmt: skip
    write_bytes(path, page.encode())
