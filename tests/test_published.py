"""The 22 published grafted checkpoints, at a small width: each imports without a plan, and each damage is named.

The files are written here key by key, from the published DiT's layout and the operators' published keys
(fixtures/operators.json), not by this package's models. Axes: N tokens, D width.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES
from latent_tools import save_vae
from safetensors.torch import save_file
from torch import Tensor

from grafting import cli, load_graft, load_model
from grafting.diffusion import sample
from grafting.errors import CheckpointError
from grafting.formats.published import import_published
from grafting.plan import GraftPlan
from grafting.surgery import record_of

Graft = Callable[..., tuple[int, str, str]]
DEPTH, WIDTH, HEADS, TOKENS, CLASSES = 8, 32, 4, 16, 10
OPERATORS: dict[str, Any] = json.loads((FIXTURES / "operators.json").read_text())
# Published operator name, by target -> case of fixtures/operators.json, and the operator and keys a plan has for it.
MHA: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mha": ("mha", "mha", {}),
    "hyena_se": ("hyena_se", "hyena_se", {}),
    "hyena_x": ("hyena_x", "hyena_x", {}),
    "hyena_y": ("hyena_y", "hyena_y", {}),
    "swa": ("swa", "swa", {}),
    "mamba_2": ("mamba2", "mamba2", {}),
}
MLP: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mlp_r_4": ("mlp_r4", "mlp", {}),
    "mlp_r_3": ("mlp_r3", "mlp", {"ratio": 3}),
    "mlp_r_6": ("mlp_r6", "mlp", {"ratio": 6}),
    "hyena_x": ("mlp_hyena_x", "mlp_hyena_x", {}),
}
RATIOS = {
    "50p": [i for i in range(DEPTH) if i % 2],
    "50p_ablation": [i for i in range(DEPTH) if i % 2],  # a fifth of the data: the same form
    "75p": [i for i in range(DEPTH) if i % 4],
    "100p": list(range(DEPTH)),
}
NAMES = [
    "mlp-mlp_r_4-100p",
    *(f"mlp-{operator}-{ratio}" for operator in ("mlp_r_3", "mlp_r_6", "hyena_x") for ratio in ("50p", "75p")),
    "mha-mha-100p",
    *(f"mha-{operator}-{ratio}" for operator in ("hyena_se", "hyena_x", "hyena_y", "swa")
      for ratio in ("50p", "75p", "50p_ablation")),
    "mha-mamba_2-50p", "mha-mamba_2-75p",
]  # fmt: skip


def mlp_keys(ratio: int) -> dict[str, list[int]]:
    inner = ratio * WIDTH
    return {
        "fc1.weight": [inner, WIDTH], "fc1.bias": [inner], "fc2.weight": [WIDTH, inner], "fc2.bias": [WIDTH],
    }  # fmt: skip


def operator_keys(case: str) -> dict[str, list[int]]:
    match = re.fullmatch(r"mlp_r(\d)", case)
    return mlp_keys(int(match[1])) if match else OPERATORS[case]["keys"]


def shapes(name: str) -> dict[str, list[int]]:
    """Every key of `ema` with its shape."""
    target, operator, ratio = name.split("-")
    case = (MHA if target == "mha" else MLP)[operator][0]
    found: dict[str, list[int]] = {
        "pos_embed": [1, TOKENS, WIDTH],
        "x_embedder.proj.weight": [WIDTH, 4, 2, 2], "x_embedder.proj.bias": [WIDTH],
        "t_embedder.mlp.0.weight": [WIDTH, 256], "t_embedder.mlp.0.bias": [WIDTH],
        "t_embedder.mlp.2.weight": [WIDTH, WIDTH], "t_embedder.mlp.2.bias": [WIDTH],
        "y_embedder.embedding_table.weight": [CLASSES + 1, WIDTH],
    }  # fmt: skip
    for layer in range(DEPTH):
        replaced = layer in RATIOS[ratio]
        seams = {
            "attn": operator_keys(case if target == "mha" and replaced else "mha"),
            "mlp": operator_keys(case if target == "mlp" and replaced else "mlp_r4"),
        }
        for seam, keys in seams.items():
            found |= {f"blocks.{layer}.{seam}.{key}": shape for key, shape in keys.items()}
        found[f"blocks.{layer}.adaLN_modulation.1.weight"] = [6 * WIDTH, WIDTH]
        found[f"blocks.{layer}.adaLN_modulation.1.bias"] = [6 * WIDTH]
    found |= {
        "final_layer.linear.weight": [32, WIDTH], "final_layer.linear.bias": [32],
        "final_layer.adaLN_modulation.1.weight": [2 * WIDTH, WIDTH], "final_layer.adaLN_modulation.1.bias": [2 * WIDTH],
    }  # fmt: skip
    return found


def state(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {key: 0.1 * torch.randn(shape, generator=generator) for key, shape in shapes(name).items()}


def content(ema: dict[str, Tensor], name: str) -> dict[str, Any]:
    """What `torch.save` is given at the end of a published run."""
    live = {key: tensor + 0.01 for key, tensor in ema.items()}
    moments = {
        number: {
            "step": torch.tensor(50_000.0),
            "exp_avg": torch.zeros_like(tensor),
            "exp_avg_sq": torch.zeros_like(tensor),
        }
        for number, tensor in enumerate(list(live.values())[:3])
    }
    group = {
        "lr": 1e-4,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0,
        "params": list(range(len(live))),
    }
    return {
        "model": live, "ema": ema, "opt": {"state": moments, "param_groups": [group]},
        "args": argparse.Namespace(model="DiT-XL/2", image_size=256, run=f"dit-xl2-{name}", lr=1e-4, resume=None),
        "train_steps": 50_000,
    }  # fmt: skip


def write(folder: Path, name: str, ema: dict[str, Tensor] | None = None) -> Path:
    path = folder / f"dit-xl2-{name}-fid2.70" / "model.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content(state(name) if ema is None else ema, name), path)
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Graft:
    """Call `graft` in this process: (exit status, stdout, stderr)."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["graft", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        output = capsys.readouterr()
        return int(stop.value.code or 0), output.out, output.err

    return call


def test_there_are_22() -> None:
    assert len(NAMES) == len(set(NAMES)) == 22
    assert len(RATIOS["50p"]) == DEPTH / 2
    assert len(RATIOS["75p"]) == DEPTH * 3 / 4


@pytest.mark.parametrize("name", NAMES)
def test_each_imports_without_a_plan_and_comes_back(run: Graft, tmp_path: Path, name: str) -> None:
    target, operator, ratio = name.split("-")
    _, wanted, config = (MHA if target == "mha" else MLP)[operator]
    ema = state(name)
    file = write(tmp_path, name, ema)
    code, _, stderr = run("import", file, "--out", tmp_path / "g", "--num-heads", HEADS)
    assert (code, stderr) == (0, "")
    model = load_model(tmp_path / "g")
    record = record_of(model)
    assert record is not None
    if operator in ("mha", "mlp_r_4"):  # the donor's own keys: nothing says what was replaced
        assert len(record.plan) == 0
    else:
        (entry,) = record.plan
        assert (entry.target, entry.operator, entry.config.to_dict()) == (target, wanted, config)
        assert list(entry.layers) == RATIOS[ratio]
    # the very tensors, and back into the published layout
    code, _, stderr = run("export", tmp_path / "g", "--format", "published", "--out", tmp_path / "again.pt")
    assert (code, stderr) == (0, "")
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert set(again) == {"model", "ema", "opt", "args", "train_steps"}
    for part in ("model", "ema"):
        assert set(again[part]) == set(ema)
        assert all(torch.equal(again[part][key], tensor) for key, tensor in ema.items())
    # it samples
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    x0 = sample(model, noise, torch.tensor([0, CLASSES - 1]), steps=2, sampler="dpm++", guidance=1.5)
    assert x0.shape == (2, 4, 8, 8)
    assert torch.isfinite(x0).all()


def test_an_imported_graft_goes_on_in_a_run_folder(run: Graft, tmp_path: Path) -> None:
    name = "mha-hyena_se-50p"
    file, teacher = write(tmp_path, name), tmp_path / "teacher.pt"
    torch.save({"ema": state("mha-mha-100p")}, teacher)
    assert run("import", file, "--out", tmp_path / "g", "--num-heads", HEADS)[0] == 0
    x = torch.randn(40, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    save_file({"x": x, "y": torch.arange(40) % CLASSES}, tmp_path / "latents.safetensors")
    recipe = {
        "model": str(teacher), "num_heads": HEADS, "data": str(tmp_path / "latents.safetensors"),
        "student": str(tmp_path / "g"), "evaluate": None,
        "sample": {"num": 4, "steps": 2, "vae": str(save_vae(tmp_path / "vae"))},
        "finetune": {"steps": 2, "batch_size": 4, "num_validation": 4, "warmup": 0},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    code, _, stderr = run("run", tmp_path / "recipe.yaml", "--out", tmp_path / "run")
    assert code == 0, stderr
    steps = json.loads((tmp_path / "run" / "run.json").read_text())
    assert "distill" not in json.dumps(steps["stages"])  # the graft has had its stage 1
    tuned, imported = load_model(tmp_path / "run"), load_model(tmp_path / "g")
    assert record_of(tuned).plan == record_of(imported).plan == GraftPlan.load(tmp_path / "run" / "plan.yaml")
    moved = {
        key: (tensor - tuned.state_dict()[key]).abs().max() for key, tensor in imported.state_dict().items()
    }
    assert 0 < max(moved.values()) < 0.01  # two steps of 5e-4 away from where it was
    # the same in single verbs
    arguments = ("apply", teacher, "--num-heads", HEADS, "--data", recipe["data"])
    assert run(*arguments, "--student", tmp_path / "g", "--out", tmp_path / "applied")[0] == 0
    applied = load_model(tmp_path / "applied").state_dict()
    assert all(torch.equal(applied[key], tensor) for key, tensor in imported.state_dict().items())
    # a run stands for its graft
    assert run(*arguments, "--student", tmp_path / "run", "--out", tmp_path / "again")[0] == 0
    again = load_model(tmp_path / "again").state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in tuned.state_dict().items())
    assert record_of(load_graft(tmp_path / "run")).plan == record_of(tuned).plan
    code, _, stderr = run(*arguments, "--student", tmp_path, "--out", tmp_path / "neither")
    assert (code, stderr.count("\n")) == (2, 1)
    assert "is not a graft: it has no graft.json, nor a run's graft/graft.json" in stderr
    # what does not fit is one line
    code, _, stderr = run(*arguments, "--out", tmp_path / "neither")
    assert (code, stderr.count("\n")) == (2, 1)
    assert "--plan FILE or --student FOLDER" in stderr
    recipe["plan"] = [{"replace": {"target": "mha", "layers": "all", "with": "swa"}}]
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    code, _, stderr = run("run", tmp_path / "recipe.yaml", "--out", tmp_path / "both")
    assert (code, stderr.count("\n")) == (2, 1)
    assert "plan and student" in stderr
    for given, said in (
        ({"plan": [], "locality": "found.json"}, "a saved graft (student) has chosen"),
        ({"plan": [], "sample": {"prompts": "emoji-held-out"}}, "this one takes class labels"),
    ):
        (tmp_path / "recipe.yaml").write_text(json.dumps({**recipe, **given}))
        code, _, stderr = run("run", tmp_path / "recipe.yaml", "--out", tmp_path / "both")
        assert (code, stderr.count("\n")) == (2, 1)
        assert said in stderr
    key, other = "y_embedder.embedding_table.weight", state("mha-mha-100p")
    torch.save({"ema": {**other, key: torch.cat([other[key], other[key][:1]])}}, teacher)
    code, _, stderr = run(*arguments, "--student", tmp_path / "g", "--out", tmp_path / "other")
    assert (code, stderr.count("\n")) == (2, 1)
    assert "another architecture" in stderr
    assert not (tmp_path / "neither").exists()
    assert not (tmp_path / "both").exists()


# One layout per form of a seam; damage in the others reads the same.
LAYOUTS = ["mha-mha-100p", "mha-hyena_se-50p", "mha-hyena_y-75p", "mha-swa-50p", "mha-mamba_2-75p",
           "mlp-mlp_r_3-50p", "mlp-hyena_x-75p"]  # fmt: skip


def damageable(name: str) -> list[str]:
    """Keys of a seam that was replaced; for the self-graft all kinds of keys."""
    keys = list(shapes(name))
    if name == "mha-mha-100p":
        return [key for key in keys if not key.startswith("blocks.") or key.startswith("blocks.4.")]
    return [
        key for key in keys if key.startswith("blocks.7.attn." if name.startswith("mha") else "blocks.7.mlp.")
    ]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("damage", ["missing", "longer", "scalar", "empty"])
def test_a_damaged_tensor_is_named(tmp_path: Path, name: str, damage: str) -> None:
    whole = state(name)
    for key in damageable(name):
        if damage == "longer" and key == "y_embedder.embedding_table.weight":
            continue  # one more class is a whole model
        ema = dict(whole)
        tensor = ema.pop(key)
        ema |= {
            "missing": {},
            "longer": {key: torch.cat([tensor, tensor[:1]])},
            "scalar": {key: tensor.sum()},
            "empty": {key: tensor[:0]},
        }[damage]
        error = refused(tmp_path, ema)
        seam = ".".join(key.split(".")[:3]) if key.startswith("blocks.") else key
        assert key in error or (seam in error and key.split(".", 3)[-1] in error), (key, error)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_does_not_belong_is_named(tmp_path: Path, name: str) -> None:
    whole = state(name)
    for key in ("extra", "blocks.3.attn.extra.weight", "blocks.4.mlp.extra.bias", "blocks.5.extra"):
        assert "extra" in refused(tmp_path, {**whole, key: torch.zeros(3)})
    assert "blocks.8" in refused(tmp_path, {**whole, "blocks.8.adaLN_modulation.1.bias": torch.zeros(192)})
    without = {key: tensor for key, tensor in whole.items() if not key.startswith("blocks.5.")}
    assert "block 5" in refused(tmp_path, without)
    bad = {**whole, "blocks.7.adaLN_modulation.1.bias": torch.full((6 * WIDTH,), float("nan"))}
    assert "blocks.7.adaLN_modulation.1.bias" in refused(tmp_path, bad)


def refused(folder: Path, ema: dict[str, Tensor]) -> str:
    torch.save({"ema": ema}, folder / "x.pt")
    with pytest.raises(CheckpointError) as error:
        import_published(folder / "x.pt", num_heads=HEADS)
    assert "x.pt" in str(error.value)
    return str(error.value)
