"""LoRA on the rest of a graft, weights shared by teacher and student, and gradient checkpointing in stage 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pixart_tools import captions, latents, save_tiny_pipeline, tiny_transformer
from several import together
from torch import Tensor, nn

import grafting
from grafting import GraftPlan, Replace
from grafting.conditioning import Caption, take
from grafting.data.dataset import ImageLabelDataset
from grafting.errors import CheckpointError, GraftError, RunError
from grafting.families import family_of
from grafting.lora import Lora, add_lora, is_lora, lora_of, lora_targets, merge_lora
from grafting.training import sharding

PLAN = GraftPlan([Replace("mha", [1, 3], "hyena_x"), Replace("mlp", [0], "mlp", {"ratio": 3}, train=False)])
SMALL: dict[str, Any] = {"batch_size": 4, "num_validation": 0, "precision": "fp32", "steps": 3, "warmup": 0}
T = torch.tensor([0, 999])


class Pairs:
    """Random latents with random captions, in memory."""

    name, content_hash, num_classes, caption_width, shape = "pairs", "0", 0, 16, (4, 8, 8)

    def __init__(self, size: int = 12) -> None:
        self.x, self.cond = latents(size), captions(size)

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: Any) -> tuple[Tensor, Caption]:
        return self.x[indices], take(self.cond, torch.as_tensor(indices))

    def subset(self, fraction: float, seed: int = 0) -> Pairs:
        return self

    def split(self, num_validation: int, seed: int = 0) -> tuple[Pairs, Pairs]:
        return self, self


def predicted(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return family_of(model).predict(model, latents(2), T, captions(2))


@pytest.fixture
def teacher() -> nn.Module:
    return tiny_transformer()


def tuned_beside_its_teacher() -> tuple[set[torch.dtype], bool]:
    """Stage 2 of a student in parts that shares its teacher's tensors: the teacher's types then, and its output."""
    # A move that shows on one device, as one from a GPU to the CPU does there.
    sharding._AWAY = torch.float64
    teacher = tiny_transformer()
    before = predicted(teacher)
    student = grafting.graft(teacher, GraftPlan([Replace("mha", [1], "hyena_x")]), share=True)
    assert {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}
    config = {**SMALL, "steps": 1, "shard": "full", "lora": {"rank": 2}, "objectives": {"output": 1.0}}
    grafting.finetune(student, Pairs(), config, teacher)
    return {p.dtype for p in teacher.parameters()}, torch.equal(predicted(teacher), before)


def test_a_student_in_parts_leaves_its_teacher_where_it_is() -> None:
    assert together(2, tuned_beside_its_teacher) == [({torch.float32}, True)] * 2


def test_adapters_change_nothing_until_they_are_trained(teacher: nn.Module) -> None:
    student = grafting.graft(teacher, PLAN)
    before, trainable = predicted(student), [p.requires_grad for p in student.parameters()]
    targets = lora_targets(student, None)
    # Per block: 4 projections of each attention that is left, and the two layers of each MLP that is left.
    assert len(targets) == 2 * 4 + 4 * 4 + 3 * 2
    assert not any(
        path.startswith(("transformer_blocks.1.attn1", "transformer_blocks.0.ff")) for path in targets
    )
    add_lora(student, Lora(rank=2, alpha=4, targets=targets), seed=1)
    assert torch.equal(predicted(student), before)
    adapters = {name: p for name, p in student.named_parameters() if is_lora(name)}
    assert len(adapters) == 2 * len(targets)
    assert [p.requires_grad for n, p in student.named_parameters() if n not in adapters] == trainable
    again = grafting.graft(teacher, PLAN)
    add_lora(again, Lora(rank=2, alpha=4, targets=targets), seed=1)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, student.get_parameter(name))
    with pytest.raises(RunError, match="adapters already; merge them first"):
        add_lora(student, Lora(rank=2, alpha=4, targets=targets))


def test_stage_2_trains_adapters_and_new_operators_only(teacher: nn.Module, tmp_path: Path) -> None:
    student = grafting.graft(teacher, PLAN)
    before = {name: p.clone() for name, p in student.named_parameters()}
    lora = {"rank": 2, "alpha": 8.0}
    result = grafting.finetune(
        student, Pairs(), {**SMALL, "lora": lora, "gradient_checkpointing": True}, teacher
    )
    operators = [
        p for path in (1, 3) for p in student.get_submodule(f"transformer_blocks.{path}.attn1").parameters()
    ]
    adapters = [p for name, p in student.named_parameters() if is_lora(name)]
    assert result.trained_params == sum(p.numel() for p in [*operators, *adapters])
    for name, parameter in student.named_parameters():
        plain = name.replace(".base_layer", "")
        moved = plain not in before or not torch.equal(parameter, before[plain])
        assert moved == (
            is_lora(name) or name.startswith(("transformer_blocks.1.attn1", "transformer_blocks.3.attn1"))
        )
    assert not student.gradient_checkpointing
    # y = W x + (alpha / rank) B A x
    layer: Any = student.get_submodule("transformer_blocks.2.attn2.to_q")
    x = torch.randn(5, 32)
    a, b = (getattr(layer, f"lora_{which}").default.weight for which in "AB")
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 4.0 * x @ a.T @ b.T)
    # Stored unmerged: the base's own weights are not in the file.
    grafting.save_graft(student, tmp_path / "graft")
    manifest = json.loads((tmp_path / "graft" / "graft.json").read_text())
    assert manifest["lora"] == {
        "rank": 2,
        "alpha": 8.0,
        "targets": list(lora_targets(teacher_of(student), None)),
    }
    from safetensors.torch import load_file

    held = load_file(next((tmp_path / "graft").glob("*.safetensors")))
    assert {name.split(".lora_")[0] for name in held if ".lora_" in name} == set(manifest["lora"]["targets"])
    assert not any("base_layer" in name or "default" in name for name in held)
    assert all(".lora_" in name or name.split(".")[1] in "013" for name in held)
    back = grafting.load_graft(tmp_path / "graft", base=teacher)
    assert torch.equal(predicted(back), predicted(student))
    assert lora_of(back) == lora_of(student)
    merged = merge_lora(back)
    assert lora_of(merged) is None
    assert not any(is_lora(name) or "base_layer" in name for name in merged.state_dict())
    torch.testing.assert_close(predicted(merged), predicted(student), atol=1e-5, rtol=1e-5)
    assert torch.equal(predicted(back), predicted(student))
    grafting.save_graft(merged, tmp_path / "merged")
    assert torch.equal(predicted(grafting.load_graft(tmp_path / "merged", base=teacher)), predicted(merged))


def teacher_of(student: nn.Module) -> nn.Module:
    """The same edits without adapters."""
    return grafting.graft(tiny_transformer(), PLAN)


def test_another_stage_2_takes_the_same_adapters(teacher: nn.Module) -> None:
    student = grafting.graft(teacher, PLAN)
    for _ in range(2):
        grafting.finetune(student, Pairs(), {**SMALL, "steps": 1, "lora": {"rank": 2, "alpha": 2.0}})
    with pytest.raises(RunError, match="rank 2 and alpha 2 already"):
        grafting.finetune(student, Pairs(), {**SMALL, "lora": {"rank": 3, "alpha": 2.0}})


def test_settings_that_cannot_be_used_are_errors_that_teach(
    teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = grafting.graft(teacher, PLAN)
    for lora, said in (
        ({"rank": 0}, "rank 0 trains nothing: give at least 1"), ({"rank": -1}, "rank -1 trains nothing"),
        ({"rank": 2.5}, "lora.rank=.2.5"), ({"alpha": 0}, "lora.alpha=.0"),
        ({"ranks": 2}, "'lora.ranks'.*did you mean"),
        ({"rank": 2, "targets": ["to_w"]}, "no linear layer outside of the new operators is called 'to_w'.*to_q"),
    ):  # fmt: skip
        with pytest.raises(RunError, match=said):
            grafting.finetune(student, Pairs(), {**SMALL, "lora": lora})
    with pytest.raises(RunError, match="train: blocks and lora: give one"):
        grafting.finetune(student, Pairs(), {**SMALL, "lora": {"rank": 2}, "train": "blocks"})
    grafting.finetune(student, Pairs(), {**SMALL, "steps": 1, "lora": {"rank": 1, "targets": ["attn2.to_q"]}})
    assert lora_of(student).targets == tuple(f"transformer_blocks.{i}.attn2.to_q" for i in range(4))
    with pytest.raises(CheckpointError, match="needs a rank"):
        Lora.from_dict({"rank": "2"}, "graft.json")
    dit = grafting.load_model("dit-fashion")
    data = ImageLabelDataset(torch.zeros(4, 1, 32, 32), torch.arange(4), num_classes=10)
    with pytest.raises(GraftError, match="'dit' has no gradient checkpointing"):
        grafting.finetune(dit, data, {**SMALL, "gradient_checkpointing": True})
    import builtins

    original = builtins.__import__

    def without_peft(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "peft":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(RunError, match=r"LoRA needs peft: pip install 'grafting\[text\]'"):
        add_lora(grafting.graft(teacher, PLAN), Lora(rank=1, alpha=1, targets=("proj_out",)))


def test_lora_goes_on_a_dit_as_well(tmp_path: Path) -> None:
    teacher = grafting.load_model("dit-fashion")
    student = grafting.graft(teacher, GraftPlan([Replace("mha", "interleaved-50", "hyena_x")]), share=True)
    data = ImageLabelDataset(torch.randn(8, 1, 32, 32).clamp(-1, 1), torch.arange(8), num_classes=10)
    before = [p.clone() for p in teacher.parameters()]
    grafting.finetune(student, data, {**SMALL, "objectives": {"output": 1}, "lora": {"rank": 2}}, teacher)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    grafting.save_graft(student, tmp_path / "graft")
    back = grafting.load_model(tmp_path / "graft")
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name])


def test_a_student_can_share_the_teachers_weights(teacher: nn.Module, tmp_path: Path) -> None:
    student = grafting.graft(teacher, PLAN, share=True)
    own = {p.data_ptr() for p in teacher.parameters()}
    new = {name for name, p in student.named_parameters() if p.data_ptr() not in own}
    prefixes = ("transformer_blocks.1.attn1", "transformer_blocks.3.attn1", "transformer_blocks.0.ff")
    assert new == {name for name, _ in student.named_parameters() if name.startswith(prefixes)}
    apart = grafting.graft(teacher, PLAN)
    assert torch.equal(predicted(student), predicted(apart))
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    for pupil in (student, apart):
        grafting.distill(pupil, teacher, Pairs(), {**SMALL, "fit_samples": 4})
        grafting.finetune(pupil, Pairs(), {**SMALL, "lora": {"rank": 2}}, teacher)
    for name, parameter in teacher.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
    torch.testing.assert_close(predicted(student), predicted(apart))
    grafting.save_graft(student, tmp_path / "graft")
    shared = grafting.load_graft(tmp_path / "graft", base=teacher, share=True)
    assert torch.equal(predicted(shared), predicted(student))
    assert sum(p.data_ptr() in own for p in shared.parameters()) > 60
    whole = grafting.graft(teacher, PLAN, share=True)
    with pytest.raises(RunError, match="share weights that would be trained"):
        grafting.finetune(whole, Pairs(), SMALL, teacher)
    grafting.finetune(apart := grafting.graft(teacher, PLAN), Pairs(), SMALL, teacher)
    grafting.save_graft(apart, tmp_path / "all")
    full = grafting.load_graft(
        tmp_path / "all", base=teacher, share=True
    )  # its weights differ: they are copies
    assert not {p.data_ptr() for p in full.parameters()} & own
    for name, parameter in teacher.named_parameters():
        assert torch.equal(parameter, before[name])


def test_checkpointing_gives_the_same_weights(teacher: nn.Module) -> None:
    found = []
    for on in (False, True):
        student = grafting.graft(teacher, PLAN)
        settings = {**SMALL, "objectives": {"diffusion": 1, "features": 1}, "gradient_checkpointing": on}
        grafting.finetune(student, Pairs(), settings, teacher)
        found.append(predicted(student))
    assert torch.equal(*found)


def test_a_run_with_adapters_resumes(tmp_path: Path) -> None:
    """Stopped in stage 2 and gone on with: the same adapters and operators."""
    from grafting.errors import Interrupted
    from grafting.training.loop import Quiet

    class Stopping(Quiet):
        kept: dict[str, Any] | None = None
        calls = 0

        def save_checkpoint(self, stage: str, step: int, state: Any, keep: int) -> None:
            self.kept = {**state}

        def load_checkpoint(self, stage: str) -> dict[str, Any] | None:
            return self.kept

        def stop_requested(self) -> int | None:
            self.calls += 1
            return 143 if self.calls == 3 else None

    folder = save_tiny_pipeline(tmp_path / "pipeline")
    settings = {**SMALL, "steps": 4, "lora": {"rank": 2}}
    whole = grafting.graft(grafting.load_model(folder), PLAN)
    grafting.finetune(whole, Pairs(), settings)
    journal = Stopping()
    with pytest.raises(Interrupted):
        grafting.finetune(
            grafting.graft(grafting.load_model(folder), PLAN), Pairs(), settings, journal=journal
        )
    resumed = grafting.graft(grafting.load_model(folder), PLAN)
    grafting.finetune(resumed, Pairs(), settings, journal=journal)
    assert torch.equal(predicted(resumed), predicted(whole))
