"""Locality: against full attention maps, closed forms, the file that selectors read, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pixart_tools
import pytest
import torch
from conftest import tiny_dit
from torch import Tensor, nn
from typer.testing import CliRunner

from grafting import GraftError, GraftPlan, Parallelize, Replace, draws, explain, graft, load_model
from grafting.analysis.bands import CACHED, LARGE, at_once, band_mass, default_width, uniform_mass
from grafting.analysis.locality import measure_locality
from grafting.analysis.observation import bin_edges, bin_of
from grafting.cli import app
from grafting.conditioning import each
from grafting.data import ImageLabelDataset
from grafting.depth import groups_of, in_sequence
from grafting.diffusion import sample
from grafting.errors import DataError, PlanError
from grafting.families import DiTFamily, family_of
from grafting.formats.weights import write_json
from grafting.lora import Lora, add_lora, merge_lora
from grafting.report.locality import locality_remarks, write_locality
from grafting.training.loop import Batches

TOLERANCE = 1e-5  # of the issue


def full_maps(attention: nn.Module, x: Tensor, num_heads: int) -> Tensor:
    """The published attention's maps [B, H, N, N], written out."""
    batch, num_tokens, width = x.shape
    qkv = attention.qkv(x).reshape(batch, num_tokens, 3, num_heads, width // num_heads)  # type: ignore[operator]
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return ((q * (width // num_heads) ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)


def band(maps: Tensor, k: int) -> Tensor:
    """1/N sum_ij A_ij [|i - j| <= k] of maps [..., N, N]."""
    n = maps.shape[-1]
    i = torch.arange(n)
    return (maps * ((i[:, None] - i[None, :]).abs() <= k)).sum(dim=(-2, -1)) / n


def direct(model: nn.Module, run: Any, widths: list[int]) -> dict[int, dict[int, list[Tensor]]]:
    """k -> layer -> band mass [B, H] of every pass of `run`, from whole maps, by a hook of the test's own."""
    found: dict[int, dict[int, list[Tensor]]] = {k: {} for k in widths}
    handles = []
    for layer, block in enumerate(model.blocks):  # type: ignore[arg-type]

        def hook(module: nn.Module, args: tuple[Tensor, ...], layer: int = layer) -> None:
            maps = full_maps(module, args[0], model.config.num_heads)  # type: ignore[union-attr, arg-type]
            for k in widths:
                found[k].setdefault(layer, []).append(band(maps, k))

        handles.append(block.attn.register_forward_pre_hook(hook))
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", ["tiny", "dit-fashion"])
def test_along_sampling_it_equals_full_attention_maps(name: str) -> None:
    model = tiny_dit() if name == "tiny" else load_model(name)
    family, steps, num, widths = family_of(model), 3, 6, [2, 0, 5, 15]
    found = measure_locality(
        model, widths=widths, num_samples=num, steps=steps, batch_size=4, seed=7, timestep_bins=4
    )
    index = torch.arange(num)
    noise = draws.normal(7, "sample/start", index, family.sample_shape(model))
    classes = family.num_classes(model)
    assert classes is not None
    wanted = direct(model, lambda: sample(model, noise, index % classes, steps=steps, guidance=1.5), widths)
    for entry in found["bands"]:
        for layer, passes in wanted[entry["k"]].items():
            heads = torch.cat(passes).mean(dim=0)
            assert torch.tensor(entry["heads"][layer]) == pytest.approx(heads, abs=TOLERANCE)
            assert entry["layers"][layer] == pytest.approx(heads.mean().item(), abs=TOLERANCE)
            # three DDIM steps, from noise: timesteps 666, 333 and 0, in the bins of quarter 2, 1 and 0
            by_bin = [passes[2], passes[1], passes[0]]
            for place, mass in enumerate(by_bin):
                assert entry["timesteps"][layer][place] == pytest.approx(mass.mean().item(), abs=TOLERANCE)
            assert entry["timesteps"][layer][3] is None
    assert found["locality"] == found["bands"][0]["layers"]
    assert found["k"] == 2


def test_on_data_it_equals_full_attention_maps(model: nn.Module, data: ImageLabelDataset) -> None:
    found = measure_locality(model, data, num_samples=20, batch_size=8, seed=3)
    batches = Batches(
        data, DiTFamily(), model, seed=3, purpose="locality", label_dropout=0.0, device=torch.device("cpu")
    )
    batch = batches.at(torch.arange(20))
    wanted = direct(model, lambda: model(batch.x_t, batch.t, batch.cond), [2])
    assert found["k"] == 2  # N / 8 of 16 tokens
    for layer, passes in wanted[2].items():
        assert found["locality"][layer] == pytest.approx(passes[0].mean().item(), abs=TOLERANCE)
        (entry,) = found["bands"]
        for number, value in enumerate(entry["timesteps"][layer]):
            inside = bin_of(batch.t, 10) == number
            if value is None:
                assert not inside.any()
            else:
                assert value == pytest.approx(passes[0][inside].mean().item(), abs=TOLERANCE)
    assert found["protocol"]["along"] == "noised data"


class Captioned:
    """Random latents [40, 4, 8, 16] with captions: twice the tokens that the tiny PixArt was built for."""

    name, content_hash, shape, num_classes, caption_width = "captioned", "0" * 64, (4, 8, 16), 0, 16

    def __len__(self) -> int:
        return 40

    def batch(self, indices: Tensor) -> tuple[Tensor, Any]:
        index = torch.as_tensor(indices)
        return pixart_tools.latents(40, 8, 16)[index], each(
            lambda part: part[index], pixart_tools.captions(40)
        )


def test_a_text_to_image_model_is_measured_on_its_data() -> None:
    model = pixart_tools.tiny_transformer()
    data: Any = Captioned()
    found = measure_locality(model, data, num_samples=6, batch_size=3, widths=[4], timestep_bins=2)
    family = family_of(model)
    batch = Batches(
        data, family, model, seed=0, purpose="locality", label_dropout=0.0, device=torch.device("cpu")
    ).at(torch.arange(6))
    taps = family.taps(model, batch.x_t, batch.t, batch.cond, [site.path for site in family.sites(model)])
    assert found["num_tokens"] == 32
    assert found["bands"][0]["uniform"] == uniform_mass(32, 4)
    for layer, block in enumerate(model.transformer_blocks):
        x = taps[f"transformer_blocks.{layer}.attn1"].input
        q, k = (block.attn1.head_to_batch_dim(to(x)) for to in (block.attn1.to_q, block.attn1.to_k))
        maps = block.attn1.get_attention_scores(q, k)  # diffusers' own
        assert found["locality"][layer] == pytest.approx(band(maps, 4).mean().item(), abs=TOLERANCE)
    with pytest.raises(GraftError, match="not class-conditional"):
        measure_locality(model)


def test_the_size_of_batches_and_blocks_changes_nothing_but_rounding(model: nn.Module) -> None:
    big, small = (
        measure_locality(model, widths=[3], num_samples=5, steps=2, batch_size=size)["locality"]
        for size in (5, 1)
    )
    assert big == pytest.approx(small, abs=1e-6)
    q, k = torch.randn(2, 3, 2, 37, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    whole = band_mass(q, k, [0, 4, 36])
    for scores in (1, 6 * 37 * 5, 10**9):
        assert torch.allclose(band_mass(q, k, [0, 4, 36], max_scores=scores), whole, atol=1e-6)
    assert torch.allclose(whole[2], torch.ones(3, 2), atol=1e-6)  # the widest band is the whole map


def test_maps_with_a_closed_form() -> None:
    num_tokens = 12
    same = torch.zeros(1, 2, num_tokens, 4)
    for k in (0, 3, 11):
        assert band_mass(same, same, [k]) == pytest.approx(uniform_mass(num_tokens, k), abs=1e-6)
    pairs = sum(abs(i - j) <= 3 for i in range(num_tokens) for j in range(num_tokens))
    assert uniform_mass(num_tokens, 3) == pairs / num_tokens**2
    assert uniform_mass(num_tokens, 50) == 1.0
    # Queries that find their own token only: everything is on the diagonal.
    own = 100 * torch.eye(num_tokens)[None, None]
    assert band_mass(own, own, [0]).item() == pytest.approx(1.0, abs=1e-6)
    # ... and their neighbour two to the right: nothing within 1, all but the two rows without one within 2.
    shifted = torch.roll(own, 2, dims=2)
    assert band_mass(own, shifted, [1]).item() == pytest.approx(0.0, abs=1e-6)
    assert band_mass(own, shifted, [2]).item() == pytest.approx((num_tokens - 2) / num_tokens, abs=1e-6)


def test_a_block_has_the_queries_of_one_sample_before_those_of_others() -> None:
    assert at_once(50, 16, 16384, LARGE) == (
        1,
        128,
    )  # PixArt at 2048x2048: of 50 samples at once it would be two
    assert at_once(50, 16, 256, LARGE) == (32, 256)
    assert at_once(50, 6, 64, CACHED) == (21, 64)
    assert at_once(2, 16, 2**20, CACHED) == (1, 1)


def test_half_precision_inputs_are_read_in_float32() -> None:
    q, k = torch.randn(2, 1, 2, 20, 8, generator=torch.Generator().manual_seed(1)).bfloat16().unbind(0)
    found = band_mass(q, k, [3])
    assert found.dtype == torch.float32
    assert torch.equal(found, band_mass(q.float(), k.float(), [3]))


def test_memory_is_linear_in_the_number_of_tokens() -> None:
    """2,048 tokens with room for four rows of one map: no tensor of N x N is made."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.untyped_storage().nbytes() // out.element_size())
            return out

    num_tokens = 2048
    q = torch.randn(1, 1, num_tokens, 4)
    with Watch():
        band_mass(q, q, [default_width(num_tokens)], max_scores=4 * num_tokens)
    assert largest <= 4 * num_tokens * 2


def test_default_width_and_bins() -> None:
    assert [default_width(n) for n in (256, 64, 16, 4)] == [32, 8, 2, 1]
    assert bin_edges(3) == [[0, 333], [334, 666], [667, 999]]
    for num in (1, 3, 7, 1000):
        edges = bin_edges(num)
        t = torch.arange(1000)
        assert [torch.nonzero(bin_of(t, num) == b).flatten()[[0, -1]].tolist() for b in range(num)] == edges


def test_replaced_attention_is_skipped_with_a_statement(model: nn.Module, tmp_path: Path) -> None:
    student = graft(
        model, GraftPlan([Replace("mha", [1], "hyena_x"), Replace("mha", [2], "mha", init="random")])
    )
    found = measure_locality(student, num_samples=2, steps=1)
    assert [value is None for value in found["locality"]] == [False, True, False, False]
    (site,) = found["skipped"]
    assert (site["layer"], site["path"], site["operator"]) == (1, "blocks.1.attn", "hyena_x")
    assert any(
        "Layer 1 was not measured: its operator is hyena_x" in text for text in locality_remarks(found)
    )
    write_json(tmp_path / "locality.json", found)
    write_locality(tmp_path / "page.html", found)
    assert "Layer 1 was not measured" in (tmp_path / "page.html").read_text()
    with pytest.raises(PlanError, match="locality of layer 1 was not measured"):
        explain(model, GraftPlan([Replace("mha", "top-local-50", "swa")]), tmp_path / "locality.json")
    with pytest.raises(GraftError, match="no attention over all tokens left"):
        measure_locality(graft(model, GraftPlan([Replace("mha", "all", "swa")])))


def test_selectors_read_the_file(model: nn.Module, tmp_path: Path) -> None:
    found = measure_locality(model, num_samples=4, steps=2)
    path = tmp_path / "locality.json"
    write_json(path, found)
    ranked = sorted(range(4), key=lambda layer: -found["locality"][layer])
    for selector, layers in (("top-local-50", ranked[:2]), ("low-local-50", ranked[2:])):
        explanation = explain(model, GraftPlan([Replace("mha", selector, "swa")]), path)
        assert [edit.site.layer for edit in explanation.edits] == sorted(layers)


def test_the_model_is_left_as_it_was(model: nn.Module) -> None:
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure_locality(model, num_samples=2, steps=1)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_samples": 0}, "num_samples=0"),
        ({"widths": []}, "no band width"),
        ({"widths": [16]}, "k=16: expected a whole number from 0 to 15"),
        ({"widths": [1, 1]}, "name one twice"),
        ({"guidance": math.nan}, "guidance=nan"),
        ({"steps": 0}, "steps=0"),
        ({"sampler": "euler"}, "unknown sampler"),
        ({"timestep_bins": 1001}, "timestep_bins=1001"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(model: nn.Module, settings: Any, says: str) -> None:
    with pytest.raises(GraftError, match=says):
        measure_locality(model, **settings)


def test_what_data_makes_meaningless_is_refused(model: nn.Module, data: ImageLabelDataset) -> None:
    for setting in ({"steps": 5}, {"sampler": "ddim"}, {"guidance": 1.5}):
        with pytest.raises(GraftError, match=f"{next(iter(setting))} belongs to sampling"):
            measure_locality(model, data, **setting)  # type: ignore[arg-type]
    other = ImageLabelDataset(torch.zeros(4, 1, 4, 4), torch.zeros(4, dtype=torch.int64), name="small")
    with pytest.raises(DataError, match="'small' has samples of shape"):
        measure_locality(model, other)


def test_a_family_that_gives_no_queries_says_so(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(DiTFamily, "queries_and_keys")
    with pytest.raises(GraftError, match="family 'dit' does not say what its queries and keys are"):
        measure_locality(model, num_samples=1, steps=1)


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(GraftError, match="meta device"):
        measure_locality(load_model("arch:DiT-S/8", device="meta"), num_samples=1)


def test_attention_that_is_not_square_is_refused() -> None:
    with pytest.raises(GraftError, match="as many keys as queries"):
        band_mass(torch.zeros(1, 1, 8, 4), torch.zeros(1, 1, 4, 4), [1])


def test_the_command_writes_what_the_selectors_take(tmp_path: Path) -> None:
    runner = CliRunner()
    file, page, plan = tmp_path / "l.json", tmp_path / "l.html", tmp_path / "plan.yaml"
    plan.write_text("- replace: {target: mha, layers: top-local-50, with: swa}\n")
    common = ["locality", "dit-fashion", "--num", "4", "--batch-size", "4"]
    given = [*common, "--steps", "1", "--k", "8", "--k", "3", "--out", str(file), "--html", str(page)]
    ran = runner.invoke(app, [*given, "--json"])
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    assert found == json.loads(file.read_text())
    assert len(found["locality"]) == 12
    explained = runner.invoke(
        app, ["explain", "dit-fashion", "--plan", str(plan), "--locality", str(file), "--json"]
    )
    top = sorted(sorted(range(12), key=lambda layer: -found["locality"][layer])[:6])
    assert [edit["layer"] for edit in json.loads(explained.stdout)["edits"]] == top
    text = page.read_text()
    assert text.count("<svg") == 5  # the lines, and two maps a width
    assert "by layer and head" in text
    assert "<script" not in text

    ran = runner.invoke(app, [*common, "--data", "fashion-10"])
    assert "of 12 measured layers keep over half" in ran.stdout
    ran = runner.invoke(app, [*common, "--data", "fashion-10", "--steps", "3"])
    assert isinstance(ran.exception, GraftError)


def test_branches_that_run_as_one_are_measured_like_branches_in_sequence(
    model: nn.Module, data: ImageLabelDataset
) -> None:
    student = graft(model, GraftPlan([Parallelize([[0, 1]])]))
    found = measure_locality(student, data, num_samples=4, batch_size=2)["locality"]
    apart = in_sequence(family_of(student), student)
    assert apart is not student
    assert all(group.is_stacked for group in groups_of(family_of(student), student))  # it is as it was
    wanted = direct_of_branches(apart, data, num_samples=4)
    assert found[:2] == pytest.approx(wanted, abs=TOLERANCE)
    assert all(value is not None and 0 < value < 1 for value in found)


def direct_of_branches(model: nn.Module, data: ImageLabelDataset, num_samples: int) -> list[float]:
    """L_k of both branches of block 0, from whole maps."""
    family = family_of(model)
    batch = Batches(
        data, family, model, seed=0, purpose="locality", label_dropout=0.0, device=torch.device("cpu")
    ).at(torch.arange(num_samples))
    paths = [f"blocks.0.branches.{j}.attn" for j in (0, 1)]
    taps = family.taps(model, batch.x_t, batch.t, batch.cond, paths)
    k, heads = default_width(16), model.config.num_heads  # type: ignore[union-attr]
    return [
        band(full_maps(model.get_submodule(path), taps[path].input, heads), k).mean().item()  # type: ignore[arg-type]
        for path in paths
    ]


def test_adapters_count(model: nn.Module, data: ImageLabelDataset) -> None:
    student = graft(model, GraftPlan([Replace("mlp", [1], "mlp_hyena_x")]))
    add_lora(student, Lora(rank=2, alpha=2.0, targets=("blocks.0.attn.qkv",)))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    found, merged, plain = (
        measure_locality(m, data, num_samples=4, batch_size=4)["locality"]
        for m in (student, merge_lora(student), model)
    )
    assert found == pytest.approx(merged, abs=1e-5)
    assert abs(found[0] - plain[0]) > 1e-3
