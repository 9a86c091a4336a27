"""Memory of stage 1 on PixArt: one operator per job, all in one pass, and all with their graphs alive together.

Counted on tensors without values (`analysis/estimate.py`), so that any size fits any machine.
"""

from __future__ import annotations

from typing import Any

from grafting.errors import GraftError

LAYERS = "8-18:2,20-27"  # of the paper's plan
WAYS = {
    "one operator per job": (27, False),
    "one pass, one graph at a time": (LAYERS, False),
    "one pass, all graphs at once": (LAYERS, True),
}
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}


def bench_stage1_memory(
    *, size: str = "PixArt-Sigma-2K", batch_size: int = 1, dtype: str = "bfloat16"
) -> dict[str, Any]:
    """Bytes at the peak of a step, attention -> hyena_x in the paper's 14 layers, `batch_size` samples in a pass.

    size: an architecture of 28 layers, such as PixArt-Sigma-2K or PixArt-Sigma-2K@1024x1024. dtype: what is computed
    in; weights are float32. `ratio` is against one operator per job. Raises GraftError.
    """
    from grafting.analysis.estimate import distill_memory
    from grafting.families import family_of
    from grafting.loading import load_model
    from grafting.plan import GraftPlan, Replace
    from grafting.runs import environment
    from grafting.surgery import graft
    from grafting.training.config import DistillConfig

    if dtype not in PRECISIONS:
        raise GraftError(f"unknown dtype {dtype!r}: expected {' or '.join(PRECISIONS)}")
    teacher = load_model(f"arch:{size}", device="meta")
    config = DistillConfig(steps=1, batch_size=batch_size, num_validation=0, keep_best=False)
    rows: list[dict[str, Any]] = []
    for way, (layers, at_once) in WAYS.items():
        chosen = [layers] if isinstance(layers, int) else layers
        student = graft(teacher, GraftPlan([Replace("mha", chosen, "hyena_x")]), share=True)
        parts = distill_memory(teacher, student, config, batch_size, PRECISIONS[dtype], at_once=at_once)
        rows.append({
            "way": way, "operators": 1 if isinstance(layers, int) else 14, "weights": parts["weights"],
            "optimizer": parts["optimizer"], "activations": parts["activations and gradients"],
            "total": parts["total"], "ratio": parts["total"] / (rows[0]["total"] if rows else parts["total"]),
        })  # fmt: skip
    return {
        "benchmark": "stage1-memory", "what": "bytes at the peak of a step of stage 1, counted", "model": size,
        "tokens": family_of(teacher).sites(teacher)[0].num_tokens, "batch_size": batch_size, "dtype": dtype,
        "rows": rows,
        "at_once_over_one_at_a_time": rows[2]["total"] / rows[1]["total"],
        "activations_at_once_over_one_at_a_time": rows[2]["activations"] / rows[1]["activations"],
        "environment": environment(),
    }  # fmt: skip
