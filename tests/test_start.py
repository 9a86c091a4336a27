"""What starts at once: the package and its command load PyTorch, and its compiler, only when something needs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import grafting
from grafting.console import Console
from grafting.runs import RunFolder

WITHOUT_TORCH = ["--version", "--help", "run --help", "run --nope", "study --help"]
CODE = """
import sys
from grafting.cli import main
sys.argv = ["graft", *{arguments}.split()]
try:
    main()
except SystemExit:
    pass
print(sorted(set({unwanted}) & set(sys.modules)))
"""


def loaded(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("arguments", WITHOUT_TORCH)
def test_help_and_a_mistyped_option_wait_for_no_torch(arguments: str) -> None:
    assert loaded(CODE.format(arguments=repr(arguments), unwanted=["torch", "numpy"])) == "[]"


def test_the_status_of_a_run_waits_for_no_torch(tmp_path: Path) -> None:
    plain = {"name": "x", "model": "m", "data": "d", "plan": [], "distill": {"steps": 10}, "finetune": None}
    with RunFolder.create(tmp_path, plain, Console(quiet=True)).writing("distill"):
        code = CODE.format(arguments=repr(f"status {tmp_path}"), unwanted=["torch"])
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "state: running" in done.stdout


def test_a_model_is_loaded_and_grafted_without_the_compiler() -> None:
    code = """
import sys, grafting
teacher = grafting.load_model("dit-fashion")
grafting.graft(teacher, [{"replace": {"target": "mha", "layers": "all", "with": "hyena_x"}}])
print(sorted({"torch._dynamo", "sympy", "diffusers", "transformers"} & set(sys.modules)))
"""
    assert loaded(code) == "[]"


def test_every_name_is_where_the_package_says() -> None:
    for name in grafting.__all__:
        assert getattr(grafting, name) is not None
    assert set(grafting._HOMES) | {"diffusion", "operators"} == set(grafting.__all__) <= set(dir(grafting))
    assert grafting.data.load_dataset  # a module nobody has imported by name
    with pytest.raises(AttributeError, match=r"^module 'grafting' has no attribute 'grft'$"):
        grafting.grft  # type: ignore[attr-defined]  # noqa: B018
    assert not hasattr(grafting, "__main__")  # importing it would run the command


def test_a_module_that_wants_another_is_not_said_to_be_missing_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def import_module(name: str) -> None:
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(grafting.importlib, "import_module", import_module)
    with pytest.raises(ModuleNotFoundError, match="triton"):
        grafting.something  # type: ignore[attr-defined]  # noqa: B018
