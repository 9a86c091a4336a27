"""The command line: parses, calls, prints. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import nn

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Edit the architecture of pretrained diffusion transformers.",
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip

Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str | None, typer.Option(help="Type of the weights: float32, bfloat16, float16.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every draw.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Source = Annotated[
    str, typer.Argument(help="Packaged name, .pt file, folder (model, graft, run), hub id, or arch:DiT-XL/2.")
]
Plan = Annotated[Path, typer.Option("--plan", help="Plan file, YAML or JSON.")]
Heads = Annotated[
    int | None, typer.Option(min=1, help="Number of heads, for a file of an unpublished width.")
]
Locality = Annotated[Path | None, typer.Option(help="Locality file for top-local-50 and low-local-50.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where the run stopped.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override of the recipe: key=value or stage.key=value; repeatable."),
]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"), resume: Resume = False,
    device: Device = "cpu", seed: Seed = 0, set: Set = None,
) -> None:  # fmt: skip
    """Half of the attention of the packaged dit-fashion becomes hyena_x: the whole method in minutes."""
    run(
        "demo",
        out=out,
        resume=resume,
        set=set,
        dry_run=False,
        processes=1,
        device=device,
        dtype=None,
        seed=seed,
    )


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a packaged one (see graft list).")],
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/<name of the recipe>.")] = None,
    resume: Resume = False, set: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and do nothing.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Processes (GPUs) to spread over, through accelerate.")] = 1,
    device: Device = "cpu", dtype: Dtype = None, seed: Annotated[int | None, typer.Option(min=0)] = None,
) -> None:  # fmt: skip
    """Run a recipe: load, graft, distill, finetune, sample, evaluate, report."""
    from grafting.pipeline import Pipeline
    from grafting.recipes import load_recipe
    from grafting.runs import RunFolder

    overrides = [
        *(set or []),
        *([f"dtype={dtype}"] if dtype else []),
        *([f"seed={seed}"] if seed is not None else []),
    ]
    resolved = load_recipe(recipe, overrides)
    folder = out or Path("runs") / resolved.name
    if processes > 1 and not dry_run and "WORLD_SIZE" not in os.environ:
        _launch(processes)
    if dry_run:
        from grafting.yaml_io import dump_yaml

        Pipeline(resolved, RunFolder(folder, _console()), device).check()
        print(dump_yaml(resolved.to_dict()), end="")
        return
    pipeline = Pipeline(resolved, RunFolder(folder, _console()), device)
    pipeline.check()
    main_process = pipeline.compute.is_main
    if main_process:
        pipeline.run = RunFolder.create(folder, resolved.to_dict(), pipeline.run.console, resume=resume)
    pipeline.compute.wait()
    if not main_process:
        pipeline.run = RunFolder(folder, writer=False)
    page = pipeline.all()
    pipeline.run.console.close()
    if main_process:
        _print_results(folder)
        print(f"report: {page}")


@app.command("list")
def list_(json_: Json = False) -> None:
    """Operators, recipes and packaged models."""
    from grafting import operators
    from grafting.loading import PACKAGED
    from grafting.recipes import load_recipe, packaged

    found = {
        "operators": {name: operators.describe(name) for name in operators.names()},
        "recipes": {name: load_recipe(name).about for name in packaged()},
        "models": list(PACKAGED),
    }
    if json_:
        _emit(found)
        return
    for title, rows in found.items():
        print(title)
        for name in rows:
            print(f"  {name:<14} {rows[name] if isinstance(rows, dict) else ''}".rstrip())


@app.command()
def inspect(source: Source, num_heads: Heads = None, json_: Json = False) -> None:
    """What a model is: its shape, operators per layer, parameters and FLOPs."""
    from grafting.inspection import inspect_model

    found = inspect_model(_model(source, num_heads=num_heads, meta=True))
    _show(found, json_, [("layer", "target", "operator", "params", "flops")], "sites")


@app.command()
def explain(
    source: Source, plan: Plan, num_heads: Heads = None, locality: Locality = None, json_: Json = False
) -> None:
    """What a plan would do to a model, layer by layer; touches nothing and, on arch:, allocates nothing."""
    from grafting.plan import GraftPlan
    from grafting.surgery import explain as explain_plan

    loaded = GraftPlan.load(plan)
    found = explain_plan(_model(source, num_heads=num_heads, meta=True), loaded, locality).to_dict()
    _show(found, json_, [("layer", "target", "from", "to", "init", "params", "flops")], "edits")


@app.command()
def cost(
    source: Source, plan: Plan, num_heads: Heads = None, locality: Locality = None, json_: Json = False
) -> None:
    """What a plan changes in FLOPs and parameters, in per cent of all operators of the target (Table 4's way)."""
    from grafting.analysis.costs import plan_cost
    from grafting.plan import GraftPlan

    found = plan_cost(_model(source, num_heads=num_heads, meta=True), GraftPlan.load(plan), locality)
    _show(
        found, json_, [("target", "operator", "layers", "flops_op_pct", "flops_ft_pct", "params_pct")], "rows"
    )


@app.command()
def apply(
    source: Source, plan: Plan, out: Annotated[Path, typer.Option(help="Run folder to make.")],
    data: Annotated[str, typer.Option(help="Data of the later stages.")] = "fashion-10",
    num_heads: Heads = None, locality: Locality = None, seed: Seed = 0,
) -> None:  # fmt: skip
    """Apply a plan and leave the edited model in a run folder, ready for distill and finetune."""
    from grafting.pipeline import Pipeline
    from grafting.plan import GraftPlan
    from grafting.recipes import load_recipe
    from grafting.runs import RunFolder

    recipe = load_recipe({
        "name": out.name, "model": source, "num_heads": num_heads, "data": data, "seed": seed,
        "plan": GraftPlan.load(plan).to_dict()["entries"], "locality": str(locality) if locality else None,
    })  # fmt: skip
    pipeline = Pipeline(recipe, RunFolder(out, _console()))
    pipeline.check()
    pipeline.run = RunFolder.create(out, recipe.to_dict(), pipeline.run.console)
    pipeline.graft()
    print(f"grafted: {out}/graft")


@app.command()
def distill(
    run: Annotated[Path, typer.Argument(help="Run folder.")], resume: Resume = False, device: Device = "cpu"
) -> None:
    """Stage 1 on a run folder: the new operators learn what the donor's do."""
    _stage(run, "distill", resume, device)


@app.command()
def finetune(
    run: Annotated[Path, typer.Argument(help="Run folder.")], resume: Resume = False, device: Device = "cpu"
) -> None:
    """Stage 2 on a run folder: the whole edited model, lightly."""
    _stage(run, "finetune", resume, device)


@app.command()
def sample(
    source: Source,
    out: Annotated[Path, typer.Option(help="Where to write the .npz; a .png grid goes beside it.")],
    num: Annotated[int, typer.Option(min=1, help="Number of images.")],
    steps: Annotated[int, typer.Option(min=1, max=1000)] = 50,
    sampler: Annotated[str, typer.Option(help="ddim, ddpm or dpm++.")] = "ddim",
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 means none.")] = 1.5,
    batch_size: Annotated[int, typer.Option(min=1)] = 100,
    vae: Annotated[str | None, typer.Option(help="Folder or hub id of the VAE of a latent model.")] = None,
    num_heads: Heads = None, device: Device = "cpu", dtype: Dtype = None, seed: Seed = 0,
) -> None:  # fmt: skip
    """Draw images; noise and label of image i depend on the seed and i alone."""
    from grafting.generation import generate

    console = _console()
    generate(
        _model(source, num_heads=num_heads, device=device, dtype=dtype), out, num=num, steps=steps, sampler=sampler,
        guidance=guidance, seed=seed, batch_size=batch_size, vae=vae, describe={"model": source},
        progress=lambda done, total: console.progress("sample", done, total, "images"),
    )  # fmt: skip
    console.close()
    print(f"samples: {out}")


@app.command()
def evaluate(
    samples: Annotated[Path, typer.Argument(help="Sample file (.npz).")],
    reference: Annotated[str, typer.Option(help="fashion-train, an ADM reference .npz, or another sample file.")],
    features: Annotated[str, typer.Option(help="auto, fashion, or inception:WEIGHTS.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Also write the result here, for graft compare.")] = None,
    device: Device = "cpu", json_: Json = False,
) -> None:  # fmt: skip
    """Frechet distance, precision, recall, inception-style score and label accuracy of a sample file."""
    from grafting.evaluation import evaluate as measure
    from grafting.formats.weights import write_json

    found = measure(samples, reference, features, device=device)
    if out:
        write_json(out, found)
    _show(found, json_)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Evaluation (JSON of graft evaluate).")],
    b: Annotated[Path, typer.Argument(help="Another one.")], json_: Json = False,
) -> None:  # fmt: skip
    """Two evaluations side by side; refuses unlike protocols."""
    from grafting.evaluation import compare as compare_two
    from grafting.evaluation import read_evaluation

    _show(compare_two(read_evaluation(a), read_evaluation(b)), json_)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="Published .pt of a grafted DiT.")],
    out: Annotated[Path, typer.Option(help="Graft folder to make.")],
    num_heads: Heads = None,
    window: Annotated[int, typer.Option(min=0, help="Window of swa operators; it is in no shape.")] = 4,
) -> None:
    """Read a published grafted checkpoint; the plan is read off its keys and shapes."""
    from grafting.formats.graft_folder import save_graft
    from grafting.formats.published import import_published
    from grafting.surgery import record_of

    _empty(out)
    model = import_published(file, num_heads=num_heads, window=window)
    save_graft(model, out)
    record = record_of(model)
    print(record.plan if record else "")
    print(f"graft: {out}")


@app.command()
def export(
    source: Source, out: Annotated[Path, typer.Option(help="File (.pt) or, for diffusers, folder.")],
    format: Annotated[str, typer.Option(help="published or diffusers.")] = "published",
) -> None:  # fmt: skip
    """Write a model in another layout: a published .pt, or diffusers' (unedited models only)."""
    from grafting.errors import GraftError
    from grafting.formats.published import export_published
    from grafting.loading import save_diffusers

    writers = {"published": export_published, "diffusers": save_diffusers}
    if format not in writers:
        raise GraftError(f"unknown format {format!r}: expected {' or '.join(writers)}")
    writers[format](_model(source), out)
    print(f"exported: {out}")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Run folder.")]) -> None:
    """Write report.html of a run folder again."""
    from grafting.report import write_report
    from grafting.runs import RunFolder

    print(f"report: {write_report(RunFolder.open(run).path)}")


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="demo-ablation or donor-init.")],
    out: Annotated[Path | None, typer.Option(help="Folder; default runs/study-<name>.")] = None,
    model: Annotated[str | None, typer.Option(help="Another teacher.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this row; repeatable.")] = None,
    resume: Resume = False, set: Set = None, device: Device = "cpu", seed: Seed = 0,
) -> None:  # fmt: skip
    """Run a set of experiments; finished rows are never run again."""
    from grafting.studies import run_study

    folder = out or Path("runs") / f"study-{name}"
    console = _console()
    page = run_study(
        name, folder, console, model=model, resume=resume, seed=seed, only=only, device=device, changes=set
    )
    console.close()
    print(f"study: {page}")


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="stage1: one pass for all operators against one job per operator.")],
    updates: Annotated[int, typer.Option(min=2, help="Optimizer steps of each side.")] = 40,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON here.")] = None, json_: Json = False,
) -> None:  # fmt: skip
    """Compare the speed of two ways in one run; report ratios."""
    from grafting.benchmarks import run_benchmark
    from grafting.formats.weights import write_json

    found = run_benchmark(what, updates=updates)
    if out:
        write_json(out, found)
    _show(found, json_)


def main() -> None:
    """Entry point: one line on stderr for what a user can mend, exit statuses as documented."""
    from grafting.errors import GraftError
    from grafting.training.loop import Interrupted

    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        code = app(standalone_mode=False)
        if code == 130:  # typer's own answer to Ctrl-C
            raise KeyboardInterrupt
    except GraftError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except Interrupted as stop:
        print(f"error: {stop}", file=sys.stderr)
        raise SystemExit(stop.code) from None
    except _Terminated:
        print("error: terminated", file=sys.stderr)
        raise SystemExit(143) from None
    except (KeyboardInterrupt, typer.Abort):
        print("error: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("click", "typer"):  # newer typers carry click inside
            raise
        describe = getattr(error, "format_message", None)
        message = str(describe() if describe else error)
        if message:
            print(f"error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        signal.signal(signal.SIGTERM, previous)
    raise SystemExit(code if isinstance(code, int) else 0)


class _Terminated(BaseException):
    """SIGTERM outside of a training stage (which stops by itself): what is half written is taken back."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def _console() -> Any:
    from grafting.console import Console

    return Console()


def _dtype(name: str | None) -> Any:
    if name is None:
        return None
    import torch

    from grafting.errors import GraftError

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise GraftError(f"unknown dtype {name!r}: expected one of {', '.join(known)}")
    return known[name]


def _model(
    source: str,
    *,
    num_heads: int | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    meta: bool = False,
) -> nn.Module:
    """A model for a command; `meta`: without weights where it has none to lose."""
    from grafting.loading import load_model

    return load_model(
        source,
        num_heads=num_heads,
        device="meta" if meta and source.startswith("arch:") else device,
        dtype=_dtype(dtype),
    )


def _stage(folder: Path, stage: str, resume: bool, device: str) -> None:
    from grafting.errors import RunError
    from grafting.pipeline import open_pipeline

    console = _console()
    pipeline = open_pipeline(folder, console, device)
    if pipeline.run.result(stage) is not None:
        raise RunError(f"{str(folder)!r}: {stage} is done already; use another run folder to do it again")
    started = any((folder / "checkpoints" / stage).glob("*.pt"))
    if started and not resume:
        raise RunError(f"{str(folder)!r}: {stage} was begun; go on with --resume")
    pipeline.check()
    getattr(pipeline, stage)()
    console.close()
    print(f"{stage}: {folder}")


def _launch(processes: int) -> None:
    """Replace this process by a launcher of the same command; `accelerate launch` and Slurm work as well."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, "-m", "grafting.cli", *sys.argv[1:]]
    os.execv(sys.executable, command)


def _empty(folder: Path) -> None:
    from grafting.errors import RunError

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{str(folder)!r} is not an empty folder; give another --out")


def _emit(found: Mapping[str, Any]) -> None:
    print(json.dumps(found, indent=2, allow_nan=False))


def _show(
    found: Mapping[str, Any], json_: bool, columns: list[tuple[str, ...]] | None = None, rows: str = ""
) -> None:
    """JSON, or the same as a table and lines."""
    if json_:
        _emit(found)
        return
    from grafting.report.text import lines, table

    for line in lines({key: value for key, value in found.items() if key != rows}):
        print(line)
    if columns:
        print(table(columns[0], found[rows]))


def _print_results(folder: Path) -> None:
    """The table that ends a run."""
    from grafting.report.text import results_table

    print(results_table(folder))


if __name__ == "__main__":
    main()
