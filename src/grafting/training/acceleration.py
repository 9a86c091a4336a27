"""What makes a stage faster and leaves its result as it is: compiled blocks, frozen weights in autocast's type."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn

from grafting.families import family_of
from grafting.training.compute import Compute

Compile = bool | Literal["auto"]
GRAPHS = 64  # of one kind of block: by its operators, mode and batch size; beyond it a block runs uncompiled


def compiles(setting: Compile, device: torch.device) -> bool:
    """Whether modules are compiled there; `auto`: on CUDA, since compiling costs a CPU more than a short run gains."""
    return device.type == "cuda" if setting == "auto" else setting


@contextlib.contextmanager
def compiled(
    modules: Sequence[nn.Module], setting: Compile, device: torch.device, backend: Any = "inductor"
) -> Iterator[None]:
    """While inside, calls of `modules` are compiled, for each shape anew, so that results don't depend on their order.

    With `auto`, what can't be compiled runs as it is. State dicts are as before.
    """
    if not compiles(setting, device) or not modules:
        yield
        return
    import torch._dynamo.config as dynamo

    patch = dynamo.patch(
        recompile_limit=GRAPHS, accumulated_recompile_limit=GRAPHS * 8, suppress_errors=setting == "auto"
    )
    with patch:
        for module in modules:
            module.compile(dynamic=False, backend=backend)
        try:
            yield
        finally:
            for module in modules:
                module._compiled_call_impl = None


def frozen_copy(model: nn.Module, compute: Compute) -> nn.Module:
    """A model to call, never to train: the linear weights that autocast would cast at every call are cast once.

    The values are those of autocast to the last bit. Other weights are shared with `model`, which stays as it is.
    The family's `ends` are not computed in autocast's type and keep their weights.
    """
    if compute.precision != "bf16":
        return model
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    ends = {module for end in family_of(model).ends(model) for module in end.modules()}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module not in ends:
            for parameter in module.parameters(recurse=False):
                if parameter.dtype == torch.float32:
                    memo[id(parameter)] = nn.Parameter(parameter.detach().bfloat16(), requires_grad=False)
    return copy.deepcopy(model, memo)
