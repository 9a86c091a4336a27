"""The DiT: equal to the published code's tensors and to diffusers' class, at every size, on any device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, prediction, tiny_dit
from torch import Tensor

from grafting import load_model
from grafting.errors import CheckpointError, GraftError
from grafting.families import family_of
from grafting.formats import dit_states
from grafting.loading import save_diffusers
from grafting.models.dit import DiT, DiTConfig, named_config, sincos_2d, timestep_features

SPEC = json.loads((FIXTURES / "dit.json").read_text())


@pytest.fixture(scope="module")
def published() -> torch.nn.Module:
    return load_model(FIXTURES / "published_format_base.pt", num_heads=4)


def diffusers_model(config: DiTConfig, **changes: object) -> torch.nn.Module:
    """diffusers' class with the published timestep frequencies (its own are shifted by one)."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(**{**dit_states.diffusers_config(config), **changes}).eval()
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model


def test_forward_is_the_published_one(published: torch.nn.Module, reference: dict[str, Tensor]) -> None:
    assert published.config.to_dict() == {**SPEC["config"], "mlp_ratio": 4.0, "null_class": True}
    with torch.no_grad():
        found = published(reference["x"], reference["t"], reference["y"])
    assert (found - reference["forward"]).abs().max() <= 1e-5


def test_state_names_are_the_published_ones(published: torch.nn.Module, reference: dict[str, Tensor]) -> None:
    state = {k.removeprefix("state/"): v for k, v in reference.items() if k.startswith("state/")}
    found = published.state_dict()
    assert set(found) == set(state)
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert (DiT(published.config).pos_embed - state["pos_embed"]).abs().max() < 1e-6


def test_guidance_is_the_published_one(published: torch.nn.Module, reference: dict[str, Tensor]) -> None:
    x, t, y = reference["x"], reference["t"], reference["y"]
    null = torch.full_like(y, 10)
    with torch.no_grad():
        found = published.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]), 1.5)
        ours = family_of(published).predict_guided(published, x, t, y, 1.5)
    wanted = reference["forward_with_cfg_1.5"]
    assert (found - wanted).abs().max() <= 1e-5
    assert (ours - wanted[:3]).abs().max() <= 1e-5


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 16])
def test_guidance_acts_on_the_first_three_channels_at_most(channels: int) -> None:
    model = tiny_dit(in_channels=channels)
    x = torch.randn(2, channels, 8, 8)
    t, y, null = torch.tensor([10, 900]), torch.tensor([0, 2]), torch.tensor([4, 4])
    with torch.no_grad():
        plain, empty = model(x, t, y), model(x, t, null)
        guided = family_of(model).predict_guided(model, x, t, y, 3.0)
        doubled = model.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]), 3.0)
    k = min(3, channels)
    wanted = torch.cat([empty[:, :k] + 3.0 * (plain[:, :k] - empty[:, :k]), plain[:, k:]], dim=1)
    assert (guided - wanted).abs().max() < 1e-5
    assert (doubled[:2] - wanted).abs().max() < 1e-5
    assert (doubled[2:, k:] - empty[:, k:]).abs().max() < 1e-5  # the second half keeps its own rest


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"in_channels": 4, "input_size": 16, "num_classes": 10},
        {"in_channels": 3, "patch_size": 4, "input_size": 12},
        {"learn_sigma": False, "hidden_size": 24, "num_heads": 3},
    ],
    ids=str,
)
def test_equals_diffusers_class(changes: dict[str, int]) -> None:
    ours = tiny_dit(seed=2, **changes)
    theirs = diffusers_model(ours.config)
    theirs.load_state_dict(dit_states.to_diffusers(ours.state_dict()), strict=True)
    size, channels = ours.config.input_size, ours.config.in_channels
    x, t = torch.randn(4, channels, size, size), torch.tensor([0, 1, 500, 999])
    y = torch.tensor([0, 1, 2, ours.config.num_classes])
    with torch.no_grad():
        wanted = theirs(x, timestep=t, class_labels=y).sample
        found = ours(x, t, y)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_diffusers_layout_round_trips_every_tensor(model: DiT) -> None:
    state = model.state_dict()
    there = dit_states.to_diffusers(state)
    config, back = dit_states.from_diffusers(there, dit_states.diffusers_config(model.config))
    assert config == model.config
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)
    again = dit_states.to_diffusers(back)
    assert set(again) == set(there) == set(diffusers_model(model.config).state_dict())
    assert all(torch.equal(again[name], there[name]) for name in there)


@pytest.mark.parametrize("pipeline", [False, True])
@pytest.mark.parametrize("safe", [False, True])
def test_diffusers_folder_loads(tmp_path: Path, pipeline: bool, safe: bool) -> None:
    ours = tiny_dit(seed=4)
    theirs = diffusers_model(ours.config)
    theirs.load_state_dict(dit_states.to_diffusers(ours.state_dict()))
    theirs.save_pretrained(tmp_path / "transformer" if pipeline else tmp_path, safe_serialization=safe)
    loaded = load_model(tmp_path)
    assert loaded.config == ours.config
    state = ours.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def test_what_we_save_for_diffusers_is_read_by_diffusers(tmp_path: Path, model: DiT) -> None:
    from diffusers import DiTTransformer2DModel

    save_diffusers(model, tmp_path)
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path).eval()
    state = dit_states.to_diffusers(model.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in theirs.state_dict().items())
    assert torch.equal(prediction(load_model(tmp_path)), prediction(model))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"_class_name": "UNet2DModel"}, "UNet2DModel"),
        ({"num_attention_heads": "many"}, "config.json"),
        ({"num_layers": 9}, "transformer_blocks.4"),
        ({"in_channels": 3}, "x_embedder"),
    ],
)
def test_wrong_diffusers_folders_are_refused(
    tmp_path: Path, model: DiT, change: dict[str, object], word: str
) -> None:
    save_diffusers(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=word):
        load_model(tmp_path)


def expected_parameters(depth: int, width: int, patch: int, tokens: int) -> int:
    """By hand: adaLN 6D(D+1), attention 4D(D+1), MLP 8D^2 + 5D a block; embedders; head."""
    block = 6 * width * (width + 1) + 4 * width * (width + 1) + 8 * width**2 + 5 * width
    embed = (4 * patch**2 + 1) * width + (256 + 1) * width + width * (width + 1) + 1001 * width
    head = 2 * width * (width + 1) + (width + 1) * 8 * patch**2
    return depth * block + embed + head + tokens * width


@pytest.mark.parametrize(
    ("name", "depth", "width", "heads"),
    [(f"DiT-{size}/{patch}", *shape) for patch in (2, 4, 8) for size, shape in
     {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}.items()]
    + [("DiT-XL/2-512", 28, 1152, 16), ("DiT-XL/2-D14", 14, 1152, 16)],
)  # fmt: skip
def test_published_sizes(name: str, depth: int, width: int, heads: int) -> None:
    config = named_config(name)
    assert (config.depth, config.hidden_size, config.num_heads) == (depth, width, heads)
    model = load_model(f"arch:{name}", device="meta")
    count = sum(p.numel() for p in model.parameters())
    assert count == expected_parameters(depth, width, config.patch_size, config.num_tokens)
    assert all(p.is_meta for p in model.parameters())


def test_xl_2_has_the_published_number_of_parameters() -> None:
    model = load_model("arch:DiT-XL/2", device="meta")
    assert sum(p.numel() for p in model.parameters()) == 675_129_632
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 674_834_720


def test_random_weights_are_the_same_at_every_call_and_disturb_no_generator() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = load_model("arch:DiT-S/8-D1").state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    other = load_model("arch:DiT-S/8-D1").state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_flops_are_those_that_pytorch_counts(model: DiT) -> None:
    """Matrix products only, so per operator: ours says what PyTorch's counter says of the rest."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    ours = family_of(model).flops_per_image(model)
    # Table 4 counts the softmax too (2 N^2 H a layer), which is no matrix product.
    assert ours == pytest.approx(counter.get_total_flops() + 4 * 2 * 16**2 * 4, rel=1e-9)


def test_random_weights_start_as_the_identity_with_zero_output() -> None:
    model = DiT(tiny_dit().config)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        h = model.x_embedder(x) + model.pos_embed
        c = model.conditioning(torch.tensor([3, 4]), torch.tensor([0, 1]))
        assert torch.equal(model.blocks[0](h, c), h)
        assert model(x, torch.tensor([3, 4]), torch.tensor([0, 1])).abs().max() == 0


def test_position_table_and_timestep_features_in_closed_form() -> None:
    table = sincos_2d(8, (3, 3))[0].double()
    for token in range(9):
        row, column = divmod(token, 3)
        wanted = []
        for position in (column, row):
            angles = [position / 10000 ** (k / 2) for k in range(2)]
            wanted += [*torch.tensor(angles).sin().tolist(), *torch.tensor(angles).cos().tolist()]
        assert (table[token] - torch.tensor(wanted, dtype=torch.float64)).abs().max() < 1e-6
    features = timestep_features(torch.tensor([7]), 4)[0]
    wanted_features = (
        torch.tensor([7.0, 7 / 100]).cos().tolist() + torch.tensor([7.0, 7 / 100]).sin().tolist()
    )
    assert features.tolist() == pytest.approx(wanted_features, abs=1e-6)


def test_bf16_follows_fp32(model: DiT) -> None:
    fast = tiny_dit().to(torch.bfloat16)
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([5, 800]), torch.tensor([1, 2])
    with torch.no_grad():
        wanted, found = model(x, t, y), fast(x.bfloat16(), t, y).float()
        from_fp32 = fast(x, t, y).float()  # latents stay in fp32, only the model is in bf16
    assert (found - wanted).norm() / wanted.norm() < 0.03
    assert torch.equal(from_fp32, found)


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("arch:DiT-XXL/2", "unknown architecture"), ("arch:", "unknown architecture"), ("arch:DiT-S/3", "unknown"),
        ("arch:DiT-S/2-D0", "unknown"), ("arch:DiT-S/2\n", "unknown"),
    ],
)  # fmt: skip
def test_unknown_architectures_are_refused(source: str, word: str) -> None:
    with pytest.raises(GraftError, match=word):
        load_model(source, device="meta")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_heads": 5},
        {"depth": 0},
        {"input_size": 7},
        {"hidden_size": 18, "num_heads": 2},
        {"patch_size": -2},
    ],
    ids=str,
)
def test_impossible_shapes_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(GraftError, match="DiT: "):
        DiTConfig(**{**tiny_dit().config.to_dict(), **changes})
