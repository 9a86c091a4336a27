"""The check of a fast path against the plain one at its first use, on the machine that runs it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Largest relative error (norm of the difference over the norm) of output and gradients, by type of the inputs.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def normals(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Standard normal values, the same each time; torch's own generators stay as they are."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def agrees(
    what: str, fast: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> bool:
    """Whether two forms of an operator give the same output and gradients; if not, a warning says what is used.

    The plain form is computed in float32 from the same values. An exception of the fast form counts as a difference.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(inputs[0].device.type, enabled=False),
    ):
        try:
            found = _both_ways(fast, [t.clone() for t in inputs])
        except Exception as error:  # a library of another version, a device it does not know
            return _refused(what, f"it failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
        exact = _both_ways(plain, [t.float() for t in inputs])
    limit = TOLERANCE[inputs[0].dtype]
    for name, mine, right in zip(
        ["output", *(f"gradient {n}" for n in range(len(inputs)))], found, exact, strict=True
    ):
        error_size = ((mine.float() - right).norm() / right.norm().clamp_min(1e-12)).item()
        if not error_size <= limit:  # NaN is not
            return _refused(what, f"its {name} is off by {error_size:.1e}, more than {limit:.0e}")
    return True


def _both_ways(form: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [t.requires_grad_() for t in inputs]
    output = form(*leaves)
    (weight,) = normals(output.device, output.dtype, tuple(output.shape))
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), leaves)]


def _refused(what: str, reason: str) -> bool:
    warnings.warn(
        f"{what} is not used here: {reason}; the plain PyTorch form is", RuntimeWarning, stacklevel=3
    )
    return False
