"""What `graft activations` found: rows of a table, sentences, and a self-contained page with heat maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grafting.formats.weights import write_bytes
from grafting.report.format import MISSING, mapping, percent, sequence, significant
from grafting.report.heatmap import heat_map
from grafting.report.html import Child, Column, Html, data_table, document, el, figure, note, section
from grafting.report.locality import protocol_words
from grafting.report.page import environment_table
from grafting.report.style import CSS
from grafting.report.words import TARGETS

Found = Mapping[str, Any]
_STATISTICS = ("variance", "kurtosis", "channel_kurtosis", "max_abs", "q999")


def activation_rows(found: Found) -> list[dict[str, Any]]:
    """Per operator, what its output is like, how its input differs, and the loss that follows."""
    rows = []
    for site in sequence(found["sites"]):
        output, given, top = site["output"], site["input"], sequence(site["output"]["channels"])
        rows.append({
            "layer": site["layer"], "target": site["target"], "operator": site["operator"],
            **{name: output[name] for name in _STATISTICS},
            "top channel": f"{top[0]['channel']} ({100 * top[0]['share']:.1f}%)" if top else None,
            "input variance": given["variance"], "input kurtosis": given["kurtosis"], "input max_abs": given["max_abs"],
            "efficiency": output["median_efficiency"], "loss": site["loss"],
        })  # fmt: skip
    return rows


def activation_remarks(found: Found) -> list[str]:
    """One sentence a target: the recommended loss and why."""
    return [
        f"{target}: {choice['loss']}, since {choice['reason']}."
        for target, choice in found["recommended"].items()
    ]


def write_activations(path: str | Path, found: Found) -> Path:
    """Write what `measure_activations` returned as one HTML page; returns its path. Raises CheckpointError."""
    model = found.get("model")
    page = document(
        "Activations – graft", CSS,
        el("header", el("p", "Analysis", class_="kind"),
           el("h1", f"Activations of {model}" if model else "Activations"), _choices(found)),
        [_target(found, target) for target in found["recommended"]],
        section("provenance", "How it was measured", el("p", protocol_words(mapping(found.get("protocol")))),
                environment_table(found.get("environment"))),
    )  # fmt: skip
    path = Path(path)
    write_bytes(path, page.encode("utf-8"))
    return path


def _choices(found: Found) -> Html:
    items = [
        el("li", f"{_name(target)}: {choice['loss'].upper()}, since {choice['reason']}.")
        for target, choice in found["recommended"].items()
    ]
    lead = "Which regression loss the outputs of each kind of operator ask for in stage 1."
    return el("div", el("p", lead, class_="lead"), el("ul", items, class_="findings"))


def _name(target: str) -> str:
    name = TARGETS.get(target, target)
    return name[:1].upper() + name[1:]


def _target(found: Found, target: str) -> Html:
    sites = [site for site in sequence(found["sites"]) if site["target"] == target]
    layers = [str(site["layer"]) for site in sites]
    bins = [str(first) for first, _ in sequence(found["timestep_bins"])]
    maps = []
    for key, log in (("variance", True), ("kurtosis", False)):
        for side in ("input", "output"):
            values = [sequence(site[side]["timesteps"][key]) for site in sites]
            label = "Variance" if key == "variance" else "Excess kurtosis"
            caption = f"{label} of the {side} by layer and timestep{', logarithmic colour' if log else ''}."
            maps.append(_map(values, layers, bins, caption, log))
    columns = [Column("layer"), Column("operator", True), *[Column(n.replace("_", " ")) for n in _STATISTICS]]
    columns += [
        Column("channels of most energy", True),
        Column("efficiency of the median"),
        Column("loss", True),
    ]
    return section(
        target, _name(target),
        data_table("Outputs, before the gate.", columns, [_row(site, "output") for site in sites]),
        data_table("Inputs.", columns[:-2], [_row(site, "input")[:-2] for site in sites]),
        note("Kurtosis is excess: 0 for a normal distribution. Channel kurtosis is the median over channels, max abs "
             "the largest absolute value, q999 the 99.9 % quantile of absolute values."),
        el("div", maps, class_="plots"),
    )  # fmt: skip


def _row(site: Mapping[str, Any], side: str) -> list[Child]:
    found = site[side]
    top = ", ".join(f"{c['channel']} ({percent(c['share'], 2)})" for c in sequence(found["channels"])[:3])
    return [
        site["layer"], site["operator"], *[significant(found[name], 3) for name in _STATISTICS], top or MISSING,
        significant(found["median_efficiency"], 3), site["loss"].upper(),
    ]  # fmt: skip


def _map(values: Sequence[Any], rows: list[str], columns: list[str], caption: str, log: bool) -> Html:
    drawn = heat_map(
        values, caption, rows=rows, columns=columns, row_label="layer", column_label="timestep, from", log=log,
        low=None if log else 0.0,
    )  # fmt: skip
    return figure(drawn, caption) if drawn is not None else note(f"{caption} Nothing to draw.")
