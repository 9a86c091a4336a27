"""Packages of others that register operators and families, imported at the first look-up that needs to know of them.

They are found in every process alike (of `--processes`, of a study's jobs): installed packages by their entry points
of the group `grafting.plugins`, others by name in the environment variable GRAFTING_PLUGINS (modules, commas between).
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

from grafting.errors import GraftError

VARIABLE, GROUP = "GRAFTING_PLUGINS", "grafting.plugins"
HOW = f"import the package that registers it first, or name it in {VARIABLE}"
_imported: set[str] = set()


def load_plugins() -> None:
    """Import what was not yet; a plugin may look things up while it is imported. Raises GraftError."""
    named = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    places = [(name, f"named in {VARIABLE}") for name in named] + _installed()
    for name, where in places:
        if name in _imported:
            continue
        _imported.add(name)
        try:
            import_module(name)
        except Exception as error:
            _imported.discard(name)
            reason = next(iter(str(error).splitlines()), "")
            raise GraftError(
                f"the plugin {name!r}, {where}, can't be imported: {type(error).__name__}: {reason[:200]}; "
                "install it, put its folder on PYTHONPATH, mend it, or leave it out"
            ) from error


@cache
def _installed() -> list[tuple[str, str]]:
    """(module, where from) of the installed packages' entry points; which there are is read once."""
    return [(point.module, f"an entry point of {GROUP}") for point in entry_points(group=GROUP)]
