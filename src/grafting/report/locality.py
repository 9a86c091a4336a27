"""What `graft locality` found: a sentence, rows of a table, and a self-contained page with heat maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grafting.formats.weights import write_bytes
from grafting.report.format import count, finite, mapping, ranges, sequence, significant
from grafting.report.heatmap import heat_map
from grafting.report.html import Child, Column, Html, data_table, document, el, figure, note, section
from grafting.report.page import environment_table
from grafting.report.plots import Series, legend, line_plot, ramp
from grafting.report.style import CSS

LOCAL = 0.5
"""A layer is called local where more than this share of its attention is in the band, as the paper counts."""

Found = Mapping[str, Any]


def locality_rows(found: Found) -> list[dict[str, Any]]:
    """Per measured layer: L_k for every width, and the least and most local head at the first."""
    bands = sequence(found["bands"])
    rows = []
    for layer, heads in enumerate(bands[0]["heads"]):
        if heads is None:
            continue
        row: dict[str, Any] = {"layer": layer}
        row |= {f"k={band['k']}": band["layers"][layer] for band in bands}
        rows.append(row | {"least local head": min(heads), "most local head": max(heads)})
    return rows


def locality_remarks(found: Found) -> list[str]:
    """Sentences: which layers are local, what a uniform map would have, what was not measured."""
    band = found["bands"][0]
    known = [value for value in band["layers"] if value is not None]
    local = [layer for layer, value in enumerate(band["layers"]) if value is not None and value > LOCAL]
    named = f": {ranges(local)}" if local else ""
    return [
        f"{len(local)} of {len(known)} measured layers keep over half of their attention within k={band['k']} of "
        f"{found['num_tokens']} tokens{named}; a map that attends to all tokens alike would keep "
        f"{significant(band['uniform'], 3)}.",
        *(f"Layer {site['layer']} was not measured: {site['reason']}." for site in found["skipped"]),
    ]


def protocol_words(protocol: Mapping[str, Any]) -> str:
    """How it was measured, in one sentence."""
    samples = f"{count(protocol.get('num_samples'))} samples"
    if protocol.get("along") == "noised data":
        data, seed = protocol.get("data"), protocol.get("seed")
        return f"Over {samples} of {data}, each noised to a uniform timestep; seed {seed}."
    both = " (both halves of the guided batch)" if finite(protocol.get("guidance")) != 1.0 else ""
    return (
        f"Along the sampling of {samples} in {protocol.get('steps')} {protocol.get('sampler')} steps with guidance "
        f"{protocol.get('guidance')}{both}; seed {protocol.get('seed')}."
    )


def write_locality(path: str | Path, found: Found) -> Path:
    """Write what `measure_locality` returned as one HTML page; returns its path. Raises CheckpointError."""
    remarks = locality_remarks(found)
    model = found.get("model")
    page = document(
        "Locality – graft", CSS,
        el("header", el("p", "Analysis", class_="kind"), el("h1", f"Locality of {model}" if model else "Locality"),
           el("p", remarks[0], class_="lead"), [el("p", text, class_="warn") for text in remarks[1:]]),
        _layers(found), _maps(found), _provenance(found),
    )  # fmt: skip
    path = Path(path)
    write_bytes(path, page.encode("utf-8"))
    return path


def _layers(found: Found) -> Html:
    bands = sequence(found["bands"])
    lines = []
    for number, band in enumerate(bands):
        known = [(layer, value) for layer, value in enumerate(band["layers"]) if value is not None]
        label = f"k={band['k']} (uniform map: {significant(band['uniform'], 2)})"
        lines.append(
            Series(label, [a for a, _ in known], [b for _, b in known], ramp(number, len(bands)), dots=True)
        )
    described = "; ".join(f"layer {layer}: {significant(value, 3)}" for layer, value in enumerate(bands[0]["layers"])
                          if value is not None)  # fmt: skip
    plot = line_plot(
        lines, f"Locality by layer at k={bands[0]['k']}. {described}", x_label="layer", y_label="share"
    )
    rows = locality_rows(found)
    columns = [Column(name) for name in rows[0]]
    body: list[list[Child]] = [
        [row["layer"], *[significant(v, 3) for v in list(row.values())[1:]]] for row in rows
    ]
    return section(
        "layers", "By layer",
        el("p", "The share of a token's attention that goes to tokens at most k away in raster order: ",
           "L_k = 1/N Σ A_ij [|i − j| ≤ k], the mean over heads, samples and timesteps."),
        figure([plot, legend(lines)], "Locality by layer, one line a band width."),
        data_table("Locality by layer; heads at the first k.", columns, body),
    )  # fmt: skip


def _maps(found: Found) -> Html:
    bins = [f"{first}–{last}" if len(found["timestep_bins"]) <= 8 else str(first)
            for first, last in sequence(found["timestep_bins"])]  # fmt: skip
    heads = [str(head) for head in range(int(found["num_heads"]))]
    parts: list[Child] = []
    for band in sequence(found["bands"]):
        layers = [str(layer) for layer in range(len(band["layers"]))]
        k = band["k"]
        parts += [
            el("h3", f"k = {k}"),
            el("div", [
                _map(band["heads"], layers, heads, "head", f"Locality at k={k} by layer and head."),
                _map(band["timesteps"], layers, bins, "timestep, from",
                     f"Locality at k={k} by layer and timestep, mean over heads."),
            ], class_="plots"),
        ]  # fmt: skip
    return section(
        "maps", "By head and by timestep",
        el("p", "Colour runs from 0 to 1. Timestep 999 is noise, 0 the image. An empty cell was not visited."), parts,
    )  # fmt: skip


def _map(values: Sequence[Any], rows: list[str], columns: list[str], label: str, caption: str) -> Html:
    drawn = heat_map(
        values, caption, rows=rows, columns=columns, row_label="layer", column_label=label, low=0.0, high=1.0,
        show=lambda value: f"{value:.2f}".lstrip("0") if value < 0.995 else "1",
    )  # fmt: skip
    return figure(drawn, caption) if drawn is not None else note(f"{caption} Nothing was measured.")


def _provenance(found: Found) -> Html:
    return section(
        "provenance", "How it was measured",
        el("p", protocol_words(mapping(found.get("protocol")))),
        environment_table(found.get("environment")),
    )  # fmt: skip
