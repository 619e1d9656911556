"""Promises that an installation brings every package that the code imports."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import codd_hf

ROOT = Path(__file__).parent.parent
NAMES = {"sklearn": "scikit-learn", "huggingface_hub": "huggingface-hub", "yaml": "pyyaml"}
"""Packages that are installed under another name than they are imported by."""
BY_OTHERS = {"jinja2"}
"""Imported by transformers where a chat template is rendered, which does not require it."""


def imported_packages() -> dict[str, set[str]]:
    """The packages of others that the code imports, and the files in which it does."""
    found = {}
    root = Path(codd_hf.__file__).parent
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
            for name in names:
                package = name.partition(".")[0]
                if package and package not in (*sys.stdlib_module_names, "codd_hf"):
                    found.setdefault(package, set()).add(str(path.relative_to(root)))
    return found


def declared(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", requirement).group() for requirement in requirements}


def test_every_imported_package_is_declared_and_no_other():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {NAMES.get(name, name) for name in imported_packages()}
    plots = declared(project["optional-dependencies"]["plots"])
    assert (needed - plots) | BY_OTHERS == declared(project["dependencies"])


def test_every_dependency_has_a_lower_bound_and_no_upper_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"]:
        assert re.fullmatch(r"[\w-]+>=\d+(\.\d+)+", requirement), requirement
