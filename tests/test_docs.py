"""What the documents say exists, runs, and is complete: commands, options, keys, links, examples, the results table."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from grafting import operators
from grafting.recipes import EvaluateConfig, Recipe, SampleConfig, SynthesizeConfig, load_recipe, packaged
from grafting.studies import NAMES
from grafting.training.config import DistillConfig, FinetuneConfig

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PLANNED: set[str] = set()  # commands that the README says are not there yet


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """Fenced code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text(page), flags=re.DOTALL)


def commands() -> dict[str, set[str]]:
    """Every command and its options."""
    from typer.main import get_command

    from grafting.cli import app

    def options(command: Any) -> set[str]:
        own = {option for p in command.params for option in p.opts if option.startswith("--")}
        return own.union(*(options(part) for part in getattr(command, "commands", {}).values()))

    return {name: options(command) for name, command in get_command(app).commands.items()}  # type: ignore[attr-defined]


def test_every_command_is_in_the_readme() -> None:
    named = set(re.findall(r"^\| `graft ([a-z]+)|, `graft ([a-z]+) RUN`", README, flags=re.MULTILINE))
    named_flat = {word for pair in named for word in pair if word}
    assert set(commands()) == named_flat


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_and_options_in_the_pages_exist(page: Path) -> None:
    known = commands()
    content = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"\bgraft [a-z][^\n`|]*", content):
        name = line.split()[1].rstrip(".,;:)")
        if name in PLANNED or not line.startswith(f"graft {name}"):
            continue
        if name in known:
            given = set(re.findall(r"(?<!\S)--[a-z][a-z-]+", line.split("#")[0]))
            assert given <= known[name] | {"--help"}, line
    for name in re.findall(r"`graft ([a-z]+)", content):
        assert name in known or name in PLANNED, name


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_recipes_and_studies_in_the_pages_exist(page: Path) -> None:
    content = page.read_text(encoding="utf-8")
    for name in re.findall(r"\bgraft run ([a-z][a-z0-9_./-]*)", content):
        if not name.endswith(".yaml"):
            load_recipe(name)
    for name in re.findall(r"\bgraft study ([a-z][a-z0-9-]*)", content):
        assert name in NAMES, name


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" in target or target.startswith(("docs/images/", "docs/studies/", "docs/benchmarks/")):
            continue
        assert (page.parent / target).exists(), target


def test_every_key_of_a_recipe_is_documented() -> None:
    page = text("docs/recipes.md")
    for settings in (Recipe, DistillConfig, FinetuneConfig, SampleConfig, EvaluateConfig, SynthesizeConfig):
        for key in settings.model_fields:
            assert re.search(rf"`(?:[a-z]+\.)?{key}`", page), f"{settings.__name__}.{key}"


def test_every_operator_and_key_is_documented() -> None:
    page = text("docs/operators.md")
    for name in ("mha", "swa", "hyena_se", "hyena_x", "hyena_y", "mamba2", "mlp", "mlp_hyena_x"):
        assert name in page
        for key, default in operators.get(name).defaults.items():
            row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
            assert f"`{key}`" in row, (name, key)
            assert f"({default:g})" in row, (name, key)


@pytest.mark.parametrize("name", packaged())
def test_packaged_recipes_are_complete(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.about
    assert len(recipe.graft_plan) >= 1


def test_the_recipe_in_the_readme_is_one(tmp_path: Path) -> None:
    (block,) = blocks("README.md", "yaml")
    path = tmp_path / "recipe.yaml"
    path.write_text(block)
    recipe = load_recipe(path)
    assert recipe.model == "dit-fashion"
    for line in ("{swa: {window: 4}}", "mamba2"):
        path.write_text(block.replace("with: hyena_x", f"with: {line}"))
        assert load_recipe(path).graft_plan != recipe.graft_plan


def test_the_plan_in_the_pages_resolves() -> None:
    from grafting import GraftPlan, explain, load_model
    from grafting.yaml_io import load_yaml

    model = load_model("arch:DiT-S/8", device="meta")
    operators_only, depth = (
        explain(model, GraftPlan.from_dict(load_yaml(block, "plan", ValueError)))
        for block in blocks("docs/plans.md", "yaml")
    )
    assert {edit.entry.operator for edit in operators_only.edits} == {"hyena_x", "swa", "mlp"}
    assert depth.depth == (12, 6)
    assert {group.in_sequence for group in depth.groups} == {None}


def test_the_readme_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = blocks("README.md", "python")
    small = '"steps": 1, "batch_size": 4, "num_validation": 8'
    block = block.replace('"steps": 250', f'{small}, "fit_samples": 8')
    block = block.replace('{"optimizer"', f'{{{small}, "optimizer"')
    assert block.count(small) == 2
    block = block.replace("num=100, steps=10", "num=4, steps=1")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "samples.npz").is_file()
    assert (tmp_path / "samples.png").is_file()


def test_the_operator_examples_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from typing import Annotated

    from pydantic import Field

    from grafting.operators import registry
    from grafting.operators.base import Operator, linear
    from grafting.operators.filters import DepthwiseFilter

    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    given: dict[str, Any] = {
        "Annotated": Annotated, "Field": Field, "Operator": Operator, "DepthwiseFilter": DepthwiseFilter,
        "linear": linear, "register": operators.register, "Tensor": torch.Tensor,
    }  # fmt: skip
    for page, name in (("docs/operators.md", "mean_mixer"), ("CONTRIBUTING.md", "mix_neighbours")):
        (block,) = blocks(page, "python")
        exec(compile(block, page, "exec"), {**given, "__name__": "third_party"})
        module = operators.build(name, dim=8)
        assert module(torch.zeros(2, 5, 8)).shape == (2, 5, 8)


def test_the_latents_example_writes_what_load_dataset_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import AutoencoderKL

    from grafting.data import load_dataset

    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, norm_num_groups=4,
    )  # fmt: skip
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", lambda name: vae)
    (block,) = blocks("docs/real-size.md", "python")
    monkeypatch.chdir(tmp_path)
    batches = [(torch.zeros(2, 3, 8, 8), torch.tensor([3, 999]))] * 2
    exec(compile(block.replace('"cuda"', '"cpu"'), "real-size.md", "exec"), {"batches": batches})
    data = load_dataset("latents.safetensors")
    assert (len(data), data.shape, data.num_classes) == (4, (4, 4, 4), 1000)


def _script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_results_table_is_what_its_file_says() -> None:
    script = _script("readme_table")
    if script.SOURCE.is_file():
        assert script.rendered(README, script.table(json.loads(script.SOURCE.read_text()))) == README


def test_the_results_table_of_given_figures() -> None:
    script = _script("readme_table")
    protocol = {
        "num_samples": 1000, "sampler": "dpm++", "steps": 10, "guidance": 1.5,
        "reference": {"name": "fashion-train", "num": 60000}, "features": {"name": "fashion"},
    }  # fmt: skip
    stage = {"steps": 250, "image_visits": 16000, "seconds": 75.4, "share_of_pretraining": 0.004}
    data = {
        "evaluation": {
            "teacher": {"metrics": {"fd": 10.0, "label_accuracy": 0.9}, "protocol": protocol},
            "student": {"metrics": {"fd": 11.5, "label_accuracy": 0.891}, "protocol": protocol},
        },
        "stages": {
            "graft": {"model": {"params": [100, 110], "flops_per_image": [2e9, 1e9]}},
            "distill": stage,
            "finetune": stage,
        },
        "environment": {"threads": 2, "torch": "2.13.0"},
    }
    table = script.table(data)
    assert "| Frechet distance (lower is better) | 10.00 | 11.50 | 1.150 |" in table
    assert "| samples in their class | 90.0% | 89.1% | 0.990 |" in table
    assert "| FLOPs per forward pass | 2,000,000,000 | 1,000,000,000 | 0.500 |" in table
    assert "Together they took 0.80% of the FLOPs" in table
    text = script.rendered("a\n<!-- results:begin x -->\nold\n<!-- results:end -->\nb\n", table)
    start, end = text.split(table)
    assert start == "a\n<!-- results:begin x -->\n"
    assert end == "\n<!-- results:end -->\nb\n"


def test_the_page_on_python_runs_and_says_what_is_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from conftest import tiny_dit

    generator = torch.Generator().manual_seed(0)
    data = (torch.randn(24, 1, 8, 8, generator=generator).clamp(-1, 1), torch.arange(24) % 4)
    given: dict[str, Any] = {"teacher": tiny_dit().train(), "data": data, "out": tmp_path}
    page = blocks("docs/python.md", "python")
    assert len(page) == 7
    for block in page:
        state = torch.get_rng_state()
        exec(
            compile(block.replace('"steps": 250', '"steps": 2, "batch_size": 4'), "python.md", "exec"), given
        )
        if "kept" in block:  # before the student learns on
            weight = given["fewer"].blocks[3].attn.in_proj.weight
            assert torch.equal(weight, given["student"].blocks[3].attn.in_proj.weight)
        if "distill" in block:
            assert torch.equal(state, torch.get_rng_state())
            assert given["student"].training
            assert not given["teacher"].training
    assert "layer 1 mha: mha -> hyena_x" in capsys.readouterr().out
    student, fewer = given["student"], given["fewer"]
    assert type(fewer.blocks[1].attn) is type(given["teacher"].blocks[1].attn)
    assert {name for name, p in student.named_parameters() if p.requires_grad} == set(given["weights"])
    assert len(given["losses"]) == 2
    assert len(given["errors"]) == 1
    assert given["images"].shape == (4, 1, 8, 8)
    assert (tmp_path / "samples.npz").is_file()


def test_the_readme_s_plot_is_the_study_s() -> None:
    script = _script("readme_plot")
    page = (ROOT / "docs" / "studies" / "table4" / "study.html").read_text(encoding="utf-8")
    drawn = (ROOT / "docs" / "images" / "table4.svg").read_text(encoding="utf-8")
    assert drawn == script.standalone(page[page.index("<svg") : page.index("</svg>") + len("</svg>")])
    assert "var(" not in drawn
