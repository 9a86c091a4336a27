"""Operators and families of other packages: known in this process, in a command, and in the processes it starts."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import tiny_dit
from pixart_tools import tiny_transformer
from tiny_runs import tiny_pipeline

from grafting import (
    GraftPlan,
    Replace,
    families,
    graft,
    load_graft,
    load_model,
    operators,
    plugins,
    save_graft,
    save_model,
)
from grafting.card import model_card
from grafting.console import Console
from grafting.errors import CheckpointError, GraftError, OperatorError
from grafting.families import base
from grafting.formats.published import export_published
from grafting.operators import registry

ACME = """
from grafting.families import DiTFamily, register_family
from grafting.operators import register
from torch import nn


@register("acme_mixer", targets=("mha",))
class AcmeMixer(nn.Linear):
    def __init__(self, *, dim: int, scale: float = 1.0):
        super().__init__(dim, dim)


class AcmeFamily(DiTFamily):
    name, names = "acme", "Acme-<size>"

    def owns(self, model):
        return type(model).__name__ == "Acme"

    def named(self, name):
        return None

    def reads(self, config):
        return config.get("_class_name") == "AcmeTransformer"


register_family(AcmeFamily())
"""


@pytest.fixture
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module `acme_grafts` that can be imported and was not; what it registers is gone after the test."""
    (tmp_path / "acme_grafts.py").write_text(ACME)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setattr(base, "_FAMILIES", dict(base._FAMILIES))
    monkeypatch.setattr(plugins, "_imported", set())
    monkeypatch.delitem(sys.modules, "acme_grafts", raising=False)
    monkeypatch.setenv(plugins.VARIABLE, "acme_grafts")
    return "acme_grafts"


def test_a_module_named_in_the_environment_registers_its_operators_and_families(acme: str) -> None:
    assert operators.get("acme_mixer").package == acme
    assert "acme_mixer" in operators.names()
    assert "acme" in families.families()


def test_a_graft_names_the_module_of_a_package_that_registers_its_operator(
    acme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "acme_parts").mkdir()
    (tmp_path / "acme_parts" / "__init__.py").write_text("")
    (tmp_path / "acme_parts" / "ops.py").write_text(ACME.split("class AcmeFamily")[0])
    known = dict(registry._entries)
    monkeypatch.setenv(plugins.VARIABLE, "acme_parts.ops")
    teacher, plan = tiny_dit(), [{"replace": {"target": "mha", "layers": [1], "with": "acme_mixer"}}]
    save_graft(graft(teacher, plan), tmp_path / "g")

    def forgotten(variable: str) -> None:
        monkeypatch.setattr(registry, "_entries", dict(known))
        monkeypatch.setattr(plugins, "_imported", set())
        monkeypatch.delitem(sys.modules, "acme_parts.ops", raising=False)
        monkeypatch.setenv(plugins.VARIABLE, variable)

    forgotten("acme_parts")  # which imports no module of its own
    with pytest.raises(OperatorError, match=r"by 'acme_parts\.ops': import acme_parts\.ops first"):
        load_graft(tmp_path / "g", base=teacher)
    file = tmp_path / "g" / "graft.json"
    now = file.read_text()
    file.write_text(now.replace("acme_parts.ops", "acme_parts"))  # as it was written once
    with pytest.raises(OperatorError, match="import that module first"):
        load_graft(tmp_path / "g", base=teacher)
    forgotten("acme_parts.ops")
    load_graft(tmp_path / "g", base=teacher)


def test_a_graft_by_an_operator_of_a_script_is_saved_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    exec(ACME.split("class AcmeFamily")[0], {"__name__": "__main__"})
    teacher, plan = tiny_dit(), [{"replace": {"target": "mha", "layers": [1], "with": "acme_mixer"}}]
    student = graft(teacher, plan)
    with pytest.warns(UserWarning, match="'acme_mixer' is defined in a script or notebook.*into a module"):
        save_graft(student, tmp_path / "g")
    load_graft(tmp_path / "g", base=teacher)  # where it is defined
    del registry._entries["acme_mixer"]
    with pytest.raises(OperatorError, match="'acme_mixer': it was defined in a script or notebook"):
        load_graft(tmp_path / "g", base=teacher)


def test_code_of_an_operator_that_changes_between_stages_is_warned_of(
    acme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = [{"replace": {"target": "mha", "layers": [1], "with": "acme_mixer"}}]
    pipeline = tiny_pipeline(tmp_path, plan=plan)
    pipeline.run.console = Console()
    pipeline.distill()
    held = pipeline.run.read()["inputs"]["operators"]
    assert held == {"acme_mixer": operators.get("acme_mixer").source_hash}
    assert "has changed" not in capsys.readouterr().err
    file = tmp_path / "acme_grafts.py"
    file.write_text(
        file.read_text().replace("super().__init__(dim, dim)", "super().__init__(dim, dim)  # other")
    )
    del vars(operators.get("acme_mixer"))["source_hash"]  # as in another process
    pipeline.finetune()
    assert (
        "warning: the code of operator 'acme_mixer' has changed since this run began"
        in capsys.readouterr().err
    )
    assert pipeline.run.read()["inputs"]["operators"] == held


def test_a_model_that_nobody_knows_is_asked_of_the_plugins(acme: str) -> None:
    class Acme(type(tiny_dit())):  # type: ignore[misc]
        pass

    model: Any = tiny_dit()
    model.__class__ = Acme
    base._FAMILIES["dit"] = SimpleNamespace(owns=lambda model: False)  # type: ignore[assignment]
    assert families.is_known(model)
    assert families.family_of(model).name == "acme"


def test_an_installed_package_is_found_by_its_entry_point(acme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(plugins.VARIABLE)
    monkeypatch.setattr(plugins, "_installed", lambda: [(acme, "an entry point of grafting.plugins")])
    assert "acme_mixer" in operators.names()


def test_entry_points_are_those_of_the_documented_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "acme-1.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (told / "entry_points.txt").write_text("[grafting.plugins]\nacme = acme_grafts\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = plugins._installed.__wrapped__()
    assert ("acme_grafts", "an entry point of grafting.plugins") in found


def test_a_plugin_that_fails_is_named_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugins.VARIABLE, "no_such_plugin")
    for _ in range(2):
        with pytest.raises(
            GraftError, match=r"'no_such_plugin', named in GRAFTING_PLUGINS.*ModuleNotFoundError"
        ):
            operators.names()
    assert operators.get("hyena_x").package == "grafting"  # what is known needs no plugin


def test_a_command_and_the_processes_it_starts_know_plugins(acme: str, tmp_path: Path) -> None:
    save_model(tiny_dit(), tmp_path / "model")
    (tmp_path / "plan.yaml").write_text(
        "- replace: {target: mha, layers: [1], with: {acme_mixer: {scale: 2.0}}}\n"
    )
    ran = subprocess.run(
        [sys.executable, "-m", "grafting", "explain", "model", "--plan", "plan.yaml"], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path])}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "acme_mixer" in ran.stdout
    with multiprocessing.get_context("spawn").Pool(1) as jobs:  # as graft study and graft encode start theirs
        assert jobs.apply(operators.describe, ("acme_mixer",)) == "scale (float, default 1.0)"


def test_what_is_of_no_known_family_is_told_of_plugins(tmp_path: Path) -> None:
    tiny_transformer().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("PixArtTransformer2DModel", "AcmeTransformer"))
    with pytest.raises(CheckpointError, match=r"'AcmeTransformer'.*of another family.*GRAFTING_PLUGINS"):
        load_model(tmp_path)
    with pytest.raises(GraftError, match=r"unknown architecture 'Acme-1'.*GRAFTING_PLUGINS"):
        load_model("arch:Acme-1")


def test_what_others_need_of_another_package_is_said_where_they_look(acme: str, tmp_path: Path) -> None:
    student = graft(tiny_dit(), GraftPlan([Replace("mha", [1], "acme_mixer"), Replace("mha", [2], "swa")]))
    save_graft(student, tmp_path / "graft")
    card = model_card(tmp_path / "graft")
    code = card.split("```python\n")[1].split("```")[0]
    assert code.startswith(f"import {acme}  # registers the operator 'acme_mixer'\nimport grafting\n")
    assert f"Needed beside grafting: `{acme}`." in card
    save_graft(graft(tiny_dit(), GraftPlan([Replace("mha", [2], "swa")])), tmp_path / "plain")
    assert "eeded beside grafting" not in model_card(tmp_path / "plain")


@pytest.mark.usefixtures("acme")
def test_an_operator_of_another_package_has_no_published_layout(tmp_path: Path) -> None:
    student = graft(tiny_dit(), GraftPlan([Replace("mha", [1], "acme_mixer")]))
    with pytest.raises(CheckpointError, match=r"'acme_mixer' has no published layout.*--format graft"):
        export_published(student, tmp_path / "x.pt")
    assert list(tmp_path.glob("*.pt")) == []


def test_an_operator_of_a_script_has_no_package_to_import(tmp_path: Path, acme: str) -> None:
    save_graft(graft(tiny_dit(), GraftPlan([Replace("mha", [1], "acme_mixer")])), tmp_path)
    text = (tmp_path / "graft.json").read_text().replace(f'"{acme}"', '"__main__"')
    (tmp_path / "graft.json").write_text(text)
    assert "\n# run the code that registers the operator 'acme_mixer' here\nimport grafting" in model_card(
        tmp_path
    )
