"""diffusers' DiT folders: what this package's DiT can't compute is refused, the rest is the published function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_dit

from grafting import load_model
from grafting.errors import CheckpointError
from grafting.exports import export_model
from grafting.families import family_of
from grafting.formats import dit_states


def stock(*, tied: bool = True, **changes: Any) -> Any:
    """A DiT as diffusers makes it: every block draws embedders of its own; tied: block 0's are copied to all."""
    from diffusers import DiTTransformer2DModel

    shape: dict[str, Any] = {
        "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 4,
        "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 7, **changes,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DiTTransformer2DModel(**shape).eval()
    for block in model.transformer_blocks[1:] if tied else ():
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


def difference(ours: torch.nn.Module, theirs: Any) -> float:
    """The largest relative error of a prediction."""
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(3, 4, 8, 8, generator=generator), torch.tensor([10, 500, 999])
    y = torch.tensor([1, 3, 7])
    with torch.no_grad():
        wanted = theirs(x, timestep=t, class_labels=y).sample
        found = family_of(ours).predict(ours, x, t, y)
    return float((found - wanted).abs().max() / wanted.abs().max())


def test_embedders_of_their_own_in_the_blocks_are_refused(tmp_path: Path) -> None:
    stock(tied=False).save_pretrained(tmp_path / "drawn")
    with pytest.raises(CheckpointError, match=r"drawn.*embedders of block 1 differ from those of block 0"):
        load_model(tmp_path / "drawn")
    trained = stock()
    with torch.no_grad():  # one label of one block, by the least bit
        table = trained.transformer_blocks[2].norm1.emb.class_embedder.embedding_table.weight
        table[6, 0] = torch.nextafter(table[6, 0], torch.tensor(9.0))
    trained.save_pretrained(tmp_path / "trained")
    with pytest.raises(
        CheckpointError, match=r"block 2 .*'transformer_blocks\.2\..*embedding_table\.weight'"
    ):
        load_model(tmp_path / "trained")


def test_a_block_without_its_embedders_is_no_dit_of_diffusers() -> None:
    state = {
        name: tensor for name, tensor in stock().state_dict().items() if "blocks.3.norm1.emb." not in name
    }
    config = dit_states.diffusers_config(tiny_dit().config)
    config |= {"num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8}
    with pytest.raises(CheckpointError, match=r"'transformer_blocks\.3\.norm1\.emb\..*' is missing"):
        dit_states.from_diffusers(state, config)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("activation_fn", "gelu", "'gelu-approximate'"),
        ("activation_fn", "geglu", "'gelu-approximate'"),
        ("attention_bias", False, "True"),
        ("norm_elementwise_affine", True, "False"),
        ("norm_eps", 1e-2, "1e-05 or 1e-06"),
    ],
)
def test_settings_of_another_function_are_refused(
    tmp_path: Path, key: str, value: object, expected: str
) -> None:
    stock(**{key: value}).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{key} is {value!r}.*expected {expected}, as"):
        load_model(tmp_path)


def test_another_kind_of_norm_is_refused(tmp_path: Path) -> None:
    stock().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "norm_type": "ada_norm"}))
    with pytest.raises(CheckpointError, match="norm_type is 'ada_norm'"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        ({"norm_eps": 1e-6}, 1e-6),
        ({}, 1e-5),  # diffusers' default epsilon, 1e-5
        ({"upcast_attention": True}, 1e-5),
        ({"dropout": 0.1}, 1e-5),
    ],
    ids=str,
)
def test_the_timestep_frequencies_are_the_published_ones(
    tmp_path: Path, changes: dict[str, Any], bound: float
) -> None:
    """All that differs from diffusers' class is its shift of them, and an epsilon (docs/python.md)."""
    theirs = stock(**changes)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert difference(ours, theirs) > 1e-3
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    assert difference(ours, theirs) <= bound


def test_a_folder_of_diffusers_goes_out_with_the_weights_it_came_with(tmp_path: Path) -> None:
    from diffusers import DiTTransformer2DModel

    theirs = stock()
    theirs.save_pretrained(tmp_path / "in")
    export_model(str(tmp_path / "in"), tmp_path / "out", "diffusers")
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "out").state_dict()
    given = theirs.state_dict()
    assert set(again) == set(given)
    assert all(torch.equal(again[name], given[name]) for name in given)
