"""Study `donor-init`: on both families, its table is what its runs logged; what it can't use is refused at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_dit
from pixart_tools import save_tiny_pipeline

from grafting import save_model
from grafting.console import Console
from grafting.errors import GraftError
from grafting.runs import RunFolder
from grafting.studies import run_study
from grafting.synthesis import Synthesis, synthesize
from grafting.training.compute import Compute

QUIET = Console(quiet=True)
QUICK = [f"distill.{text}" for text in (
    "steps=2", "batch_size=4", "num_validation=4", "warmup=0", "log_every=1", "validate_every=1", "fit_samples=8",
    "precision=fp32", "cache_samples=8",
)]  # fmt: skip
LAYERS = {"mha": (1, 3, 5, 7, 9), "mlp": (2, 4, 6)}


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a teacher of ten blocks and its data."""
    folder = tmp_path_factory.mktemp("dit")
    save_model(tiny_dit(depth=10), folder / "model")
    x = np.random.default_rng(0).normal(size=(24, 1, 8, 8)).clip(-1, 1)
    np.savez(folder / "data.npz", arr_0=x.astype(np.float32), arr_1=np.arange(24) % 4)
    return [*QUICK, f"model={folder / 'model'}", f"data={folder / 'data.npz'}"]


@pytest.fixture(scope="module")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a text-to-image teacher of ten blocks and pairs of its own."""
    folder = tmp_path_factory.mktemp("pixart")
    model = save_tiny_pipeline(folder / "pipeline", num_layers=10)
    (folder / "prompts.txt").write_text("the red cat\nthe blue moon\n")
    drawn = Synthesis(num=16, steps=1, batch_size=16, shard_size=16, seed=0)
    synthesize(
        str(model), folder / "prompts.txt", folder / "pairs", drawn,
        compute=Compute(torch.device("cpu"), "fp32", 0, 1),
    )  # fmt: skip
    return [*QUICK, f"model={model}", f"data={folder / 'pairs'}"]


def logged(folder: Path, event: str) -> Iterator[dict[str, Any]]:
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        if (record := json.loads(line)).get("event") == event:
            yield record


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("dit", "blocks.{}.attn blocks.{}.mlp"),
        ("pixart", "transformer_blocks.{}.attn1 transformer_blocks.{}.ff"),
    ],
)
def test_the_table_is_what_the_runs_logged(
    family: str, names: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    settings = [*request.getfixturevalue(family), "seed=3"]
    page = run_study("donor-init", tmp_path / "study", QUIET, changes=settings)
    found = json.loads((page.parent / "study.json").read_text())
    mha, mlp = names.split()
    paths = [mha.format(layer) for layer in LAYERS["mha"]] + [mlp.format(layer) for layer in LAYERS["mlp"]]
    runs = {init: page.parent / "rows" / init for init in ("random", "donor")}
    (start,) = (record["error"] for record in logged(runs["donor"], "start"))
    assert len(found["rows"]) == len(paths) == 8
    for row, path in zip(found["rows"], paths, strict=True):
        assert [row[f"{kind}_0"] for kind in ("random", "copied", "fitted")] == [
            start[kind][path] for kind in ("random", "copied", "fitted")
        ]
        for init, folder in runs.items():
            assert row[f"{init}_end"] == min(r["error"][path] for r in logged(folder, "validation"))
        assert row["seed"] == 3
    # what it was run with, and how to run it again
    config = {init: RunFolder(folder).recipe() for init, folder in runs.items()}
    assert config["random"]["seed"] == config["donor"]["seed"] == found["protocol"]["seed"] == 3
    assert {key: found["protocol"][key] for key in ("steps", "batch_size", "num_validation")} == {
        "steps": 2, "batch_size": 4, "num_validation": 4
    }  # fmt: skip
    assert found["protocol"]["model"] == config["donor"]["model"]
    assert found["command"].startswith("graft study donor-init --set distill.steps=2 ")
    assert found["command"].endswith("--set seed=3 --seed 3")
    assert "graft study donor-init" in page.read_text()
    (page.parent / "study.json").unlink()
    again = run_study("donor-init", page.parent, QUIET, changes=settings, seed=3, resume=True)
    assert json.loads((again.parent / "study.json").read_text())["rows"] == found["rows"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("distill.fit_readout=false", "distill.fit_readout=false leaves the fit out: give true"),
        ("distill=null", "compares runs of stage 1, which distill=null leaves out: drop that setting"),
        ("distill.num_validation=0", "distill.num_validation=0 holds out none: give 1 or more"),
        ("finetune.steps=3", "has no stage 2"),
        ("plan=[]", "has a plan of its own"),
        ("seed=4", "--seed 5 and --set seed=4 differ"),
        ("model=arch:DiT-S/8-D9", "layer 9 does not exist: the model has 9 layers"),
    ],
)
def test_what_it_can_not_use_is_refused_before_the_first_run(
    change: str, words: str, dit: list[str], tmp_path: Path
) -> None:
    with pytest.raises(GraftError, match=words) as refused:
        run_study("donor-init", tmp_path / "study", QUIET, changes=[*dit, change], seed=5)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "study").exists()


def test_a_seed_and_a_preset_of_the_command_line(dit: list[str], tmp_path: Path) -> None:
    from grafting.studies.donor_init import _recipe

    assert _recipe("donor", dit, 5).seed == 5
    assert _recipe("donor", [*dit, "preset=small"], 0).finetune is None
