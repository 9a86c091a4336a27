"""The model card (Markdown) of a graft or pipeline folder: what opens it, plan, costs, protocol, measures, samples."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from grafting.errors import CheckpointError, GraftError
from grafting.families import families
from grafting.formats import weights
from grafting.formats.graft_folder import MANIFEST, is_graft_folder
from grafting.plan import GraftPlan

SAMPLES, NUM_SAMPLES, SIDE = (
    "samples.png",
    8,
    256,
)  # the sheet beside a card: its name, images a row, pixels of one


def model_card(folder: str | Path, run: str | Path | None = None) -> str:
    """The card of the graft in `folder` (a graft, or a pipeline or run that holds one).

    run: the run folder that it came from, for protocol, measured costs and samples; default `folder` itself, if it is
    one. Names of local folders stay out of it. Raises CheckpointError.
    """
    folder = Path(folder)
    graft = next(
        (at for at in (folder, folder / "transformer", folder / "graft") if is_graft_folder(at)), None
    )
    if graft is None:
        raise CheckpointError(f"{str(folder)!r} holds no graft: it has no {MANIFEST}")
    manifest = weights.read_json(graft / MANIFEST, "graft")
    origin = manifest.get("origin") or (manifest.get("base") or {}).get("source")
    hub_id = origin if isinstance(origin, str) and not _is_local(origin) and "/" in origin else None
    whole = (folder / "model_index.json").is_file()
    run = Path(run) if run is not None else folder
    packages = _packages(manifest)
    lines = [
        "---", "library_name: grafting", "tags: [grafting, diffusion]",
        *(["pipeline_tag: text-to-image"] if whole else []), *([f"base_model: {hub_id}"] if hub_id else []), "---", "",
        f"# A graft of {hub_id or 'a model of the family ' + str(manifest['architecture'].get('family'))}", "",
        "The architecture of this model was edited, so that diffusers' own classes can't load it. Open it with", "",
        "```python", *(_import(name, what) for name, what in packages.items()), "import grafting", "",
        'pipeline = grafting.load_pipeline("FOLDER")' if whole else 'model = grafting.load_model("FOLDER")', "```", "",
        *([f"Needed beside grafting: {', '.join(f'`{name}`' for name in packages)}.", ""] if packages else []),
        f"Base needed beside this folder: {'yes' if manifest['base'] else 'no'}. {_lora(manifest)}", "",
        "## Plan", "", "```json", json.dumps(manifest["plan"]["entries"], indent=1), "```", "",
        *_costs(manifest),
    ]  # fmt: skip
    if (run / "run.json").is_file():
        lines += [*_protocol(run), *_measures(run)]
    if (folder / SAMPLES).is_file():
        lines += [*_samples(run)]
    return "\n".join(lines)


def write_samples(run: Path, folder: Path) -> None:
    """`samples.png` in `folder`: the first samples of a run, the teacher's above the student's, made smaller."""
    from grafting.evaluation.samples import SampleFile
    from grafting.generation import save_grid, smaller

    rows = []
    for who in ("teacher", "student"):
        if (run / "samples" / f"{who}.npz").is_file():
            rows.append(next(SampleFile.open(run / "samples" / f"{who}.npz").images(NUM_SAMPLES)))
    if rows:
        folder.mkdir(parents=True, exist_ok=True)
        save_grid(smaller(np.concatenate(rows), SIDE), folder / SAMPLES, columns=len(rows[0]))


def _packages(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What must be imported before such a model can be built -> what it registers."""
    found: dict[str, list[str]] = {}
    for name, package in manifest["operators"].items():
        found.setdefault(package, []).append(f"the operator {name!r}")
    if (family := families().get(manifest["architecture"].get("family"))) is not None:
        owner = type(family).__module__.partition(".")[0]
        found.setdefault(owner, []).append(f"the family {family.name!r}")
    return {package: ", ".join(what) for package, what in sorted(found.items()) if package != "grafting"}


def _import(package: str, what: str) -> str:
    if package == "__main__":  # of a script or a notebook
        return f"# run the code that registers {what} here"
    return f"import {package}  # registers {what}"


def _lora(manifest: Mapping[str, Any]) -> str:
    lora = manifest.get("lora")
    return f"LoRA: rank {lora['rank']}, alpha {lora['alpha']:g}, unmerged." if lora else "LoRA: none."


def _costs(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What the plan changes, counted on the architecture."""
    import torch

    from grafting.analysis.costs import plan_cost

    architecture = manifest["architecture"]
    try:
        with torch.device("meta"):
            base = families()[architecture["family"]].build(architecture)
        found = plan_cost(base, GraftPlan.from_dict(manifest["plan"], allow_empty=True))
    except (GraftError, KeyError):  # operators of another package
        return
    model = found["model"]
    yield from ("## Costs", "", "| one forward pass of one image | before | after |", "|---|---:|---:|")
    yield f"| parameters | {model['params'][0]:,} | {model['params'][1]:,} |"
    yield f"| FLOPs (2 per multiply-add) | {model['flops_per_image'][0]:.4g} | {model['flops_per_image'][1]:.4g} |"
    yield from ("", "In per cent of all operators of the target in the base:", "")
    for row in found["rows"]:
        yield (
            f"- {row['target']} -> {row['operator']} in {len(row['layers'])} layers: operator FLOPs "
            f"{row['flops_op_pct']:+.2f} %, parameters {row['params_pct']:+.2f} %"
        )
    yield ""


def _protocol(run: Path) -> Iterator[str]:
    """How it was trained, and what that took."""
    from grafting.data.text import is_caption_folder, read_manifest
    from grafting.runs import RunFolder

    folder = RunFolder(run, writer=False)
    state, recipe = folder.read(), folder.recipe()
    yield from ("## Protocol", "")
    data = (state.get("inputs") or {}).get("data")
    if data:
        yield f"Data: `{data['name']}`, SHA-256 `{data['sha256']}`."
    pairs = run / str(recipe.get("data")) if recipe.get("synthesize") else Path(str(recipe.get("data")))
    if is_caption_folder(pairs):
        made = read_manifest(pairs)["protocol"]
        yield (
            f"It is {made['num']:,} image-text pairs sampled from the base itself: {made['sampler']}, {made['steps']} "
            f"steps, guidance {made['guidance']:g}, seed {made['seed']}."
        )
    yield from ("", "| | steps | batch | lr | precision | LoRA | took | FLOPs | peak memory |",
                "|---|---:|---:|---:|---|---|---:|---:|---:|")  # fmt: skip
    for title, stage in (("stage 1, distillation", "distill"), ("stage 2, finetuning", "finetune")):
        done, asked = state["stages"].get(stage), recipe.get(stage) or {}
        if done is None:
            continue
        lora, peak = asked.get("lora"), (done.get("memory") or {}).get("peak_bytes")
        adapters = f"rank {lora['rank']}" if lora else "-"
        yield (
            f"| {title} | {done['steps']:,} | {asked.get('batch_size', '-')} | {asked.get('lr', '-')} | "
            f"{asked.get('precision', '-')} | {adapters} | {done['seconds']:,.0f} s | "
            f"{done['flops']:.3g} | {f'{peak / 1e9:.2f} GB' if peak else '-'} |"
        )
    machine = state.get("environment") or {}
    named = [f"{key} {machine[key]}" for key in ("grafting", "torch", "gpu", "threads") if machine.get(key)]
    yield from ("", f"Run with {', '.join(named)}." if named else "", "")


def _measures(run: Path) -> Iterator[str]:
    """Teacher and student, where the run was evaluated."""
    if not (run / "evaluation.json").is_file():
        return
    found = weights.read_json(run / "evaluation.json", "evaluation").get("comparison") or {}
    rows = found.get("metrics") or {}
    if not rows:
        return
    yield from ("## Measures", "", "| | base | this model |", "|---|---:|---:|")
    for name, row in rows.items():
        yield f"| {name} | {row['a']:.4g} | {row['b']:.4g} |"
    kept = {k: v for k, v in (found.get("protocol") or {}).items() if isinstance(v, (str, int, float))}
    yield from ("", ", ".join(f"{key} {value}" for key, value in kept.items()) + ".", "")


def _samples(run: Path) -> Iterator[str]:
    """The sheet, its captions and how it was drawn."""
    from grafting.evaluation.samples import SampleFile

    yield from ("## Samples", "", f"![Samples of the base and of this model]({SAMPLES})", "",
                "Above the base's, below this model's, from the same noise.", "")  # fmt: skip
    captions = run / "samples" / "student.captions.jsonl"
    if captions.is_file():
        texts = [json.loads(line)["caption"] for line in captions.read_text(encoding="utf-8").splitlines()]
        yield from (
            f"{n}. `{' '.join(text.replace('`', ' ').split())}`"
            for n, text in enumerate(texts[:NUM_SAMPLES], 1)
        )
        yield ""
    file = run / "samples" / "student.npz"
    if file.is_file():
        protocol = SampleFile.open(file).protocol
        known = ("sampler", "steps", "guidance", "seed", "precision")
        yield from (", ".join(f"{key} {protocol[key]}" for key in known if key in protocol) + ".", "")


def _is_local(source: str) -> bool:
    return Path(source).is_absolute() or Path(source).exists()
