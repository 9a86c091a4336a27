"""Look up pinned packages in a folder of security advisories, where no advisory service can be reached.

    git clone https://github.com/pypa/advisory-database
    python scripts/audit.py --advisories advisory-database/vulns              # what constraints.txt pins
    python scripts/audit.py --advisories advisory-database/vulns --installed  # and what this Python has

FOLDER holds advisories of the OSV schema (`*.yaml`, `*.yml`, `*.json`, at any depth), of which those for PyPI count;
a JSON object of package -> list of version specifiers (Safety DB's insecure.json) is read, too. A version is affected
if it is listed, or lies in an ECOSYSTEM or SEMVER range (https://ossf.github.io/osv-schema/#evaluation); withdrawn
advisories and ranges of commits do not count, and a range that can't be read counts as a finding. Prints a table;
exit status 1 if anything is found, 2 for bad input. Where there is a network, use pip-audit: what is in no folder
is not found here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import yaml
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).resolve().parents[1]
LOADER = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # every scalar a string: 1.10 is no number
SUFFIXES = (".yaml", ".yml", ".json")
Pins = dict[str, set[str]]  # canonical name -> versions


@dataclass
class Advisory:
    """What one advisory says of one package."""

    id: str
    aliases: tuple[str, ...] = ()
    versions: frozenset[Version] = frozenset()
    ranges: list[list[tuple[str, str]]] = field(default_factory=list)  # events (kind, version)
    specifier: str = ""

    def affects(self, version: Version) -> bool:
        """Whether a version is listed or lies in a range. Raises InvalidVersion or InvalidSpecifier."""
        if self.specifier:
            return SpecifierSet(self.specifier).contains(version, prereleases=True)
        return version in self.versions or any(inside(version, events) for events in self.ranges)

    def fixed(self) -> str:
        """The versions that mend it, or what it says of the affected ones."""
        versions = [v for events in self.ranges for kind, v in events if kind == "fixed"]
        return self.specifier or ", ".join(versions)


@dataclass
class Snapshot:
    """Advisories by canonical name of their package; how many there are and the newest date in them."""

    packages: dict[str, list[Advisory]] = field(default_factory=dict)
    advisories: int = 0
    newest: str = ""


def main() -> None:
    """Parse, look up, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--advisories", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--pins", type=Path, action="append", metavar="FILE", help="default: constraints.txt")
    parser.add_argument("--installed", action="store_true", help="look up what this Python has, too")
    options = parser.parse_args()
    pins: Pins = {}
    for file in options.pins or [ROOT / "constraints.txt"]:
        merge(pins, pinned(file))
    if options.installed:
        merge(pins, installed())
    snapshot = read(options.advisories)
    found = sorted(findings(pins, snapshot))
    print(f"packages checked: {len(pins)} ({sum(map(len, pins.values()))} versions)")
    print(f"advisories: {snapshot.advisories}, the newest of {snapshot.newest or 'no date'}")
    print(f"packages that have an advisory for some version: {len(pins.keys() & snapshot.packages.keys())}")
    print(f"findings: {len(found)}")
    rows = [("package", "version", "advisory", "also", "mended in"), *found]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows if found else ():
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    raise SystemExit(1 if found else 0)


def fail(message: str) -> NoReturn:
    """End with one line and status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# ---- what is looked up


def pinned(file: Path) -> Pins:
    """Name and version of every `name==version` line of a requirements file, whatever its marker says."""
    pins: Pins = {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{file}: {error}")
    for number, line in enumerate(lines, 1):
        text = line.split(" #")[0].strip()
        if not text or text.startswith("#"):
            continue
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            fail(f"{file}, line {number}: {text[:80]!r} is no requirement")
        exact = [s.version for s in requirement.specifier if s.operator in ("==", "===")]
        if len(exact) != 1 or "*" in exact[0]:
            fail(f"{file}, line {number}: {requirement.name} is not pinned by one ==")
        pins.setdefault(canonicalize_name(requirement.name), set()).add(exact[0])
    return pins


def installed() -> Pins:
    """Name and version of what this Python can import."""
    return {canonicalize_name(d.name): {d.version} for d in metadata.distributions() if d.metadata["Name"]}


def merge(pins: Pins, more: Pins) -> None:
    """Add the versions of `more`; parts that name a build (+cpu) are left out, as advisories know none."""
    for name, versions in more.items():
        for version in versions:
            try:
                pins.setdefault(name, set()).add(Version(version).public)
            except InvalidVersion:
                fail(f"{name}: {version[:80]!r} is no version")


# ---- what is known


def read(folder: Path) -> Snapshot:
    """Every advisory below a folder. Ends with status 2 at a file that can't be read, or if there is none."""
    snapshot = Snapshot()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file()):
        try:
            text = path.read_text(encoding="utf-8")
            data = json.loads(text) if path.suffix == ".json" else yaml.load(text, LOADER)
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            fail(f"{path}: {' '.join(str(error).split())[:200]}")
        if not isinstance(data, dict):
            fail(f"{path}: expected an object")
        add(snapshot, data, path)
    if not snapshot.advisories:
        fail(f"{folder}: no advisory in it (*.yaml or *.json of the OSV schema)")
    return snapshot


def add(snapshot: Snapshot, data: Mapping[str, Any], path: Path) -> None:
    """Take in one file."""
    if "id" not in data:
        if not all(isinstance(v, list) for k, v in data.items() if k != "$meta"):
            fail(f"{path}: neither an OSV advisory (no id) nor lists of version specifiers")
        stamp = data.get("$meta", {}).get("timestamp", 0)
        date = datetime.fromtimestamp(int(stamp), timezone.utc).isoformat() if stamp else ""
        for name, specifiers in data.items():
            for specifier in specifiers if name != "$meta" else ():
                entry = Advisory(f"{path.stem}: {specifier}", specifier=str(specifier))
                snapshot.packages.setdefault(canonicalize_name(name), []).append(entry)
                snapshot.advisories += 1
        snapshot.newest = max(snapshot.newest, date[:10])
        return
    if data.get("withdrawn"):
        return
    known = False
    for affected in data.get("affected") or []:
        package = affected.get("package") or {}
        if package.get("ecosystem") != "PyPI":
            continue
        known = True
        ranges = [r.get("events") or [] for r in affected.get("ranges") or [] if r.get("type") != "GIT"]
        entry = Advisory(
            str(data["id"]),
            tuple(map(str, data.get("aliases") or ())),
            frozenset(comparable(affected.get("versions") or ())),
            [[(str(k), str(v)) for event in events for k, v in event.items()] for events in ranges],
        )
        snapshot.packages.setdefault(canonicalize_name(str(package.get("name"))), []).append(entry)
    if known:
        snapshot.advisories += 1
        dates = [str(data.get(key) or "")[:10] for key in ("modified", "published")]
        snapshot.newest = max(snapshot.newest, *dates)


def comparable(versions: Iterable[Any]) -> Iterator[Version]:
    """Those of a list that are versions by today's rules; others can't be installed any more."""
    for version in versions:
        with contextlib.suppress(InvalidVersion):
            yield Version(str(version))


def inside(version: Version, events: Iterable[tuple[str, str]]) -> bool:
    """Whether a version lies in a range of events, by the evaluation of the OSV schema. Raises InvalidVersion."""
    ordered = sorted(((Version(v), kind) for kind, v in events if kind != "limit"), key=lambda e: e[0])
    affected = False
    for place, kind in ordered:
        if kind == "introduced" and (version >= place or place == Version("0")):
            affected = True
        elif (kind == "fixed" and version >= place) or (kind == "last_affected" and version > place):
            affected = False
    return affected


def findings(pins: Pins, snapshot: Snapshot) -> Iterator[tuple[str, str, str, str, str]]:
    """(package, version, advisory, its other names, the versions that mend it) of what is affected."""
    for name, versions in pins.items():
        for version in versions:
            for advisory in snapshot.packages.get(name, ()):
                also = ", ".join(advisory.aliases)
                try:
                    if advisory.affects(Version(version)):
                        yield name, version, advisory.id, also, advisory.fixed() or "nothing yet"
                except (InvalidVersion, InvalidSpecifier):
                    yield name, version, advisory.id, also, "its range can't be read"


if __name__ == "__main__":
    main()
