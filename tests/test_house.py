"""House rules that a reader relies on: documented modules, no private paths, pinned tools, quick commands."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("reference", "chipmunk_kernels", "tuner", "suites")
TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".cu", ".sh", ""}


def modules() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def tracked_texts() -> list[Path]:
    """Every text file that git tracks; the packages' modules where there is no git (an unpacked archive)."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split("\0") if listed.returncode == 0 else [str(path) for path in modules()]
    paths = [ROOT / name for name in names if name]
    return [path for path in paths if path.suffix in TEXT and path.is_file()]


def undocumented(source: str) -> list[str]:
    """The module itself and its public classes and functions that have no docstring."""
    tree = ast.parse(source)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    missing = [] if ast.get_docstring(tree) or not tree.body else ["the module"]
    for node in tree.body:
        # A pytest function is documented by its name; a decorated overload or kernel by what it decorates.
        if isinstance(node, kinds) and not node.name.startswith(("_", "test_", "pytest_")):
            missing += [] if ast.get_docstring(node) else [node.name]
    return missing


def test_public_modules_and_names_are_documented() -> None:
    found = {str(path.relative_to(ROOT)): undocumented(path.read_text()) for path in modules()}
    assert not {path: names for path, names in found.items() if names}


def test_a_missing_docstring_is_noticed() -> None:
    source = "def shown(): ...\ndef _hidden(): ...\nclass Shown: ..."
    assert undocumented(source) == ["the module", "shown", "Shown"]
    assert undocumented('"""Module."""\ndef shown():\n    """Why."""') == []


def test_files_stay_short_enough_to_hold_in_mind() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in modules()}
    assert not {path: lines for path, lines in lengths.items() if lines > 400}


# Written in halves, so that this file does not find itself.
PRIVATE_PATH = re.compile("/" + r"(work/|home/\w|root/|Users/\w)|C:\\" + "Users")


def test_no_path_of_a_single_machine() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in tracked_texts()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if PRIVATE_PATH.search(line)
    ]
    assert not found, "\n".join(found)


def test_a_private_path_is_noticed() -> None:
    assert PRIVATE_PATH.search("see " + "/" + "home/someone/profile.yaml")
    assert not PRIVATE_PATH.search("results/tuned/nvidia-h200.yaml")


def test_no_unfinished_work_markers() -> None:
    words = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" + "XX", "HA" + "CK")) + r")\b")
    found = [str(path.relative_to(ROOT)) for path in modules() if words.search(path.read_text())]
    assert not found


def project() -> dict:
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_name(requirement: str) -> str:
    return canonical(re.split(r"[\s<>=!~;\[]", requirement, maxsplit=1)[0])


def test_constraints_cover_every_dependency() -> None:
    """Except what pyproject pins itself, and cupy, whose build the user's CUDA chooses."""
    table = project()
    extras = table["optional-dependencies"]
    wanted = {
        requirement_name(requirement)
        for requirement in [*table["dependencies"], *(line for lines in extras.values() for line in lines)]
        if "==" not in requirement.split(";")[0]
    }
    optional = {requirement_name(line) for extra in ("cuda12", "cuda13") for line in extras[extra]}
    pins = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pinned = {requirement_name(line) for line in pins if "==" in line}
    assert wanted - pinned - optional - {canonical(table["name"])} == set()


SCRIPTS = ("chipmunk-tune", "chipmunk-export", "chipmunk-run")
HELP = """
import importlib, sys
module, function = {entry!r}.split(":")
sys.argv = [{name!r}, "--help"]
try:
    code = getattr(importlib.import_module(module), function)()
except SystemExit as stop:
    code = stop.code
assert "torch" not in sys.modules, "--help imported torch"
sys.exit(code)
"""


def test_every_console_script_is_checked_here() -> None:
    assert sorted(project()["scripts"]) == sorted(SCRIPTS)


@pytest.mark.alone
@pytest.mark.parametrize("name", SCRIPTS)
def test_console_script_helps_within_half_a_second(name: str) -> None:
    entry = project()["scripts"][name]
    module, function = entry.split(":")
    assert callable(getattr(importlib.import_module(module), function))
    seconds = []
    command = [sys.executable, "-c", HELP.format(entry=entry, name=name)]
    for _ in range(6):  # the machine may be busy with something else: the quickest answer is its own
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
        assert "usage" in done.stdout.lower()
        if seconds[-1] < 0.5:
            return
    pytest.fail(f"{name} --help took {min(seconds):.2f} s at best, expected below 0.5 s")
