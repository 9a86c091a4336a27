"""What several test files share: the reference tensors, and a tiny DiT with tiny data."""

from __future__ import annotations

import gc
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Triton's kernels run in its interpreter, on CPU tensors too; read when something first imports it.
os.environ["TRITON_INTERPRET"] = os.environ.get("TRITON_INTERPRET", "1")

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from grafting.data import ImageLabelDataset
from grafting.models.dit import DiT, DiTConfig

FIXTURES = Path(__file__).parent / "fixtures"
TINY = DiTConfig(
    input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=4, num_heads=4, num_classes=4
)


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors, but for one of diffusers under NumPy 2 that it will have to mend itself. No network."""
    sys.addaudithook(_no_network)
    # Its checks say what they saw, as asserts in test files do.
    pytest.register_assert_rewrite("report_tools")
    config.addinivalue_line("filterwarnings", "ignore:__array__ implementation:DeprecationWarning")


ATTEMPTS: list[str] = []
"""To reach another machine, by this process; each is refused."""
_HERE = {None, "", "localhost", "127.0.0.1", "::1", socket.gethostname()}


def _no_network(event: str, given: tuple[Any, ...]) -> None:
    """Refuse connections to other machines, and the look-up of their names. (An audit hook: it can't be removed.)"""
    if event not in ("socket.connect", "socket.getaddrinfo"):
        return
    address = given[1] if event == "socket.connect" else given
    host = address[0] if isinstance(address, tuple) else None  # sockets of this machine have a path
    if (host.decode() if isinstance(host, bytes) else host) not in _HERE:
        ATTEMPTS.append(f"{event} {host}")
        raise ConnectionRefusedError("tests use no network")


@pytest.fixture(autouse=True)
def _network_is_not_asked_for() -> Iterator[None]:
    yield
    attempts, ATTEMPTS[:] = ATTEMPTS[:], []
    assert attempts == []


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tensors here are tiny: threads only get in each other's way.

    Alive are half a million objects of imported modules: looking for cycles among them took a tenth of the time.
    """
    torch.set_num_threads(1)
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="session")
def reference() -> dict[str, Tensor]:
    """Tensors of the published code."""
    return load_file(FIXTURES / "dit.safetensors")


def tiny_dit(seed: int = 0, **changes: Any) -> DiT:
    """A small DiT whose every weight is drawn, so that no block is the identity."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DiT(DiTConfig(**{**TINY.to_dict(), **changes}))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.15)
    return model.eval()


@pytest.fixture
def model() -> DiT:
    return tiny_dit()


@pytest.fixture(scope="session")
def data() -> ImageLabelDataset:
    """Eighty smooth images in four classes."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(80) % 4
    ramp = torch.linspace(-1, 1, 8)
    x = ramp[None, :] * (y[:, None] - 1.5)[:, :, None] * 0.4 + 0.2 * torch.randn(
        80, 8, 8, generator=generator
    )
    return ImageLabelDataset(x.clamp(-1, 1).unsqueeze(1), y, name="tiny", num_classes=4)


def relative(found: Tensor, wanted: Tensor) -> float:
    """L2 norm of the difference over L2 norm of what was wanted."""
    return ((found - wanted).norm() / wanted.norm()).item()


def prediction(model: torch.nn.Module, seed: int = 3) -> Tensor:
    """A prediction on fixed inputs, to compare models by."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    x = torch.randn(3, config.in_channels, config.input_size, config.input_size, generator=generator)
    with torch.no_grad():
        return model(x, torch.tensor([0, 400, 999]), torch.tensor([0, 1, config.num_classes]))


__all__ = ["FIXTURES", "TINY", "prediction", "relative", "tiny_dit"]


@pytest.fixture
def graft_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`graft ...` in this process: its standard output; AssertionError with what it said on stderr if it failed."""
    import sys

    from grafting import cli

    def command(*arguments: str) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["graft", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        if stop.value.code:
            raise AssertionError(f"exit {stop.value.code}: {err.strip()}")
        return out

    return command


@pytest.fixture
def quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers in what a command prints."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()
