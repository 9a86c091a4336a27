"""Every experiment of arXiv 2506.05340 on class-conditional DiTs, as rows that state only what differs.

The paper's figures are of DiT-XL/2 on ImageNet 256x256. The same rows run on dit-fashion (preset `small`) and on
DiT-XL/2 (presets `paper`, `paper-code`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grafting.recipes.rows import Claim, Row, Study

BASELINE = {"fid": 2.27, "is": 278.20, "sfid": 4.60, "precision": 0.83, "recall": 0.57}
_BEYOND = "x"  # the paper's mark for a FID above 50
_LAYERS = {50: "interleaved-50", 75: "interleaved-75", 100: "all"}
_RANKS = {50: 1, 75: 2, 100: 3}
NOISE_SEEDS = 4  # the teacher is sampled from that many seeds, so that noise has a measure

# name -> (target, operator of the plan, what it says on the page)
OPERATORS: dict[str, tuple[str, Any, str]] = {
    "mha-hyena_se": ("mha", "hyena_se", "Hyena-SE"),
    "mha-hyena_x": ("mha", "hyena_x", "Hyena-X"),
    "mha-hyena_y": ("mha", "hyena_y", "Hyena-Y"),
    "mha-swa": ("mha", {"swa": {"window": 4}}, "sliding window (4)"),
    "mha-mamba2": ("mha", "mamba2", "Mamba-2"),
    "mlp-r3": ("mlp", {"mlp": {"ratio": 3}}, "MLP r=3"),
    "mlp-r6": ("mlp", {"mlp": {"ratio": 6}}, "MLP r=6"),
    "mlp-hyena_x": ("mlp", "mlp_hyena_x", "MLP Hyena-X"),
}

# Table 4: IS, FID, sFID, precision, recall at 50, 75 and 100 % of the layers.
_MEASURES = ("is", "fid", "sfid", "precision", "recall")
_TABLE_4: dict[str, tuple[tuple[float | str, ...], ...]] = {
    "mha-hyena_se": ((274.73, 2.73, 5.05, 0.82, 0.56), (231.15, 3.62, 6.04, 0.81, 0.54), (_BEYOND,)),
    "mha-hyena_x": ((273.30, 2.74, 5.03, 0.83, 0.56), (229.11, 3.69, 6.10, 0.81, 0.53), (_BEYOND,)),
    "mha-hyena_y": ((273.37, 2.72, 5.02, 0.83, 0.55), (228.99, 3.66, 5.95, 0.81, 0.53), (_BEYOND,)),
    "mha-swa": ((280.62, 2.67, 4.90, 0.83, 0.56), (249.99, 3.09, 5.54, 0.82, 0.55), (_BEYOND,)),
    "mha-mamba2": ((285.08, 2.65, 4.84, 0.83, 0.55), (257.66, 3.02, 5.48, 0.82, 0.53), (_BEYOND,)),
    "mlp-r3": ((272.14, 2.53, 4.51, 0.83, 0.57), (279.72, 2.61, 4.61, 0.83, 0.56), (252.11, 2.66, 4.57, 0.81, 0.57)),
    "mlp-r6": ((278.00, 2.38, 4.50, 0.83, 0.58), (277.94, 2.37, 4.48, 0.82, 0.58), (276.86, 2.42, 4.50, 0.82, 0.58)),
    "mlp-hyena_x": ((265.60, 2.64, 4.66, 0.83, 0.56), (226.13, 3.26, 4.79, 0.81, 0.55), (_BEYOND,)),
}  # fmt: skip


def _figures(values: Sequence[float | str]) -> dict[str, Any]:
    if values == (_BEYOND,):
        return {"fid": _BEYOND}
    return dict(zip(_MEASURES, values, strict=True))


def plan_of(target: str, operator: Any, layers: Any, **keys: Any) -> list[dict[str, Any]]:
    """A plan of one replace entry."""
    return [{"replace": {"target": target, "layers": layers, "with": operator, **keys}}]


def teacher_rows(paper: bool = True) -> tuple[Row, ...]:
    """The teacher as it is and under other noise: the measure of what noise alone does."""
    rows = [Row("teacher", "teacher", teacher="as it is", paper=BASELINE if paper else {})]
    rows += [
        Row(f"teacher-noise-{n}", f"teacher, noise seed +{n}", teacher="other noise", seed=n)
        for n in range(1, NOISE_SEEDS)
    ]
    return tuple(rows)


def _operator_row(name: str, percent: int, index: int) -> Row:
    target, operator, label = OPERATORS[name]
    return Row(
        f"{name}-{percent}", f"{target.upper()} → {label}, {percent} %",
        {"plan": plan_of(target, operator, _LAYERS[percent])},
        paper=_figures(_TABLE_4[name][index]), rank=_RANKS[percent],
    )  # fmt: skip


def _self_graft(target: str, fid: float, score: float, sfid: float, recall: float) -> Row:
    name = {"mha": "mha", "mlp": "mlp"}[target]
    return Row(
        f"{target}-self-100", f"{target.upper()} re-learned from random (self-graft), 100 %",
        {"plan": plan_of(target, name, "all", init="random")},
        paper={"fid": fid, "is": score, "sfid": sfid, "precision": 0.83, "recall": recall}, rank=2,
    )  # fmt: skip


_MHA = ("mha-hyena_se", "mha-hyena_x", "mha-hyena_y", "mha-swa", "mha-mamba2")
_MLP = ("mlp-r3", "mlp-r6", "mlp-hyena_x")


def _table_rows(names: tuple[str, ...]) -> tuple[Row, ...]:
    return tuple(_operator_row(name, percent, i) for name in names for i, percent in enumerate(_LAYERS))


_RANDOM = Row(
    "mha-random-100", "MHA random, not trained, 100 %",
    {"plan": plan_of("mha", "mha", "all", init="random"), "distill": None, "finetune": None},
    paper={"fid": 289.23, "is": 1.66, "sfid": 154.00, "precision": 0.0, "recall": 0.0}, rank=2,
)  # fmt: skip

TABLE_4 = Study(
    name="table4",
    title="Table 4: operators and replacement ratios",
    about=(
        "Every row of Table 4 of arXiv 2506.05340: which operator takes the place of attention or MLP, and in how many "
        "layers. Same data, noise and budget in every row. The paper's figures are of DiT-XL/2 on ImageNet 256x256."
    ),
    recipe="",
    rows=(
        *teacher_rows(),
        _RANDOM,
        _self_graft("mha", 2.49, 287.81, 4.71, 0.56),
        *_table_rows(_MHA),
        _self_graft("mlp", 2.54, 277.72, 4.52, 0.57),
        *_table_rows(_MLP),
    ),
    claims=(
        *(
            Claim(
                f"{OPERATORS[name][2]} for {OPERATORS[name][0].upper()}: 50 % of the layers is better than 75 %, "
                "and that than 100 %",
                tuple((f"{name}-{percent}",) for percent in _LAYERS),
            )
            for name in (*_MHA, "mlp-hyena_x")
        ),
        Claim(
            "No substitute of attention can take all layers (FID above 50, 22 times the baseline's)",
            (tuple(f"{name}-100" for name in _MHA),),
            over=50 / BASELINE["fid"],
        ),
        Claim(
            "The width of the MLP is robust: r=3 and r=6 in all layers are better than 75 % of attention replaced",
            (("mlp-r3-100", "mlp-r6-100"), tuple(f"{name}-75" for name in _MHA)),
        ),
        Claim("At 100 % a wider MLP (r=6) is better than a narrower one (r=3)", (("mlp-r6-100",), ("mlp-r3-100",))),
        Claim(
            "At 75 % a window and Mamba-2 are better than the Hyenas",
            (("mha-swa-75", "mha-mamba2-75"), ("mha-hyena_se-75", "mha-hyena_x-75", "mha-hyena_y-75")),
        ),
        Claim(
            "All attention can be re-learned: the self-graft is better than any substitute in 75 %",
            (("mha-self-100",), tuple(f"{name}-75" for name in _MHA)),
        ),
        Claim("The self-graft is better than random weights", (("mha-self-100",), ("mha-random-100",))),
    ),
    paper_baseline=BASELINE["fid"],
)  # fmt: skip

# FID of the paper by loss; what it does not report has none.
_LOSSES = {
    ("mha", "l1"): 2.51,
    ("mha", "l2"): 2.58,
    ("mha", "huber"): 2.55,
    ("mlp", "l1"): 2.83,
    ("mlp", "l2"): 2.33,
}

OBJECTIVES = Study(
    name="objectives",
    title="Which regression loss, by operator",
    about=(
        "Five layers of attention or of MLP, spread from first to last, are re-learned from random weights by stage 1 "
        "alone; only its loss differs. Without stage 2 the distance shows what stage 1 left."
    ),
    recipe="",
    rows=(
        *teacher_rows(),
        *(
            Row(
                f"{target}-{loss}", f"{target.upper()} in five layers, {loss.upper() if loss != 'huber' else 'Huber'}",
                {"plan": plan_of(target, target, "five", init="random", loss=loss), "finetune": None},
                paper={"fid": _LOSSES[target, loss]} if (target, loss) in _LOSSES else {}, rank=1,
            )
            for target in ("mha", "mlp") for loss in ("l1", "l2", "huber")
        ),
    ),
    claims=(
        Claim("Attention likes L1: better than L2", (("mha-l1",), ("mha-l2",))),
        Claim("Attention likes L1: better than Huber", (("mha-l1",), ("mha-huber",))),
        Claim("The MLP likes L2: better than L1", (("mlp-l2",), ("mlp-l1",))),
    ),
    paper_baseline=BASELINE["fid"],
)  # fmt: skip

_SELF = {"plan": plan_of("mha", "mha", "all", init="random")}
_TWENTY = {"mha-hyena_x": 2.61, "mha-swa": 2.62, "mha-mamba2": 2.55}

DATA_SCALE = Study(
    name="data-scale",
    title="How much data stage 2 needs",
    about=(
        "All attention is re-learned from random weights (self-graft): the same stage 1 in every row, then stage 2 "
        "with as many steps on a share of the training set. Last, half of the attention replaced, with 20 % of it."
    ),
    recipe="",
    rows=(
        *teacher_rows(),
        Row("mha-self-stage1", "self-graft, stage 1 only", {**_SELF, "finetune": None}, paper={"fid": 16.78}, rank=1),
        Row("mha-self-data0.63", "self-graft, stage 2 on 0.63 %", _SELF, paper={"fid": 11.26}, share=0.0063, rank=2),
        Row("mha-self-data5", "self-graft, stage 2 on 5 %", _SELF, paper={"fid": 2.70}, share=0.05, rank=2),
        Row("mha-self-data10", "self-graft, stage 2 on 10 %", _SELF, paper={"fid": 2.49}, share=0.1, rank=2),
        Row("mha-self-data20", "self-graft, stage 2 on 20 %", _SELF, share=0.2, rank=3),
        *(
            Row(
                f"{name}-50-data{percent}", f"MHA → {OPERATORS[name][2]}, 50 %, {percent} % of the data",
                {"plan": plan_of("mha", OPERATORS[name][1], "interleaved-50")},
                paper={"fid": fid}, share=percent / 100, rank=4,
            )
            for name in _TWENTY for percent, fid in ((10, _TABLE_4[name][0][1]), (20, _TWENTY[name]))
        ),
    ),
    claims=(
        Claim("Stage 2 helps, even on 0.63 % of the data", (("mha-self-data0.63",), ("mha-self-stage1",))),
        Claim("5 % of the data is better than 0.63 %", (("mha-self-data5",), ("mha-self-data0.63",))),
        Claim("10 % of the data is better than 5 %", (("mha-self-data10",), ("mha-self-data5",))),
        *(
            Claim(
                f"{OPERATORS[name][2]}: 20 % of the data is better than 10 %",
                ((f"{name}-50-data20",), (f"{name}-50-data10",)),
            )
            for name in _TWENTY
        ),
    ),
    paper_baseline=BASELINE["fid"],
)  # fmt: skip

_CHOICES = {"interleaved": 2.74, "top-local": 3.02, "low-local": 3.18, "deep": 4.00}

LAYER_CHOICE = Study(
    name="layer-choice",
    title="Which half of the layers",
    about="Hyena-X takes the place of attention in half of the layers, chosen in four ways; all else is the same.",
    recipe="",
    rows=(
        *teacher_rows(),
        *(
            Row(
                f"mha-hyena_x-{choice}", f"Hyena-X, {choice} layers",
                {"plan": plan_of("mha", "hyena_x", f"{choice}-50")}, paper={"fid": fid}, rank=1 + (i > 1),
            )
            for i, (choice, fid) in enumerate(_CHOICES.items())
        ),
    ),
    claims=(
        *(
            Claim(text, ((f"mha-hyena_x-{better}",), (f"mha-hyena_x-{worse}",)))
            for text, better, worse in (
                ("Interleaved layers are better than deep ones", "interleaved", "deep"),
                ("Interleaved layers are better than the most local ones", "interleaved", "top-local"),
                ("The most local layers are better than the least local ones", "top-local", "low-local"),
            )
        ),
    ),
    paper_baseline=BASELINE["fid"],
)  # fmt: skip

PAPER_STUDIES = (TABLE_4, OBJECTIVES, DATA_SCALE, LAYER_CHOICE)
