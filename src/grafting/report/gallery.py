"""The section that shows samples: teacher and student from the same noise, side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from grafting.errors import GraftError
from grafting.report import images, words
from grafting.report.format import ranges
from grafting.report.html import Child, Html, el, note, section
from grafting.report.reading import RunRecord

NUM_CAPTIONED = 72


def samples(run: RunRecord) -> Html:
    """Teacher and student from the same noise, side by side."""
    title, ident = "Samples from the same noise", "samples"
    files, missing = {}, []
    for who in ("teacher", "student"):
        path = run.folder / "samples" / f"{who}.npz"
        try:
            if not path.is_file():
                missing.append(f"there are no samples of the {who} yet")
                continue
            files[who] = images.read_samples(path)
        except (GraftError, OSError, ValueError) as error:
            missing.append(f"samples of the {who} could not be read ({error})")
    if not files:
        return section(ident, title, note(f"Nothing to show: {'; '.join(missing)}."))
    if (texts := _captions(run, files)) is not None:
        return _captioned(files, texts, missing)
    shown = list(files.values())
    unlike = images.same_noise(shown)
    smallest = min(len(file.images) for file in shown)
    groups = images.by_class(shown[0].labels, smallest)
    names = class_names(run)
    strips = []
    for label, positions in groups:
        name = _class_name(names, label) if label is not None else f"samples {ranges(positions)}"
        rows: list[Child] = []
        for who, file in files.items():
            uri, width, height = images.strip(file.images[positions])
            rows += [
                el("span", who, class_=who[0]),
                el("img", src=uri, width=width, height=height,
                   alt=f"{len(positions)} samples of the {who}: {name}"),
            ]  # fmt: skip
        strips.append(el("figure", el("figcaption", name), el("div", rows, class_="pair")))
    positions = [i for _, group in groups for i in group]
    caption = [f"{len(positions)} of {min(file.total for file in shown):,} pairs."]
    if len(shown) == 2 and not unlike:
        caption += _closeness(shown[0], shown[1], positions)
    if missing:
        caption.append(f"Missing: {'; '.join(missing)}.")
    warning = (
        el("p", f"Not the same noise: the two files differ in {', '.join(unlike)}.", class_="warn")
        if unlike
        else None
    )
    return section(
        ident, title,
        el("p", "In each pair the upper image is the teacher's and the lower one the student's, "
                "from the same starting noise and the same label." if len(shown) == 2 and not unlike else None),
        warning, el("div", strips, class_="strips"),
        note(" ".join(caption), " ", el("span", _sample_protocol(shown[-1].protocol))),
    )  # fmt: skip


def _captions(run: RunRecord, files: Mapping[str, images.Samples]) -> list[str] | None:
    """What the samples were drawn by, where that was text; None for class numbers."""
    found = None
    for who in files:
        try:
            lines = (
                (run.folder / "samples" / f"{who}.captions.jsonl").read_text(encoding="utf-8").splitlines()
            )
            texts = [str(json.loads(line)["caption"]) for line in lines]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if found is not None and texts != found:
            return None
        found = texts
    return found


def _captioned(files: Mapping[str, images.Samples], texts: list[str], missing: list[str]) -> Html:
    """Each pair with its prompt beneath."""
    shown = list(files.values())
    unlike = images.same_noise(shown)
    count = min(*(len(file.images) for file in shown), len(texts), NUM_CAPTIONED)
    figures = []
    for i in range(count):
        pictures: list[Child] = []
        for who, file in files.items():
            uri, width, height = images.strip(file.images[i : i + 1])
            pictures.append(el("img", src=uri, width=width, height=height, alt=f"{who}: {texts[i]}"))
        figures.append(el("figure", el("div", pictures), el("figcaption", texts[i])))
    caption = [f"{count} of {min(file.total for file in shown):,} pairs."]
    if len(shown) == 2 and not unlike:
        apart = images.pair_distance(shown[0].images[:count], shown[1].images[:count])
        text = f"A pair differs by {apart:.1f} of 255 levels on average"
        if count > 1:
            others = images.pair_distance(shown[0].images[: count - 1], shown[0].images[1:count])
            text += f"; neighbouring teacher samples, of unlike prompts, by {others:.1f}"
        caption.append(f"{text}.")
    if missing:
        caption.append(f"Missing: {'; '.join(missing)}.")
    both = len(shown) == 2 and not unlike
    return section(
        "samples", "Samples from the same noise",
        el("p", "Left the teacher's image, right the student's, from the same starting noise; the prompt beneath.")
        if both else None,
        el("p", f"Not the same noise: the two files differ in {', '.join(unlike)}.", class_="warn")
        if unlike else None,
        el("div", figures, class_="prompted"),
        note(" ".join(caption), " ", el("span", _sample_protocol(shown[-1].protocol))),
    )  # fmt: skip


def _closeness(teacher: images.Samples, student: images.Samples, positions: list[int]) -> list[str]:
    pairs = images.pair_distance(teacher.images[positions], student.images[positions])
    text = f"A pair differs by {pairs:.1f} of 255 grey levels on average"
    if teacher.labels is not None:
        others = _next_of_class(teacher.labels)
        kept = [i for i in positions if others[i] != i]
        if kept:
            apart = images.pair_distance(teacher.images[kept], teacher.images[[others[i] for i in kept]])
            text += f"; two teacher samples of one class, from unlike noise, by {apart:.1f}"
    return [f"{text}."]


def _next_of_class(labels: Any) -> list[int]:
    first: dict[int, int] = {}
    following = list(range(len(labels)))
    later: dict[int, int] = {}
    for i in range(len(labels) - 1, -1, -1):
        label = int(labels[i])
        first.setdefault(label, i)
        following[i] = later.get(label, first[label])
        later[label] = i
    return [later[int(labels[i])] if following[i] == i else following[i] for i in range(len(labels))]


def _sample_protocol(protocol: Mapping[str, Any]) -> str:
    text = words.protocol_sentence({k: v for k, v in protocol.items() if k not in ("model", "num_samples")})
    return f"Protocol: {text}." if text else ""


def class_names(run: RunRecord) -> tuple[str, ...]:
    """Names of the classes, where the recipe's data is known to have them."""
    data = run.recipe.get("data")
    if isinstance(data, str) and data in ("fashion", "fashion-10", "fashion-train"):
        from grafting.data.fashion import CLASS_NAMES

        return CLASS_NAMES
    return ()


def _class_name(names: tuple[str, ...], label: int) -> str:
    return names[label] if 0 <= label < len(names) else f"class {label}"
