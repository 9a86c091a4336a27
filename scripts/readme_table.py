"""Write the results table of README.md from docs/studies/demo.json, so that no number in it is typed by hand.

    python scripts/readme_table.py --from runs/demo   # collect a finished demo run into demo.json, then the table
    python scripts/readme_table.py                    # the table again
    python scripts/readme_table.py --check            # exit status 1 if README.md is not what demo.json says

demo.json: {"recipe", "evaluation", "stages", "environment"}, as the run folder has them in recipe.yaml,
evaluation.json and run.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "docs" / "studies" / "demo.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- results:begin", "<!-- results:end -->"
METRICS = {
    "fd": ("Frechet distance (lower is better)", "{:.2f}"),
    "label_accuracy": ("samples in their class", "{:.1%}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "is": ("inception-style score", "{:.2f}"),
}


def collect(run: Path) -> dict[str, Any]:
    """What the table needs of a finished run folder. Raises SystemExit that names what is missing."""
    from grafting.runs import RunFolder

    folder = RunFolder.open(run)
    state = folder.read()
    if not (run / "evaluation.json").is_file():
        raise SystemExit(f"error: {run} has no evaluation.json: finish the run first (graft demo --resume)")
    stages = {name: _small(stage) for name, stage in state["stages"].items()}
    return {
        "recipe": folder.recipe(),
        "evaluation": json.loads((run / "evaluation.json").read_text(encoding="utf-8")),
        "stages": stages,
        "environment": {k: v for k, v in state.get("environment", {}).items() if k != "platform"},
    }


def _small(stage: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's record without its per-layer lists."""
    return {key: value for key, value in stage.items() if key not in ("edits", "plan")}


def table(data: Mapping[str, Any]) -> str:
    """The Markdown between the markers."""
    evaluation, stages = data["evaluation"], data["stages"]
    teacher, student = evaluation["teacher"]["metrics"], evaluation["student"]["metrics"]
    rows = [("", "teacher", "student", "student / teacher"), ("---", "---:", "---:", "---:")]
    for key, (label, form) in METRICS.items():
        if key in teacher and key in student:
            ratio = f"{student[key] / teacher[key]:.3f}" if teacher[key] else "-"
            rows.append((label, form.format(teacher[key]), form.format(student[key]), ratio))
    model = stages.get("graft", {}).get("model", {})
    for key, label, form in (
        ("params", "parameters", "{:,.0f}"),
        ("flops_per_image", "FLOPs per forward pass", "{:,.0f}"),
    ):
        if key in model:
            before, after = model[key]
            rows.append((label, form.format(before), form.format(after), f"{after / before:.3f}"))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", *_notes(data)])


def _notes(data: Mapping[str, Any]) -> list[str]:
    """The protocol, and what the edit cost."""
    protocol, stages = data["evaluation"]["student"]["protocol"], data["stages"]
    reference, features = protocol["reference"], protocol["features"]
    images = f" ({reference['num']:,} images)" if reference.get("num") else ""
    found = [
        f"{protocol['num_samples']:,} samples of each, {protocol['sampler']}, {protocol['steps']} steps, guidance "
        f"{protocol['guidance']:g}, the same noise and labels; reference `{reference['name']}`{images}, features "
        f"`{features['name']}`."
    ]
    for stage, label in (("distill", "Stage 1"), ("finetune", "Stage 2")):
        if stage in stages:
            found.append(f"{label}: {_training(stages[stage])}.")
    shares = [s["share_of_pretraining"] for s in stages.values() if "share_of_pretraining" in s]
    if shares:
        found.append(f"Together they took {sum(shares):.2%} of the FLOPs of the teacher's pretraining.")
    environment = data["environment"]
    threads = environment.get("threads")
    machine = environment.get("gpu") or f"{threads} CPU thread{'s' if threads != 1 else ''}"
    found.append(f"Run on {machine}, torch {environment.get('torch')}.")
    return [" ".join(found)]


def _training(stage: Mapping[str, Any]) -> str:
    return f"{stage['steps']} steps, {stage['image_visits']:,} image visits, {stage['seconds']:,.0f} s"


def rendered(readme: str, body: str) -> str:
    """README text with `body` between the markers. Raises SystemExit if the markers are not there once."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(END) < readme.index(BEGIN):
        raise SystemExit(
            f"error: README.md needs the lines '{BEGIN} ... -->' and '{END}' once, in this order"
        )
    start = readme.index("\n", readme.index(BEGIN)) + 1
    return readme[:start] + body + "\n" + readme[readme.index(END) :]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="run", type=Path, help="finished run folder to collect into demo.json")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if README.md is stale")
    arguments = parser.parse_args()
    if arguments.run is not None:
        SOURCE.parent.mkdir(parents=True, exist_ok=True)
        SOURCE.write_text(json.dumps(collect(arguments.run), indent=2) + "\n", encoding="utf-8")
    if not SOURCE.is_file():
        print(f"{SOURCE.relative_to(ROOT)} is not there yet: README.md is left as it is", file=sys.stderr)
        return
    readme = README.read_text(encoding="utf-8")
    wanted = rendered(readme, table(json.loads(SOURCE.read_text(encoding="utf-8"))))
    if arguments.check:
        if wanted != readme:
            raise SystemExit(
                "error: README.md is not what demo.json says; run python scripts/readme_table.py"
            )
    elif wanted != readme:
        README.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
