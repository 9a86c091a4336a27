"""Settings of the two stages. Immutable, validated; a mapping with the same keys is accepted wherever one is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from grafting.errors import RunError
from grafting.selectors import closest

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10**9, strict=True)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Precision = Literal["auto", "fp32", "bf16"]


# As the paper found; for targets that `losses` does not name.
Target = Literal["mha", "mlp", "block_group"]
Loss = Literal["l1", "l2", "huber", "auto"]
DEFAULT_LOSSES: dict[Target, Loss] = {"mha": "l1", "mlp": "l2", "block_group": "l1"}


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Optimization(Settings):
    """What both stages share: AdamW, a learning-rate schedule, clipping, precision, checkpoints."""

    steps: Count = 250
    batch_size: Count = 64
    micro_batch: Annotated[int, Field(ge=0)] = 0  # samples per forward pass of a process; 0: its whole share
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None  # None: the run's; 0 without a run
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of linear layers
    lr: Positive = 1e-3
    schedule: Literal["cosine", "linear", "constant", "halving"] = "cosine"
    warmup: Annotated[int, Field(ge=0)] = 20
    halve_at: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.25, 0.5, 0.75)  # fractions of the run
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Positive = 10.0
    label_dropout: Fraction = 0.1
    precision: Precision = "auto"
    compile: bool | Literal["auto"] = "auto"  # blocks by torch.compile; auto: on CUDA
    num_validation: Annotated[int, Field(ge=0)] = 256
    validate_every: Count = 50
    checkpoint_every: Count = 100
    keep_checkpoints: Count = 2
    log_every: Count = 10
    max_bad_steps: Annotated[int, Field(ge=0)] = (
        10  # steps in a row with non-finite gradients that are skipped
    )


class DistillConfig(Optimization):
    """Stage 1. Losses of the plan's entries win over `losses`, which is per target."""

    losses: dict[Target, Loss] = dict(DEFAULT_LOSSES)
    # The file of `graft activations` that settles the loss auto; None: measured at the start.
    activations: str | None = None
    mode: Literal["one-pass", "cached"] = "one-pass"
    fit_readout: bool = True
    fit_samples: Count = 256
    fit_ridge: Positive = 1e-4
    keep_best: bool = True
    early_stop: Annotated[int, Field(ge=0)] = (
        4  # validations without progress after which an operator rests; 0: never
    )
    early_stop_tolerance: Fraction = 1e-3
    reuse: Count = 1  # updates per teacher pass
    reuse_passes: Count = 4  # how many passes are held for that
    cache_samples: Count = 8000  # mode cached: how many stored activations
    cache_limit_gb: Positive = 50.0  # mode cached: refuse to fill more disk than this

    @model_validator(mode="after")
    def _one_store(self) -> DistillConfig:
        if self.reuse > 1 and self.mode == "cached":
            raise ValueError(
                "mode cached stores all teacher passes already: give reuse: 1, or mode: one-pass"
            )
        return self


class LoraConfig(Settings):
    """LoRA on what the plan left as it was, while the new operators train whole (needs peft).

    `targets`: last parts of the names of linear layers; default: the projections of all attentions and MLPs.
    """

    rank: Annotated[int, Field(le=4096, strict=True)] = 64
    alpha: Positive = 64.0
    targets: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _some_rank(self) -> LoraConfig:
        if self.rank < 1:
            raise ValueError(
                f"rank {self.rank} trains nothing: give at least 1 (64 for PixArt-Sigma), or leave lora out to train "
                "all weights"
            )
        return self


class FinetuneConfig(Optimization):
    """Stage 2. `objectives` are weights of diffusion (the DiT loss), output and features (match the teacher)."""

    steps: Count = 350
    lr: Positive = 5e-4
    objectives: dict[Literal["diffusion", "output", "features"], Annotated[float, Field(ge=0)]] = {
        "diffusion": 1.0
    }
    train: Literal["all", "blocks", "operators"] = "all"
    shard: Literal["none", "full"] = (
        "none"  # full: cut weights, gradients, moments and average over the processes
    )
    lora: LoraConfig | None = None  # adapters on the rest, which itself stays fixed
    gradient_checkpointing: bool = False  # blocks are computed again in the backward pass instead of kept
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0  # stratified share of the data that is trained on
    timesteps: Literal["uniform", "spread"] = (
        "uniform"  # drawn independently, or so that any run of samples covers all noise levels evenly
    )
    ema_horizon: Annotated[float, Field(gt=0, le=1)] = 0.1  # of the run: decay = 1 - 1 / (horizon * steps)
    ema_decay: Fraction | None = None  # a fixed decay instead, such as the paper's 0.9999
    output_snr_cap: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 10.0  # 1: all timesteps alike
    output_variance: Annotated[float, Field(ge=0)] = 0.05  # weight of the variance half in `output`
    feature_outliers: Fraction = 1e-3  # share of the largest teacher activations that `features` leaves out
    preview_every: Annotated[int, Field(ge=0)] = (
        0  # steps between sheets of samples of the averaged weights; 0: none
    )
    preview_samples: Count = 20

    @model_validator(mode="after")
    def _whole_matrices(self) -> FinetuneConfig:
        if self.shard == "full" and self.optimizer == "muon":
            raise ValueError("optimizer muon works on whole matrices: give shard: none, or optimizer: adamw")
        return self

    @model_validator(mode="after")
    def _adapters_or_weights(self) -> FinetuneConfig:
        if self.lora is not None and self.train == "blocks":
            raise ValueError(
                "train: blocks and lora: give one; with lora the new operators train whole and adapters on the rest"
            )
        return self

    @model_validator(mode="after")
    def _some_objective(self) -> FinetuneConfig:
        if not any(weight > 0 for weight in self.objectives.values()):
            raise ValueError("objectives: give at least one of diffusion, output, features a weight above 0")
        return self


Kind = TypeVar("Kind", bound=Settings)
Stage = TypeVar("Stage", bound=Optimization)


def seeded(config: Stage, seed: int) -> Stage:
    """The settings of a stage with a seed of their own: `seed`, that of the run, where they state none."""
    return config if config.seed is not None else config.model_copy(update={"seed": seed})


def settings(kind: type[Kind], given: Kind | Mapping[str, Any] | None, where: str) -> Kind:
    """Validate settings given as an object or a mapping. Raises RunError in one line, with close matches."""
    if isinstance(given, kind):
        return given
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        raise RunError(f"{where}: expected a mapping of settings, got {type(given).__name__}")
    try:
        return kind.model_validate(dict(given))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"]) or where
        if problem["type"] == "extra_forbidden":
            known = list(_nested(kind, problem["loc"][:-1]).model_fields)
            hint = closest(key.split(".")[-1], known)
            raise RunError(f"{where}: unknown key {key!r}{hint}; known: {', '.join(known)}") from None
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "value_error" and isinstance(problem["input"], Mapping):
            raise RunError(f"{where}: {message if key == where else f'{key}: {message}'}") from None
        raise RunError(f"{where}: {key}={str(problem['input'])[:80]!r}: {message}") from None


def _nested(kind: type[Settings], keys: Sequence[int | str]) -> type[Settings]:
    """The settings under these keys of `kind`; `kind` itself where there are none of their own."""
    for key in keys:
        field = kind.model_fields.get(str(key))
        kinds = get_args(field.annotation) or (field.annotation,) if field else ()
        kind = next((k for k in kinds if isinstance(k, type) and issubclass(k, Settings)), kind)
    return kind
