"""`distill.reuse` in every figure that counts teacher passes: FLOPs of a study's row and of a page, seconds, memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_dit

from grafting import DistillConfig, GraftPlan, Replace, explain, graft
from grafting.analysis import estimate, pace
from grafting.families import family_of
from grafting.report import words
from grafting.report.reading import RunRecord
from grafting.studies import stage_1

PLAN = GraftPlan([Replace("mha", [1, 3], "hyena_x")])


def settings(**keys: Any) -> DistillConfig:
    return DistillConfig(steps=12, batch_size=8, num_validation=0, fit_readout=False, **keys)


def test_flops_of_a_row_put_together_from_the_shelf() -> None:
    teacher = tiny_dit()
    edits, visits = explain(teacher, PLAN).edits, 12 * 8
    shelved = {edit.site.path: object() for edit in edits}
    found = {n: stage_1._flops(teacher, settings(reuse=n), edits, shelved, visits) for n in (1, 3)}
    passes = family_of(teacher).flops_per_image(teacher) * visits
    assert found[1] == passes + 3 * visits * sum(edit.after.total for edit in edits)
    assert found[1] - found[3] == pytest.approx(passes * 2 / 3)


@pytest.mark.parametrize(("reuse", "passes"), [(1, 96), (4, 24), (None, 96)])
def test_teacher_passes_on_the_page_of_a_run(reuse: int | None, passes: int, tmp_path: Path) -> None:
    state = {"stages": {"graft": {"model": {"flops_per_image": [10.0, 9.0]}},
                        "distill": {"image_visits": 96, "flops": 2e3}}}  # fmt: skip
    recipe = {"distill": {} if reuse is None else {"reuse": reuse}}
    (cost,) = words.stage_costs(RunRecord(tmp_path, recipe, "", state, [], {}))
    assert cost.teacher_flops == 10.0 * passes


class Watch:
    """Every pass of the teacher takes 8 s an image, of all operators 2 s forward and 3 s with backward."""

    def model(self, *_: Any, **__: Any) -> pace.Pace:
        return pace.Pace(8.0, 24.0)

    def of(self, *_: Any) -> pace.Pace:
        return pace.Pace(1.0, 1.5)

    def update(self, *_: Any) -> float:
        return 0.0


def test_seconds_of_a_dry_run() -> None:
    teacher = tiny_dit()
    student, watch = graft(teacher, PLAN), Watch()
    for reuse, teacher_seconds in ((1, 8.0), (4, 2.0)):
        found = pace.distill_seconds(watch, teacher, student, settings(reuse=reuse))  # type: ignore[arg-type]
        assert found == 12 * 8 * (teacher_seconds + 3.0)


def test_memory_of_a_dry_run_has_what_is_held() -> None:
    teacher = estimate.meta_copy(tiny_dit())
    student = graft(teacher, PLAN, share=True)
    one, four = (
        estimate.distill_memory(teacher, student, settings(reuse=n, reuse_passes=16), 8, "fp32")
        for n in (1, 4)
    )
    held = 2 * 16 * 8 * (2 * 16 * 32 + 32) * 4  # sites, passes, samples, [N, D] twice and the gate [D], bytes
    key = "activations and gradients"
    # The peak of a step lies elsewhere than where the buffer is made, by less than the taps of a batch.
    assert one[key] < four[key]
    assert abs(four[key] - one[key] - held) < held / 16
