"""Runs a module's checks in a process of their own, and reports on each.

huggingface_hub reads its settings when it is imported, and a cache is only known to be empty in a
new process. A script is a module with functions `check_*(work)`, which run in order; what one
raises goes into the report, and the next one runs.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def names_in(script: str) -> list[str]:
    """The checks of a script beside this file, which is not imported to find them."""
    tree = ast.parse(_path_of(script).read_text())
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [name for name in functions if name.startswith("check_")]


def _path_of(script: str) -> Path:
    return Path(__file__).with_name(f"{script}.py")


def run_checks(checks: dict[str, Callable[[Path], None]], work: Path) -> dict[str, str | None]:
    """The traceback of each check, None if it passed."""
    report = {}
    for name, check in checks.items():
        try:
            check(work)
            report[name] = None
        except Exception:
            report[name] = traceback.format_exc()
    return report


def main(namespace: dict) -> None:
    """What a script does when it is run: `python script.py work report.json`."""
    work, report = map(Path, sys.argv[1:3])
    checks = {k: v for k, v in namespace.items() if k.startswith("check_")}
    report.write_text(json.dumps(run_checks(checks, work)))


def run_script(
    script: str, work: Path, environment: dict[str, str], *flags: str
) -> dict[str, str | None]:
    """The report of a script that is run in a new process, in an empty folder.

    `flags` are Python's; `environment` is added to a bare one.
    """
    folder = work / f"in-{script}"
    folder.mkdir()
    report = folder / "report.json"
    tests = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    bare = {k: os.environ[k] for k in ("PATH", "HOME", "TMPDIR") if k in os.environ}
    subprocess.run(
        [sys.executable, *flags, str(_path_of(script)), str(work), str(report)],
        cwd=folder,
        env=bare | {"OMP_NUM_THREADS": "1", "PYTHONPATH": tests} | environment,
        check=True,
        timeout=300,
    )
    return json.loads(report.read_text())
