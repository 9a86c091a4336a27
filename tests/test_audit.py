"""scripts/audit.py on advisories made by hand: which versions are affected, and what it says of bad input."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "audit.py"


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["audit"] = module
    spec.loader.exec_module(module)
    return module


def ranges(*events: tuple[str, str], kind: str = "ECOSYSTEM") -> dict[str, Any]:
    return {"type": kind, "events": [{name: version} for name, version in events]}


def advisory(*found: dict[str, Any], name: str = "demo-package", **more: Any) -> dict[str, Any]:
    versions = [v for part in found for v in part.get("listed", ())]
    affected = {
        "package": {"ecosystem": "PyPI", "name": name},
        "ranges": [part for part in found if "listed" not in part],
        "versions": versions,
    }
    return {"id": "PYSEC-1-1", "modified": "2024-05-06T01:02:03Z", "affected": [affected], **more}


WHICH = {
    "fixed": (advisory(ranges(("introduced", "0"), ("fixed", "1.10"))), {"0.1", "1.9", "1.10rc1"}),
    "from": (advisory(ranges(("introduced", "1.9"), ("fixed", "1.10"))), {"1.9", "1.10rc1"}),
    "never mended": (advisory(ranges(("introduced", "1.10"))), {"1.10", "1.10.post1", "2.0"}),
    "last": (advisory(ranges(("introduced", "0"), ("last_affected", "1.10"))), {"0.1", "1.9", "1.10rc1", "1.10"}),
    "twice": (
        advisory(ranges(("introduced", "0"), ("fixed", "1.9"), ("introduced", "1.10.post1"), ("fixed", "2.0"))),
        {"0.1", "1.10.post1"},
    ),
    "events in any order": (
        advisory(ranges(("fixed", "2.0"), ("introduced", "1.10"))),
        {"1.10", "1.10.post1"},
    ),
    "listed": (advisory({"listed": ["1.9.0", "2.0", "not a version"]}), {"1.9.0", "2.0"}),
    "listed or in the range": (
        advisory({"listed": ["0.1"]}, ranges(("introduced", "2.0"))),
        {"0.1", "2.0"},
    ),
    "commits": (advisory(ranges(("introduced", "0"), kind="GIT")), set()),
    "withdrawn": (advisory(ranges(("introduced", "0")), withdrawn="2024-05-07T00:00:00Z"), set()),
    "another package": (advisory(ranges(("introduced", "0")), name="demo-packages"), set()),
    "the same name": (advisory(ranges(("introduced", "2.0")), name="Demo_Package"), {"2.0"}),
    "not read": (advisory(ranges(("introduced", "0"), ("fixed", "one"))), None),
}  # fmt: skip
VERSIONS = ("0.1", "1.9", "1.9.0", "1.10rc1", "1.10", "1.10.post1", "2.0")


@pytest.mark.parametrize("case", WHICH)
@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_which_versions_are_affected(audit: ModuleType, tmp_path: Path, case: str, suffix: str) -> None:
    data, expected = WHICH[case]
    folder = tmp_path / "vulns" / "demo"
    folder.mkdir(parents=True)
    (folder / f"PYSEC-1-1{suffix}").write_text(json.dumps(data))  # JSON is YAML
    (folder / "other.json").write_text(json.dumps(advisory(name="other", id="PYSEC-1-2")))
    snapshot = audit.read(tmp_path)
    for version in VERSIONS:
        found = list(audit.findings({"demo-package": {version}}, snapshot))
        same = {audit.Version(v) for v in expected} if expected is not None else None
        assert bool(found) == (same is None or audit.Version(version) in same), version
        if found:
            assert found[0][:3] == ("demo-package", version, "PYSEC-1-1")
            mended = {"fixed": "1.10", "not read": "its range can't be read", "last": "nothing yet"}
            assert found[0][4] == mended.get(case, found[0][4])


def test_the_table_and_the_exit_status(
    audit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = tmp_path / "known"
    known.mkdir()
    first = advisory(ranges(("introduced", "0"), ("fixed", "1.10")), aliases=["CVE-1-1"])
    (known / "a.yaml").write_text(json.dumps(first))
    (known / "b.json").write_text(json.dumps({"$meta": {"timestamp": 1775023247}, "Other": [">=2,<3", "<1"]}))
    pins = tmp_path / "pins.txt"

    def run(text: str, *more: str) -> tuple[int, list[str], str]:
        pins.write_text(text)
        monkeypatch.setattr(sys, "argv", ["audit.py", "--advisories", str(known), "--pins", str(pins), *more])
        with pytest.raises(SystemExit) as ended:
            audit.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out.splitlines(), err

    clean = '# pins\n\nDemo.Package==1.10+cpu ; python_version < "3"  # why\nother==1.5\nthird==1\n'
    status, lines, _ = run(clean.replace("+cpu", ""))
    assert status == 0
    assert lines == [
        "packages checked: 3 (3 versions)", "advisories: 3, the newest of 2026-04-01",
        "packages that have an advisory for some version: 2", "findings: 0",
    ]  # fmt: skip
    assert run(clean)[0] == 0  # the part that names a build is none of the version
    status, lines, _ = run("demo_package==1.9\nother==2.1\n")
    assert status == 1
    assert [line.split() for line in lines[-2:]] == [
        ["demo-package", "1.9", "PYSEC-1-1", "CVE-1-1", "1.10"], ["other", "2.1", "b:", ">=2,<3", ">=2,<3"],
    ]  # fmt: skip
    status, lines, _ = run(clean, "--installed")
    assert status == 0
    assert int(lines[0].split()[2]) > 20
    for text, word in (("demo-package>=1\n", "not pinned"), ("==\n", "line 1")):
        status, lines, err = run(text)
        assert (status, lines) == (2, [])
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert word in err


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.json", "{"), ("a.yaml", "a: ["), ("a.yaml", "- a"), ("a.json", '{"a": 1}'), ("a.txt", "{}")],
)
def test_a_folder_that_can_t_be_read_is_an_error(
    audit: ModuleType, tmp_path: Path, name: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as ended:
        audit.read(tmp_path)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}")
