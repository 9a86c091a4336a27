"""Recipes: a model, data, a plan, and the settings of every stage. Each YAML file here states only what differs.

A preset is a set of defaults under the recipe: `grafting` (ours), `paper` (the text of arXiv 2506.05340) and
`paper-code` (the published code, where it differs from the text).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from grafting.errors import RunError
from grafting.plan import GraftPlan
from grafting.training.config import Count, DistillConfig, FinetuneConfig, Positive, Settings, settings
from grafting.yaml_io import load_yaml


class SampleConfig(Settings):
    """How both models are sampled."""

    num: Count = 1000
    steps: Annotated[int, Field(ge=1, le=1000)] = 50
    sampler: Literal["ddim", "ddpm", "dpm++"] = "ddim"
    guidance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.5
    batch_size: Count = 100
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    vae: str | None = None


class EvaluateConfig(Settings):
    """What the samples are measured against, and in which feature space."""

    reference: str = "fashion-train"
    features: str = "auto"


class Pretraining(Settings):
    """What the teacher cost, so that the edit can be given as a share of it."""

    image_visits: Positive


class Recipe(Settings):
    """One experiment: everything `graft run` needs."""

    name: str = "run"
    about: str = ""
    preset: Literal["grafting", "paper", "paper-code"] = "grafting"
    model: str
    num_heads: Count | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    data: str
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    plan: list[dict[str, Any]]
    locality: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    distill: DistillConfig | None = DistillConfig()
    finetune: FinetuneConfig | None = FinetuneConfig()
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig | None = EvaluateConfig()
    pretraining: Pretraining | None = None

    @field_validator("plan")
    @classmethod
    def _plan_is_valid(cls, value: list[dict[str, Any]]) -> list[dict[str, Any]]:
        GraftPlan.from_dict(value)
        return value

    @property
    def graft_plan(self) -> GraftPlan:
        return GraftPlan.from_dict(self.plan)

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe in JSON types."""
        return self.model_dump(mode="json")


PRESETS: dict[str, dict[str, Any]] = {
    "grafting": {},
    "paper": {
        # 8k samples x 200 epochs at batch 64; then 50k steps at batch 256.
        "distill": {
            "steps": 25_000, "lr": 1e-4, "schedule": "constant", "warmup": 0, "betas": [0.9, 0.999],
            "fit_readout": False, "early_stop": 0, "validate_every": 1000, "checkpoint_every": 1000, "log_every": 100,
        },
        "finetune": {
            "steps": 50_000, "batch_size": 256, "lr": 1e-4, "schedule": "constant", "warmup": 1000,
            "betas": [0.9, 0.999], "ema_decay": 0.9999, "objectives": {"diffusion": 1.0},
            "validate_every": 1000, "checkpoint_every": 1000, "log_every": 100,
        },
        "sample": {"num": 50_000, "steps": 250, "sampler": "ddpm", "guidance": 1.5},
    },
    "paper-code": {},
}  # fmt: skip
PRESETS["paper-code"] = {
    **PRESETS["paper"],
    "distill": {
        **PRESETS["paper"]["distill"],
        "lr": 5e-4,
        "schedule": "halving",
        "halve_at": [0.25, 0.5, 0.75],
    },
}


def packaged() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(
        Path(str(entry)).stem for entry in files("grafting.recipes").iterdir() if str(entry).endswith(".yaml")
    )


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by packaged name, file or mapping, with `a.b=value` overrides (values in YAML). Raises RunError."""
    if isinstance(source, Mapping):
        data: Any = dict(source)
        where = "recipe"
    else:
        path = Path(source)
        if str(source) in packaged():
            path = Path(str(files("grafting.recipes") / f"{source}.yaml"))
        elif not path.is_file():
            raise RunError(f"no recipe {str(source)!r}: expected a file or one of {', '.join(packaged())}")
        data = load_yaml(path, "recipe", RunError)
        where = f"recipe {str(source)!r}"
    if not isinstance(data, dict):
        raise RunError(f"{where}: expected a mapping with the keys model, data and plan")
    for text in overrides:
        _override(data, text)
    preset = data.get("preset", "grafting")
    if preset not in PRESETS:
        raise RunError(f"{where}: unknown preset {preset!r}: expected one of {', '.join(PRESETS)}")
    return settings(Recipe, _merged(PRESETS[preset], data), where)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, mapping by mapping."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        deep = isinstance(value, Mapping) and isinstance(below, Mapping) and key != "objectives"
        result[key] = _merged(below, value) if deep else value  # type: ignore[arg-type]
    return result


def _override(data: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise RunError(f"--set {text!r}: expected key=value or stage.key=value, such as distill.steps=500")
    target = data
    for part in parts[:-1]:
        below = target.get(part)
        if below is None:
            below = target[part] = {}
        if not isinstance(below, dict):
            raise RunError(f"--set {text!r}: {part!r} is not a mapping")
        target = below
    target[parts[-1]] = (
        load_yaml(value if value.strip() else "null", "--set", RunError) if "\n" in value else _scalar(value)
    )


def _scalar(value: str) -> Any:
    """A YAML value; the path heuristics of files are not for it."""
    wrapped = load_yaml(f"value: {value}\n", "--set", RunError)
    return wrapped["value"]
