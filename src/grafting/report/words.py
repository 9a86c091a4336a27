"""What a run did, in words and figures: the edits in one sentence, names of measures, the cost of the edit."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grafting.report.format import finite, mapping, pair, ranges, sequence
from grafting.report.reading import RunRecord

TARGETS = {"mha": "attention", "mlp": "MLP", "block_group": "groups of blocks", "block": "blocks"}
MEASURES = {
    "fd": ("Fréchet distance", False),
    "fid": ("FID", False),
    "sfid": ("sFID", False),
    "is": ("inception-style score", True),
    "precision": ("precision", True),
    "recall": ("recall", True),
    "label_accuracy": ("label accuracy", True),
    "alignment": ("prompt alignment", True),
}
HEADLINE_MEASURES = ("alignment", "fid", "fd", "sfid")
STAGE_NAMES = {"distill": "stage 1, distillation", "finetune": "stage 2, finetuning"}


@dataclass(frozen=True)
class Swap:
    """All edits that put one operator with one configuration in the place of one target."""

    target: str
    old: str
    new: str
    config: Mapping[str, Any]
    edits: tuple[Mapping[str, Any], ...]

    @property
    def layers(self) -> list[int]:
        """Numbers of the blocks; a group of blocks has several."""
        held = [sequence(edit.get("layers")) or [edit.get("layer")] for edit in self.edits]
        return [layer for layers in held for layer in layers if isinstance(layer, int)]

    @property
    def label(self) -> str:
        """The operator with its configuration: mlp (ratio 3)."""
        return operator_label(self.new, self.config)

    @property
    def became(self) -> str:
        """What became what: attention → hyena_x."""
        return arrow(TARGETS.get(self.target, self.target), self.label)


def operator_label(name: str, config: Mapping[str, Any]) -> str:
    """An operator's name with what its configuration says."""
    settings = ", ".join(f"{key} {plain(value)}" for key, value in config.items())
    return f"{name} ({settings})" if settings else name


def arrow(before: str, after: str) -> str:
    """Before and after on one line."""
    return f"{before}\u00a0→\u00a0{after}"


def plain(value: Any) -> str:
    """A value as short text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def swaps(edits: Sequence[Mapping[str, Any]]) -> list[Swap]:
    """Edits put together by target, old and new operator, and configuration, in the order of the first."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for edit in edits:
        key = json.dumps(
            [edit.get("target"), edit.get("from"), edit.get("to"), edit.get("config")], default=str
        )
        groups.setdefault(key, []).append(edit)
    return [
        Swap(
            target=plain(group[0].get("target", "?")), old=plain(group[0].get("from", "?")),
            new=plain(group[0].get("to", "?")), config=mapping(group[0].get("config")), edits=tuple(group),
        )
        for group in groups.values()
    ]  # fmt: skip


def sentence(run: RunRecord) -> str:
    """What was edited, in one sentence."""
    found = swaps(run.edits)
    if not found:
        return _sentence_of_plan(run)
    total = run.stage("graft").get("num_layers")
    parts = []
    for number, swap in enumerate(found):
        count = len(swap.layers)
        where = f"{count} of the {total}" if finite(total) else f"{count}"
        if finite(total) and count == total:
            where = f"all {total}"
        blocks = f"in {where} blocks"
        if number == 0:
            blocks += f" of {run.model}"
        if not (finite(total) and count == total):
            blocks += f" ({ranges(swap.layers)})"
        target = TARGETS.get(swap.target, swap.target)
        what = (
            f"{swap.label} takes the place of {target}"
            if swap.old != swap.new
            else f"{target} is built anew as {swap.label}"
        )
        if swap.target == "block_group":
            what = f"{swap.label} take the place of {swap.old}"
        parts.append(f"{blocks}, {what}")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _sentence_of_plan(run: RunRecord) -> str:
    entries = sequence(run.recipe.get("plan"))
    if not entries:
        return "The run folder does not say what was edited."
    words = []
    for entry in entries:
        replace = mapping(mapping(entry).get("replace"))
        if replace:
            new, old, where = (plain(replace.get(key, "?")) for key in ("with", "target", "layers"))
            words.append(f"{new} for {TARGETS.get(old, old)} in layers {where}")
        else:
            words.append(plain(entry))
    return f"Planned for {run.model}: {'; '.join(words)}."


def measures(run: RunRecord) -> dict[str, tuple[float | None, float | None, float | None]]:
    """name -> (teacher, student, student / teacher) from evaluation.json, or else from run.json."""
    comparison = mapping(run.evaluation.get("comparison")) or run.stage("evaluate")
    rows = mapping(comparison.get("metrics"))
    if rows:
        return {
            str(name): (
                finite(mapping(r).get("a")),
                finite(mapping(r).get("b")),
                finite(mapping(r).get("ratio")),
            )
            for name, r in rows.items()
        }
    both = [mapping(mapping(run.evaluation.get(who)).get("metrics")) for who in ("teacher", "student")]
    return {
        str(name): (finite(both[0].get(name)), finite(both[1].get(name)), None)
        for name in {**both[0], **both[1]}
    }


def protocol(run: RunRecord) -> Mapping[str, Any]:
    """How quality was measured."""
    comparison = mapping(run.evaluation.get("comparison")) or run.stage("evaluate")
    return mapping(comparison.get("protocol")) or mapping(
        mapping(run.evaluation.get("student")).get("protocol")
    )


def protocol_sentence(found: Mapping[str, Any]) -> str:
    """A protocol in words; fields that are not known are listed as they are."""
    rest = dict(found)
    parts = []

    def take(name: str, text: str) -> None:
        value = rest.pop(name, None)
        if value is not None:
            parts.append(text.format(plain(value)))

    take("num_samples", "{} samples")
    take("num", "{} samples")
    take("sampler", "sampler {}")
    take("steps", "{} steps")
    take("guidance", "guidance {}")
    take("seed", "seed {}")
    take("labels", "labels {}")
    take("precision", "precision {}")
    take("alignment_by_chance", "alignment by chance {}")
    take("size", "{} pixels a side")
    for name, words in (("reference", "against {}"), ("features", "features of {}")):
        value = rest.pop(name, None)
        if value is None:
            continue
        inner = mapping(value)
        text = plain(inner.get("name", value))
        extra = [f"{inner['num']} images"] if "num" in inner else []
        extra += [f"hash {plain(inner['hash'])[:12]}"] if "hash" in inner else []
        parts.append(words.format(text) + (f" ({', '.join(extra)})" if extra else ""))
    take("num_neighbours", "precision and recall with {} neighbours")
    parts += [f"{name} {_short(plain(value))}" for name, value in rest.items() if value is not None]
    return ", ".join(parts)


def _short(text: str) -> str:
    """A hash by its first digits, anything else as it is."""
    return text[:12] if re.fullmatch("[0-9a-f]{32,}", text) else text


@dataclass(frozen=True)
class StageCost:
    """What one stage of the edit cost; None for what the run folder does not say."""

    name: str
    steps: float | None
    visits: float | None
    flops: float | None
    teacher_flops: float | None  # of which forward passes of the teacher
    share: float | None  # of pretraining
    seconds: float | None


def stage_costs(run: RunRecord) -> list[StageCost]:
    """The cost of each training stage that is done."""
    found = []
    before = pair(mapping(run.stage("graft").get("model")).get("flops_per_image"))[0]
    for name in ("distill", "finetune"):
        stage = run.stage(name)
        if not stage:
            continue
        visits, flops = finite(stage.get("image_visits")), finite(stage.get("flops"))
        passes = visits if _uses_teacher(run, name) else 0.0
        if name == "distill" and run.settings(name).get("mode") == "cached":
            stored = [finite(run.settings(name).get("cache_samples")), _planned_visits(run, name)]
            passes = min((number for number in stored if number is not None), default=None)
        elif name == "distill" and passes is not None:
            passes /= finite(run.settings(name).get("reuse")) or 1
        teacher = None if passes is None or before is None else passes * before
        found.append(StageCost(
            name=name, steps=finite(stage.get("steps")), visits=visits, flops=flops, teacher_flops=teacher,
            share=finite(stage.get("share_of_pretraining")), seconds=finite(stage.get("seconds")),
        ))  # fmt: skip
    return found


def total_cost(costs: Sequence[StageCost]) -> StageCost:
    """The stages together; a figure that one of them lacks is None."""

    def add(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) if known and len(known) == len(values) else None

    return StageCost(
        name="both stages", steps=add([c.steps for c in costs]), visits=add([c.visits for c in costs]),
        flops=add([c.flops for c in costs]), teacher_flops=add([c.teacher_flops for c in costs]),
        share=add([c.share for c in costs]), seconds=add([c.seconds for c in costs]),
    )  # fmt: skip


def _planned_visits(run: RunRecord, stage: str) -> float | None:
    steps, batch = (finite(run.settings(stage).get(key)) for key in ("steps", "batch_size"))
    return steps * batch if steps is not None and batch is not None else None


def _uses_teacher(run: RunRecord, stage: str) -> bool:
    if stage == "distill":
        return True
    objectives = mapping(run.settings(stage).get("objectives"))
    return any((finite(objectives.get(name)) or 0) > 0 for name in ("output", "features"))
