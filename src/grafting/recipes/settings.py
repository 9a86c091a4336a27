"""What a recipe holds: a model, data, a plan, and the settings of every stage."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from grafting.errors import PlanError
from grafting.formats.graft_folder import plan_of_graft
from grafting.plan import GraftPlan
from grafting.training.config import Count, DistillConfig, FinetuneConfig, Positive, Settings

# A folder's name that no file of a run has.
_FOLDER = re.compile(r"(?!(?:graft|stage-1|samples|checkpoints|cache)$)[A-Za-z0-9][A-Za-z0-9_-]*")

# Of a recipe: what changes a result by rounding at most, or only what is recorded and allowed on the way. A run goes on
# though they have changed.
_OF_BOTH_STAGES = ("micro_batch", "compile", "checkpoint_every", "keep_checkpoints", "log_every")
FREE_KEYS = {
    "about", "trackers", "distill.cache_limit_gb", "finetune.shard", "finetune.gradient_checkpointing",
    "finetune.preview_every", "finetune.preview_samples", "sample.batch_size", "sample.compile",
    *(f"{stage}.{key}" for stage in ("distill", "finetune") for key in _OF_BOTH_STAGES),
}  # fmt: skip


class SynthesizeConfig(Settings):
    """Pairs that the run samples from its own model, as `graft synthesize` does, and trains on."""

    prompts: str  # a file, or a packaged name
    truncate: bool = False  # prompts that are too long, instead of refusing them
    num: Count = 12_000
    steps: Annotated[int, Field(ge=1, le=1000)] = 20
    guidance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 4.5
    batch_size: Count = 4
    shard_size: Count = 64
    precision: Literal["auto", "fp32", "bf16"] = "fp32"


class SampleConfig(Settings):
    """How both models are sampled."""

    prompts: str | None = (
        None  # a file, or a packaged name; text-to-image models, default: captions of the data
    )
    truncate: bool = False
    num: Count = 1000
    steps: Annotated[int, Field(ge=1, le=1000)] = 50
    sampler: Literal["ddim", "ddpm", "dpm++"] = "ddim"
    guidance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.5
    batch_size: Count | Literal["auto"] = 100
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    compile: bool | Literal["auto"] = "auto"
    vae: str | None = None


class EvaluateConfig(Settings):
    """What the samples are measured against, and in which feature space."""

    reference: str = "fashion-train"
    features: str = "auto"


class Pretraining(Settings):
    """What the teacher cost, so that the edit can be given as a share of it."""

    image_visits: Positive


class Recipe(Settings):
    """One experiment: everything `graft run` needs.

    `init` is the start of the replace entries that state none of their own; it is written into the plan.
    The student is made by `plan`, or read from the folder `student` (an imported graft, one of another run).
    """

    name: str = "run"
    about: str = ""
    preset: Literal["grafting", "small", "paper", "paper-code"] = "grafting"
    model: str
    pipeline: str | None = None  # of a transformer that stands alone: folder or hub id of the rest
    num_heads: Count | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    data: str  # with `synthesize`: the folder in the run folder that the pairs go to
    synthesize: SynthesizeConfig | None = None
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    plan: list[dict[str, Any]] = []
    student: str | None = None
    init: Literal["donor", "random"] = "donor"
    locality: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    distill: DistillConfig | None = DistillConfig()
    finetune: FinetuneConfig | None = FinetuneConfig()
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig | None = EvaluateConfig()
    pretraining: Pretraining | None = None
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _entries_of_a_plan(cls, data: Any) -> Any:
        """A plan may also be a plan file's content ({version, entries}), or the path of one."""
        given = data.get("plan") if isinstance(data, dict) else None
        if not isinstance(given, (str, Mapping)):
            return data
        try:
            plan = GraftPlan.of(given)
        except PlanError as error:
            raise ValueError(f"plan: {error}") from None
        return {**data, "plan": plan.to_dict()["entries"]}

    @model_validator(mode="before")
    @classmethod
    def _fill_init(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("init", "donor") != "random":
            return data
        entries = data.get("plan")
        if not isinstance(entries, list):
            return data
        return {**data, "plan": [_starting_at_random(entry) for entry in entries]}

    @model_validator(mode="after")
    def _one_way_to_the_student(self) -> Recipe:
        if self.student is not None and self.plan:
            raise ValueError("plan and student: give one of them; a saved graft has its plan with it")
        if self.student is not None and self.locality is not None:
            raise ValueError(
                "locality chooses layers of a plan; a saved graft (student) has chosen: leave it out"
            )
        if self.student is None:
            try:
                GraftPlan.from_dict(self.plan)
            except PlanError as error:
                raise ValueError(f"plan: {error}") from None
        return self

    @model_validator(mode="after")
    def _pairs_have_a_folder(self) -> Recipe:
        if self.synthesize is not None and not _FOLDER.fullmatch(self.data):
            raise ValueError(
                f"data={self.data!r}: with synthesize, data names a new folder in the run folder, such as pairs"
            )
        return self

    @property
    def graft_plan(self) -> GraftPlan:
        """The plan of the recipe, or of the saved graft that it goes on with. Raises PlanError, CheckpointError."""
        return GraftPlan.from_dict(self.plan) if self.student is None else plan_of_graft(self.student)

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe in JSON types."""
        return self.model_dump(mode="json")


def upgraded(recipe: Mapping[str, Any], version: int) -> dict[str, Any]:
    """A resolved recipe of a run folder of that version, in the form that it has today.

    Settings that it does not have are as they are by default. Before version 2 a stage's seed of 0 was the run's.
    """
    found = dict(recipe)
    kinds: dict[str, type[Settings]] = {
        "distill": DistillConfig, "finetune": FinetuneConfig, "sample": SampleConfig, "evaluate": EvaluateConfig,
    }  # fmt: skip
    for name, kind in kinds.items():
        if not isinstance(found.get(name), Mapping):
            continue
        stage = dict(found[name])
        if version < 2 and stage.get("seed") == 0:
            stage["seed"] = None
        found[name] = kind().model_dump(mode="json") | stage
    if isinstance(made := found.get("synthesize"), Mapping):
        found["synthesize"] = {"truncate": False} | dict(made)
    return found


def differences(one: Mapping[str, Any], other: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """The keys in which two resolved recipes differ, those of nested mappings with dots: `finetune.lr`."""
    for key in {**one, **other}:
        mine, theirs = one.get(key), other.get(key)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            yield from differences(mine, theirs, f"{within}{key}.")
        elif mine != theirs:
            yield f"{within}{key}"


def _starting_at_random(entry: Any) -> Any:
    body = entry.get("replace") if isinstance(entry, dict) else None
    if not isinstance(body, dict) or "init" in body:
        return entry
    return {**entry, "replace": {**body, "init": "random"}}
