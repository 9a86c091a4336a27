"""Where models come from: the package, the hub by id; what is nothing is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import prediction, tiny_dit
from stage_tools import states_equal as equal_states

from grafting import load_model
from grafting.errors import CheckpointError
from grafting.surgery import source_of


@pytest.mark.parametrize("source", ["no-such-model", "nowhere/at/all", "", "/", "dit-fashion.pt", "a b"])
def test_sources_that_are_nothing_are_refused(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_model(source)
    assert "expected" in str(caught.value)


def test_the_hub_is_asked_for_ids_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    from grafting.loading import save_diffusers

    save_diffusers(tiny_dit(), tmp_path / "transformer")
    asked = []

    def download(name: str, **_: Any) -> str:
        asked.append(name)
        if name == "some/missing":
            raise OSError("404 Client Error\nmore lines")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert equal_states(load_model("some/dit"), tiny_dit())
    with pytest.raises(CheckpointError, match=r"'some/missing'.*404"):
        load_model("some/missing")
    assert asked == ["some/dit", "some/missing"]


def test_the_packaged_model_loads() -> None:
    model = load_model("dit-fashion")
    assert (model.config.depth, model.config.hidden_size, model.config.num_heads) == (12, 128, 4)
    assert (model.config.in_channels, model.config.input_size, model.config.num_tokens) == (1, 32, 64)
    assert source_of(model) == "dit-fashion"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert prediction(model).isfinite().all()
