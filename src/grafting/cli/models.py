"""Verbs about models and plans: list, inspect, explain, cost, import, export, push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from grafting.cli.app import app
from grafting.cli.common import check_common, check_empty, emit, new_console, open_model, parse_dtype, show
from grafting.cli.options import (
    AnyDevice,
    AnyDtype,
    AnySeed,
    Device,
    Dtype,
    Heads,
    Json,
    Locality,
    Plan,
    Rest,
    Seed,
    Source,
)


@app.command("list")
def list_(json_: Json = False) -> None:
    """Operators, recipes, the paper's experiments (graft run STUDY/ROW) and packaged models."""
    from grafting import operators
    from grafting.loading import PACKAGED
    from grafting.recipes import experiments, load_recipe, packaged

    found = {
        "operators": {name: operators.describe(name) for name in operators.names()},
        "recipes": {name: load_recipe(name).about for name in packaged()},
        "experiments": {name: " ".join(rows) for name, rows in experiments().items()},
        "models": list(PACKAGED),
    }
    if json_:
        emit(found)
        return
    for title, rows in found.items():
        print(title)
        for name in rows:
            print(f"  {name:<14} {rows[name] if isinstance(rows, dict) else ''}".rstrip())


@app.command()
def inspect(
    source: Source, num_heads: Heads = None, device: Device = "cpu", dtype: AnyDtype = None, seed: AnySeed = 0,
    json_: Json = False,
) -> None:  # fmt: skip
    """What a model is: its shape, operators per layer, parameters and FLOPs."""
    from grafting.inspection import inspect_model

    check_common(device, dtype)
    found = inspect_model(open_model(source, num_heads=num_heads, device=device, dtype=dtype, meta=True))
    show(found, json_, [("layer", "target", "operator", "params", "flops")], "sites")


@app.command()
def explain(
    source: Source, plan: Plan, num_heads: Heads = None, locality: Locality = None,
    device: Device = "cpu", dtype: AnyDtype = None, seed: AnySeed = 0, json_: Json = False,
) -> None:  # fmt: skip
    """What a plan would do to a model, layer by layer; touches nothing and, on arch:, allocates nothing."""
    from grafting.plan import GraftPlan
    from grafting.surgery import explain as explain_plan

    check_common(device, dtype)
    loaded = GraftPlan.load(plan)
    model = open_model(source, num_heads=num_heads, device=device, dtype=dtype, meta=True)
    found = explain_plan(model, loaded, locality).to_dict()
    show(found, json_, [("layer", "target", "from", "to", "init", "params", "flops")], "edits")


@app.command()
def cost(
    source: Source,
    plan: Annotated[Path | None, typer.Option(help="Plan file; default: the plan an edited SOURCE has.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Also time one forward pass, before and after.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Also a table of all layers (always in --json).")] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="With --measure: samples in a pass; 1.")] = None,
    repeat: Annotated[int | None, typer.Option(min=1, help="With --measure: timed passes of either; 20.")] = None,
    warm_up: Annotated[int | None, typer.Option(min=1, help="With --measure: passes that are not timed; 3.")] = None,
    compile_: Annotated[bool, typer.Option("--compile", help="With --measure: time compiled blocks.")] = False,
    num_heads: Heads = None, locality: Locality = None, device: Device = "cpu", dtype: Dtype = None, seed: Seed = 0,
    json_: Json = False,
) -> None:  # fmt: skip
    """What a plan changes in FLOPs and parameters, in per cent of all operators of the target (Table 4's way)."""
    from grafting.analysis.costs import plan_cost
    from grafting.analysis.latency import measure_plan
    from grafting.analysis.memory import weight_bytes
    from grafting.errors import GraftError
    from grafting.plan import GraftPlan

    of_measure = {"batch_size": batch_size, "repeat": repeat, "warm_up": warm_up, "compile": compile_ or None}
    given: dict[str, Any] = {name: value for name, value in of_measure.items() if value is not None}
    if given and not measure:
        name = next(iter(given)).replace("_", "-")
        raise GraftError(f"--{name} is for a measurement: give --measure too, or leave it out")
    loaded = GraftPlan.load(plan) if plan else None
    model = open_model(source, num_heads=num_heads, meta=True, dtype=dtype)
    found = plan_cost(model, loaded, locality)
    if measure:
        if source.startswith("arch:"):
            size = weight_bytes(model) / 1e9
            new_console().say(
                f"building random weights: {size:.1f} GB; the edited model has those that stay in common"
            )
        model = open_model(source, num_heads=num_heads, device=device, dtype=dtype)
        found["measured"] = measure_plan(model, loaded, locality, seed=seed, **given)
    rows, all_layers = found["rows"], found["layers"]
    if json_:
        emit(found)
        return
    show(
        {key: value for key, value in found.items() if key != "layers"}, False,
        [("target", "operator", "layers", "flops_op_pct", "flops_ft_pct", "flops_pct", "params_pct")] if rows else None,
        "rows",
    )  # fmt: skip
    if layers:
        from grafting.report.text import table

        print(table(("layer", "target", "operator", "flops_op", "flops_ft", "params"), all_layers))


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="Published .pt of a grafted DiT.")],
    out: Annotated[Path, typer.Option(help="Graft folder to make.")],
    num_heads: Heads = None,
    window: Annotated[
        int | None, typer.Option(min=0, help="Window of swa operators, which is in no shape; default 4.")
    ] = None,
    device: AnyDevice = "cpu", dtype: Dtype = None, seed: AnySeed = 0,
) -> None:  # fmt: skip
    """Read a published grafted checkpoint; the plan is read off its keys and shapes."""
    from grafting.formats.graft_folder import save_graft
    from grafting.formats.published import import_published
    from grafting.formats.weights import cast
    from grafting.surgery import record_of

    check_common(device, dtype)
    check_empty(out)
    model = import_published(file, num_heads=num_heads, window=window)
    save_graft(cast(model, parse_dtype(dtype)) if dtype else model, out)
    record = record_of(model)
    print(record.plan if record else "")
    print(f"graft: {out}")


@app.command()
def export(
    source: Source, out: Annotated[Path, typer.Option(help="File (.pt) of published, folder of the others.")],
    format: Annotated[str, typer.Option(help="published, diffusers, pipeline or graft.")] = "published",
    merge: Annotated[bool, typer.Option("--merge", help="Add LoRA adapters into the weights.")] = False,
    pipeline: Rest = None, device: AnyDevice = "cpu", dtype: Dtype = None, seed: AnySeed = 0,
) -> None:  # fmt: skip
    """Write a model in another layout: a published .pt, diffusers' (unedited DiTs), a whole pipeline, or a graft."""
    from grafting.exports import export_model

    check_common(device, dtype)
    export_model(source, out, format, merge=merge, dtype=parse_dtype(dtype), pipeline=pipeline)
    print(f"exported: {out}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="What graft export wrote: a pipeline or a graft.")],
    repo: Annotated[str, typer.Argument(help="Repository on the hub: OWNER/NAME.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
) -> None:
    """Upload to the hub, with a model card: plan, costs, protocol, samples. Takes the token of `hf auth login`."""
    from grafting.pipelines import push_to_hub

    print(f"pushed: {push_to_hub(folder, repo, private=private)}")
