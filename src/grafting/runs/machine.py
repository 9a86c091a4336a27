"""What a run computes on, as recorded in run.json and in studies."""

from __future__ import annotations

import os
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Versions, processor, threads, and the GPUs that this process may use."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from grafting import __version__

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    found["grafting"] = __version__
    for name in ("diffusers", "accelerate"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    found["platform"] = f"{platform.system()} {platform.machine()}"
    found["cpu_count"] = os.cpu_count()
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        found["gpu"] = ", ".join(
            name if names.count(name) == 1 else f"{names.count(name)} x {name}"
            for name in dict.fromkeys(names)
        )
    return found
