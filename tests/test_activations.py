"""Activations: statistics against numpy and scipy, the rule for the loss, the file, `loss: auto`, the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_dit
from scipy import stats
from torch import Tensor, nn
from typer.testing import CliRunner

from grafting import GraftError, GraftPlan, PlanError, Replace, distill, graft
from grafting.analysis.activations import measure_activations
from grafting.analysis.moments import describe
from grafting.analysis.observation import bin_of
from grafting.analysis.regression import choose_loss, read_losses, recommend
from grafting.cli import app
from grafting.data import ImageLabelDataset
from grafting.errors import DataError
from grafting.families import DiTFamily
from grafting.formats.weights import write_json
from grafting.report import write_report
from grafting.report.activations import activation_remarks, activation_rows, write_activations
from grafting.runs import RunFolder
from grafting.training.loop import Batches, Quiet

STAGE_1 = {
    "steps": 2,
    "batch_size": 8,
    "num_validation": 8,
    "fit_samples": 24,
    "validate_every": 2,
    "precision": "fp32",
}


def described(x: Tensor, bins: Tensor | None = None, num_bins: int = 1, size: int = 7) -> dict[str, Any]:
    """Statistics of x [B, N, D], given in batches of `size`."""
    bins = torch.zeros(len(x), dtype=torch.int64) if bins is None else bins
    chunks = list(zip(bins.split(size), x.split(size), strict=True))
    return describe(lambda: ((b, {"x": part}) for b, part in chunks), num_bins)["x"]


@pytest.fixture(scope="module")
def heavy() -> Tensor:
    """[20, 30, 6]: channels of unlike scale, mean and tails."""
    generator = np.random.default_rng(0)
    x = generator.standard_t(6, size=(20, 30, 6)) * [1, 1, 0.1, 5, 2, 1] + [0, 3, 0, 0, -1, 0]
    return torch.from_numpy(x).float()


def test_statistics_equal_those_of_scipy(heavy: Tensor) -> None:
    found, x = described(heavy), heavy.double().numpy()
    assert found["mean"] == pytest.approx(x.mean(), rel=1e-9)
    assert found["variance"] == pytest.approx(x.var(), rel=1e-9)
    assert found["kurtosis"] == pytest.approx(stats.kurtosis(x, axis=None), rel=1e-7)
    by_channel = np.sort(stats.kurtosis(x.reshape(-1, 6), axis=0))
    assert found["channel_kurtosis"] == pytest.approx(by_channel[2], rel=1e-6)  # the lower median, as torch's
    assert found["max_abs"] == pytest.approx(np.abs(x).max())
    assert found["q999"] == pytest.approx(np.quantile(np.abs(x), 0.999, method="inverted_cdf"), rel=0.005)
    energy = np.square(x).sum(axis=(0, 1))
    order = np.argsort(-energy)
    assert [c["channel"] for c in found["channels"]] == order[:5].tolist()
    assert [c["share"] for c in found["channels"]] == pytest.approx(energy[order[:5]] / energy.sum())


def test_timestep_bins_are_apart(heavy: Tensor) -> None:
    bins = torch.arange(20) % 4  # of 5: the last stays empty
    found, x = described(heavy, bins, num_bins=5)["timesteps"], heavy.double().numpy()
    for number in range(4):
        part = x[bins.numpy() == number]
        assert found["variance"][number] == pytest.approx(part.var(), rel=1e-9)
        assert found["kurtosis"][number] == pytest.approx(stats.kurtosis(part, axis=None), rel=1e-7)
    assert (found["variance"][4], found["kurtosis"][4]) == (None, None)


def test_what_is_held_at_a_time_is_bounded(data: ImageLabelDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer samples where a batch has more than that, then fewer operators: more passes, the same statistics."""
    model, asked = tiny_dit(), []  # eight operators of [16, 32] in float32: 4 KiB each for input and output
    taps, steps = DiTFamily.taps, []

    def counted(self: Any, model: nn.Module, x: Tensor, t: Tensor, cond: Any, paths: Any) -> Any:
        asked.append((len(x), len(paths)))
        return taps(self, model, x, t, cond, paths)

    monkeypatch.setattr(DiTFamily, "taps", counted)

    def measured(held: int) -> tuple[dict[str, Any], list[tuple[int, int]]]:
        asked.clear()
        monkeypatch.setattr("grafting.analysis.activations.HELD_BYTES", held)
        found = measure_activations(
            model, data, num_samples=6, batch_size=4, progress=lambda done, total: steps.append((done, total))
        )
        return found, list(asked)

    whole, passes = measured(4 * 8 * 4096)
    assert passes == [(4, 8), (2, 8)] * 2
    fewer_samples, passes = measured(2 * 8 * 4096)
    assert passes == [(2, 8)] * 6
    fewer_operators, passes = measured(3 * 4096)
    assert passes == [(1, 3)] * 12 + [(1, 3)] * 12 + [(1, 2)] * 12
    assert steps[-1] == (36, 36)
    for found in (fewer_samples, fewer_operators):
        assert [row["path"] for row in found["sites"]] == [row["path"] for row in whole["sites"]]
        for row, wanted in zip(found["sites"], whole["sites"], strict=True):
            for side in ("input", "output"):
                for key in ("mean", "variance", "kurtosis", "max_abs", "q999"):
                    assert row[side][key] == pytest.approx(wanted[side][key], rel=1e-4, abs=1e-6), (side, key)


def test_the_size_of_batches_changes_nothing(heavy: Tensor) -> None:
    one, many = described(heavy, size=20), described(heavy, size=3)
    assert one["q999"] == many["q999"]
    assert one["median_efficiency"] == many["median_efficiency"]
    assert one["kurtosis"] == pytest.approx(many["kurtosis"], rel=1e-12)


@pytest.mark.parametrize(
    ("name", "draw", "efficiency", "loss"),
    [
        ("normal", lambda g, n: g.standard_normal(n), 2 / math.pi, "l2"),
        ("uniform", lambda g, n: g.uniform(-1, 1, n), 1 / 3, "l2"),
        ("logistic", lambda g, n: g.logistic(size=n), math.pi**2 / 12, "l2"),
        ("t, 4 degrees", lambda g, n: g.standard_t(4, size=n), 1.125, "l1"),
        ("Laplace", lambda g, n: g.laplace(size=n), 2.0, "l1"),
    ],
)
def test_efficiency_of_the_median_of_known_distributions(
    name: str, draw: Any, efficiency: float, loss: str
) -> None:
    x = draw(np.random.default_rng(1), (100, 100, 20)) * np.geomspace(0.01, 100, 20) + 3.0
    found = described(torch.from_numpy(x).float(), size=50)["median_efficiency"]
    # The density is averaged over a tenth of a deviation on both sides: a peak is cut by up to 15 %.
    assert found == pytest.approx(efficiency, rel=0.16 if name == "Laplace" else 0.03)
    assert choose_loss(found) == loss


def test_a_constant_channel_and_a_constant_operator() -> None:
    x = torch.randn(10, 10, 4, generator=torch.Generator().manual_seed(0))
    x[..., 1] = 2.5
    assert described(x)["median_efficiency"] == pytest.approx(
        described(x[..., [0, 2, 3]])["median_efficiency"]
    )
    for value in (0.0, 3.0):
        found = described(torch.full((4, 5, 3), value))
        assert (found["kurtosis"], found["channel_kurtosis"], found["median_efficiency"]) == (
            None,
            None,
            None,
        )
        assert found["variance"] == pytest.approx(0.0, abs=1e-12)
        assert found["max_abs"] == found["q999"] == value
    assert choose_loss(None) == "l2"


def test_massive_activations_do_not_hide_the_rest() -> None:
    x = torch.randn(50, 40, 8, generator=torch.Generator().manual_seed(0))
    quiet = described(x)
    x[0, 0, 0] = 1e6
    found = described(x)
    assert found["max_abs"] == 1e6
    assert found["q999"] == pytest.approx(quiet["q999"], rel=0.02)
    assert found["channels"][0] == {"channel": 0, "share": pytest.approx(1.0, abs=1e-4)}


def test_sites_of_a_model_against_its_taps(model: nn.Module, data: ImageLabelDataset) -> None:
    found = measure_activations(model, data, num_samples=20, batch_size=6, seed=5, timestep_bins=4)
    family = DiTFamily()
    batches = Batches(
        data, family, model, seed=5, purpose="activations", label_dropout=0.0, device=torch.device("cpu")
    )
    batch = batches.at(torch.arange(20))
    paths = [site.path for site in family.sites(model)]
    taps = family.taps(model, batch.x_t, batch.t, batch.cond, paths)
    assert [site["path"] for site in found["sites"]] == paths
    for site in found["sites"]:
        tap = taps[site["path"]]
        for side, x in (("input", tap.input), ("output", tap.output)):
            whole = described(x, bin_of(batch.t, 4), num_bins=4)
            assert site[side]["variance"] == pytest.approx(whole["variance"], rel=1e-4)
            assert site[side]["kurtosis"] == pytest.approx(whole["kurtosis"], rel=1e-3, abs=1e-3)
            assert site[side]["timesteps"]["variance"] == pytest.approx(
                whole["timesteps"]["variance"], rel=1e-4
            )
        assert site["loss"] == choose_loss(site["output"]["median_efficiency"])
    json.dumps(found, allow_nan=False)


def test_the_recommendation_is_the_median_sites(model: nn.Module) -> None:
    sites = [
        {"target": "mha", "loss": choose_loss(e), "output": {"median_efficiency": e}}
        for e in (0.7, 1.2, 1.9, 1.1)
    ] + [
        {"target": "mlp", "loss": choose_loss(e), "output": {"median_efficiency": e}} for e in (0.5, 1.3, 0.9)
    ]
    found = recommend(sites)
    assert (found["mha"]["loss"], found["mha"]["num_l1"]) == ("l1", 3)
    assert found["mha"]["median_efficiency"] == pytest.approx(1.15)
    assert (found["mlp"]["loss"], found["mlp"]["num_l1"]) == ("l2", 1)
    assert "0.90 times as efficient" in found["mlp"]["reason"]
    assert (
        recommend([{"target": "mlp", "loss": "l2", "output": {"median_efficiency": None}}])["mlp"]["loss"]
        == "l2"
    )


def auto_plan() -> GraftPlan:
    return GraftPlan([
        Replace("mha", [0, 2], "swa", loss="auto"), Replace("mlp", [1], "mlp", {"ratio": 2}, loss="auto"),
        Replace("mha", [3], "hyena_x", loss="huber"),
    ])  # fmt: skip


def test_auto_is_settled_by_the_donors_outputs(model: nn.Module, data: ImageLabelDataset) -> None:
    journal = Quiet()
    result = distill(graft(model, auto_plan()), model, data, STAGE_1, journal=journal)
    (record,) = [r for r in journal.records if r.get("event") == "loss"]
    auto = ["blocks.0.attn", "blocks.1.mlp", "blocks.2.attn"]
    assert sorted(record["loss"]) == auto
    for path, efficiency in record["median_efficiency"].items():
        assert record["loss"][path] == choose_loss(efficiency)
    assert result.losses == {**record["loss"], "blocks.3.attn": "huber"}
    train, _ = data.split(8, 0)
    family = DiTFamily()
    calibration = Batches(
        train,
        family,
        model,
        seed=0,
        purpose="distill/calibration",
        label_dropout=0.1,
        device=torch.device("cpu"),
    ).at(torch.arange(24))
    taps = family.taps(model, calibration.x_t, calibration.t, calibration.cond, auto)
    for path in auto:
        wanted = described(taps[path].output)["median_efficiency"]
        assert record["median_efficiency"][path] == pytest.approx(wanted, rel=1e-3)


def test_a_chosen_loss_trains_as_if_it_had_been_named(model: nn.Module, data: ImageLabelDataset) -> None:
    auto = graft(model, auto_plan())
    chosen = distill(auto, model, data, STAGE_1).losses
    named = GraftPlan([
        Replace("mha", [0], "swa", loss=chosen["blocks.0.attn"]),
        Replace("mha", [2], "swa", loss=chosen["blocks.2.attn"]),
        Replace("mlp", [1], "mlp", {"ratio": 2}, loss=chosen["blocks.1.mlp"]),
        Replace("mha", [3], "hyena_x", loss="huber"),
    ])  # fmt: skip
    other = graft(model, named)
    distill(other, model, data, STAGE_1)
    state = other.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in auto.state_dict().items())


def test_auto_is_settled_by_a_file(model: nn.Module, data: ImageLabelDataset, tmp_path: Path) -> None:
    path = tmp_path / "activations.json"
    found = measure_activations(model, data, num_samples=8, batch_size=8)
    flipped = [{**site, "loss": "l1" if site["target"] == "mlp" else "l2"} for site in found["sites"]]
    write_json(path, {**found, "sites": flipped})
    journal = Quiet()
    config = {**STAGE_1, "activations": str(path)}
    result = distill(graft(model, auto_plan()), model, data, config, journal=journal)
    assert result.losses["blocks.0.attn"] == "l2"
    assert result.losses["blocks.1.mlp"] == "l1"
    (record,) = [r for r in journal.records if r.get("event") == "loss"]
    assert "median_efficiency" not in record
    write_json(path, {**found, "sites": flipped[:3]})
    with pytest.raises(PlanError, match=r"blocks\.1\.mlp: .* has no such site"):
        distill(graft(model, auto_plan()), model, data, config)


def test_auto_of_a_whole_target(model: nn.Module, data: ImageLabelDataset) -> None:
    plan = GraftPlan([Replace("mha", [1], "swa"), Replace("mlp", [1], "mlp", {"ratio": 2})])
    journal = Quiet()
    distill(graft(model, plan), model, data, {**STAGE_1, "losses": {"mha": "auto"}}, journal=journal)
    (record,) = [r for r in journal.records if r.get("event") == "loss"]
    assert list(record["loss"]) == ["blocks.1.attn"]


def test_a_resumed_stage_keeps_the_losses_it_chose(
    model: nn.Module, data: ImageLabelDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grafting.errors import Interrupted

    run = RunFolder.create(tmp_path / "run", {"name": "r"}, None)
    student = graft(model, auto_plan())
    config = {**STAGE_1, "steps": 4, "checkpoint_every": 2}
    with monkeypatch.context() as stop:
        stop.setattr(run, "stop_requested", lambda: 130)
        with pytest.raises(Interrupted):
            distill(student, model, data, config, journal=run)
    monkeypatch.setattr("grafting.training.starts.settle_losses", None)  # it must not be asked again
    resumed = distill(graft(model, auto_plan()), model, data, config, journal=run)
    assert set(resumed.losses.values()) <= {"l1", "l2", "huber"}
    (record,) = [r for r in run.metrics() if r.get("event") == "loss"]
    assert {path: resumed.losses[path] for path in record["loss"]} == record["loss"]
    run.finish("distill", resumed.to_dict())
    page = write_report(run.path).read_text()
    assert ">HUBER<" in page


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({}, "no list 'sites'"),
        ({"sites": [{"path": "blocks.0.attn"}]}, r"sites\[0\] needs a 'path' and a 'loss'"),
        ({"sites": [{"path": "blocks.0.attn", "loss": "huber"}]}, "l1 or l2"),
        ({"sites": ["x"]}, r"sites\[0\]"),
        ([], "no list 'sites'"),
    ],
)
def test_files_that_are_none_are_refused(content: Any, says: str, tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", content)
    with pytest.raises(DataError, match=says):
        read_losses(tmp_path / "a.json")
    with pytest.raises(DataError):
        read_losses(tmp_path / "none.json")


def test_what_makes_no_sense_is_refused(model: nn.Module, data: ImageLabelDataset) -> None:
    for setting in ({"num_samples": 0}, {"batch_size": 0}, {"timestep_bins": 0}):
        with pytest.raises(GraftError, match=f"{next(iter(setting))}=0"):
            measure_activations(model, data, **setting)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight.fill_(float("nan"))  # type: ignore[index, union-attr]
    with pytest.raises(GraftError, match=r"blocks\.1\.mlp are not finite"):
        measure_activations(model, data, num_samples=4)


def test_the_command_and_its_page(tmp_path: Path) -> None:
    file, page = tmp_path / "a.json", tmp_path / "a.html"
    given = ["activations", "dit-fashion", "--data", "fashion-10", "--num", "4", "--batch-size", "4"]
    ran = CliRunner().invoke(app, [*given, "--out", str(file), "--html", str(page), "--json"])
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    assert found == json.loads(file.read_text())
    assert len(read_losses(file)) == 24
    rows, remarks = activation_rows(found), activation_remarks(found)
    assert [row["loss"] for row in rows] == list(read_losses(file).values())
    assert remarks[0].startswith("mha: ")
    text = page.read_text()
    assert text.count("<svg") == 8  # two targets: variance and kurtosis of input and output
    assert "Excess kurtosis of the output" in text
    assert write_activations(tmp_path / "b.html", found).read_text() == text
