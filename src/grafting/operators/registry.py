"""The open registry of operators: a name, a class, and a configuration read off the class's `__init__`.

    @register("my_operator", targets=("mha",))
    class MyOperator(nn.Module):
        def __init__(self, *, dim: int, width: Annotated[int, Field(ge=1)] = 3) -> None: ...

`dim`, `num_heads` and `num_tokens` come from the model and are passed if `__init__` names them; every other
keyword-only parameter is a configuration key, validated by its annotation.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic.errors import PydanticUserError
from torch import nn

from grafting.errors import OperatorError
from grafting.plugins import VARIABLE, load_plugins

DIMENSIONS = ("dim", "num_heads", "num_tokens")
TARGETS = ("mha", "mlp")

ModuleClass = TypeVar("ModuleClass", bound=type[nn.Module])


@dataclass(frozen=True)
class Entry:
    """A registered operator: what it can replace, who registers it, how it is configured."""

    name: str
    cls: type[nn.Module]
    targets: tuple[str, ...]
    package: str
    config: type[BaseModel]
    dimensions: tuple[str, ...]

    @property
    def defaults(self) -> dict[str, Any]:
        """The configuration keys that have a default, with it."""
        fields = self.config.model_fields.items()
        return {key: field.get_default() for key, field in fields if not field.is_required()}

    @cached_property
    def source_hash(self) -> str | None:
        """SHA-256 of the code of the class; None for the package's own, and where there is no source to read.

        Read once, so that a file that is edited later does not speak for the code that this process runs.
        """
        if self.package == "grafting":
            return None
        try:
            return hashlib.sha256(inspect.getsource(self.cls).encode()).hexdigest()
        except (OSError, TypeError):
            return None


_entries: dict[str, Entry] = {}


def register(
    name: str, *, targets: Iterable[str] = TARGETS, package: str | None = None
) -> Callable[[ModuleClass], ModuleClass]:
    """Class decorator that makes an `nn.Module` [B, N, D] -> [B, N, D] known as the operator `name`.

    `targets`: which kinds of site it may replace. `package`: what must be imported to have it (default: the
    module that defines the class); a saved graft stores it. Raises `OperatorError` if the name is taken.
    """
    kinds = (targets,) if isinstance(targets, str) else tuple(targets)
    if not isinstance(name, str) or not name.strip():
        raise OperatorError(f"an operator's name is a non-empty string, not {name!r}")
    if not kinds or any(kind not in TARGETS for kind in kinds):
        raise OperatorError(f"operator '{name}': targets are some of {', '.join(TARGETS)}, not {kinds!r}")

    def decorate(cls: ModuleClass) -> ModuleClass:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise OperatorError(f"operator '{name}': an nn.Module class is registered, not {cls!r}")
        known = _entries.get(name)
        if known is not None and _identity(known.cls) != _identity(cls):
            raise OperatorError(
                f"operator '{name}' is already registered by {_identity(known.cls)}; "
                f"give {_identity(cls)} another name"
            )
        config, dimensions = _read_signature(name, cls)
        _entries[name] = Entry(name, cls, kinds, package or cls.__module__, config, dimensions)
        return cls

    return decorate


def names() -> list[str]:
    """Names of all registered operators, in order of registration, those of plugins too."""
    load_plugins()
    return list(_entries)


def get(name: str, package: str | None = None) -> Entry:
    """The entry of a registered operator.

    `package`: which module or package is known to register it (a saved graft stores that), for the error if it is
    not registered. Raises `OperatorError`.
    """
    if not isinstance(name, str) or name not in _entries:
        load_plugins()
    entry = _entries.get(name) if isinstance(name, str) else None
    if entry is not None:
        return entry
    message = f"unknown operator {_short(name)}"
    if package and package != "grafting":
        raise OperatorError(f"{message}: {_how_to_have(package)}")
    raise OperatorError(f"{message}{_did_you_mean(name, _entries)}; registered: {', '.join(_entries)}")


def is_of_a_script(module: str) -> bool:
    """Whether this module is a script or notebook, which no other process can import."""
    return module in ("__main__", "__mp_main__")


def _how_to_have(package: str) -> str:
    if is_of_a_script(package):
        return (
            "it was defined in a script or notebook: run its definition (@register) there first, or move it into a "
            f"module and import that or name it in {VARIABLE}"
        )
    if package in sys.modules:  # earlier files name the top-level package alone
        return (
            f"it is registered by a module of '{package}' that importing {package} does not import: import that "
            f"module first, or name it in {VARIABLE}"
        )
    return f"it is registered by '{package}': import {package} first, or name it in {VARIABLE}"


def config_of(name: str, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Validate the configuration of an operator; what was given, in JSON types, without defaults.

    Raises `OperatorError` that names the operator, the key, the value and what is accepted.
    """
    entry = get(name)
    given = {} if config is None else config
    if not isinstance(given, Mapping):
        raise OperatorError(
            f"operator '{name}': its config is a mapping of keys to values, not {_short(given)}"
        )
    try:
        checked = entry.config.model_validate(dict(given)).model_dump(mode="json", exclude_unset=True)
    except ValidationError as error:
        raise OperatorError(_explain(entry, given, error)) from None
    # 3 stays 3 where a float is accepted: a plan prints as it was written.
    return {key: given[key] if type(given[key]) is int else value for key, value in checked.items()}


def build(
    name: str, *, dim: int, num_heads: int | None = None, num_tokens: int | None = None, **config: Any
) -> nn.Module:
    """Build a registered operator of width `dim`, freshly initialised with torch's global generator.

    `num_heads` and `num_tokens` are needed by some operators only. Raises `OperatorError`.
    """
    entry = get(name)
    given = {"dim": dim, "num_heads": num_heads, "num_tokens": num_tokens}
    dimensions = {}
    for key in entry.dimensions:
        value = given[key]
        if value is None:
            raise OperatorError(f"operator '{name}' needs {key}: give build(..., {key}=...)")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OperatorError(
                f"operator '{name}': {key}={_short(value)} must be a whole number of at least 1"
            )
        dimensions[key] = value
    module = entry.cls(**dimensions, **config_of(name, config))
    module.operator_name = name  # type: ignore[assignment]
    return module


def describe(name: str) -> str:
    """The configuration keys of an operator in one line: `window (int >= 0, default 4)`."""
    entry = get(name)
    return ", ".join(_describe_key(entry, key) for key in entry.config.model_fields) or "none"


def _read_signature(name: str, cls: type[nn.Module]) -> tuple[type[BaseModel], tuple[str, ...]]:
    """The configuration model and the dimensions that `cls.__init__` asks for."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    try:
        hints = get_type_hints(cls.__init__, include_extras=True)
    except NameError as error:
        raise OperatorError(f"operator '{name}': an annotation of {cls.__name__}.__init__: {error}") from None
    dimensions: list[str] = []
    fields: dict[str, Any] = {}
    for parameter in parameters:
        key = parameter.name
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if key in DIMENSIONS and parameter.kind is not parameter.POSITIONAL_ONLY:
            dimensions.append(key)
        elif parameter.kind is parameter.KEYWORD_ONLY:
            required = parameter.default is parameter.empty
            fields[key] = (hints.get(key, Any), ... if required else parameter.default)
        else:
            raise OperatorError(
                f"operator '{name}': {cls.__name__}.__init__ takes '{key}' by position; "
                f"only {', '.join(DIMENSIONS)} may be, make it keyword-only (put it after *)"
            )
    try:
        settings = ConfigDict(extra="forbid", strict=True, protected_namespaces=())
        return create_model(f"{cls.__name__}Config", __config__=settings, **fields), tuple(dimensions)
    except (PydanticUserError, NameError) as error:
        reason = str(error).splitlines()[0]
        raise OperatorError(
            f"operator '{name}': a key of {cls.__name__}.__init__ can't be read: {reason}"
        ) from None


def _explain(entry: Entry, given: Mapping[str, Any], error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    key = str(first["loc"][0]) if first["loc"] else ""
    start = f"operator '{entry.name}'"
    if first["type"] == "extra_forbidden":
        hint = _did_you_mean(key, entry.config.model_fields)
        return f"{start} has no config key {_short(key)}{hint}; keys: {describe(entry.name)}"
    if first["type"] == "missing":
        return f"{start} needs the config key {_describe_key(entry, key)}"
    reason = first["msg"][:1].lower() + first["msg"][1:]
    value = _short(given.get(key))
    return f"{start}: {key}={value} is not accepted ({reason}); accepted: {_describe_key(entry, key)}"


def _describe_key(entry: Entry, key: str) -> str:
    field = entry.config.model_fields.get(key)
    if field is None:
        return key
    words = [getattr(field.annotation, "__name__", str(field.annotation))]
    for bound in field.metadata:
        signs = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        words += [
            f"{sign} {getattr(bound, at)}" for at, sign in signs if getattr(bound, at, None) is not None
        ]
    default = "required" if field.is_required() else f"default {field.get_default()!r}"
    return f"{key} ({' '.join(words)}, {default})"


def _did_you_mean(word: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=3, cutoff=0.5)
    return f", did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def _identity(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
