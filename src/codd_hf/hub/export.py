"""A model's code as flat files, for those who load it where codd-hf is not installed.

transformers loads code from a repository by `auto_map` in `config.json`, and copies a file together
with the files beside it that it imports relatively; folders it does not copy. So every module that
a class needs is written as one file next to `config.json`, `circuits/chain.py` as
`codd_circuits_chain.py`, and the relative imports are rewritten to match.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

OF_NAMES = re.compile(r"^(\s*)from (\.+)([\w.]+) import\b", re.MULTILINE)
OF_A_MODULE = re.compile(r"^( *)from (\.+) import (\w+)(?: as (\w+))?$", re.MULTILINE)
REGISTRATION = re.compile(r"\bAuto\w+\.register\(")
HEADER = "# Part of codd-hf (Apache-2.0), made flat by `codd_hf.hub.export_code`: do not edit.\n"
AUTO_CLASSES = {
    "CoDDModel": ("AutoModel", "AutoModelForCausalLM"),
    "CoDDHead": ("AutoModel",),
}


def export_code(folder: str | Path, model_class: type) -> list[str]:
    """Writes the code of a saved model or head beside its weights.

    `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` (`AutoModel` for a head)
    then works without codd-hf; torch, transformers and diffusers are still needed. The files are
    the same for the same version of codd-hf.

    Args:
        folder: where `save_pretrained` has written; its `config.json` gets an `auto_map`.
        model_class: the class that was saved, [`CoDDModel`] or [`CoDDHead`].

    Returns:
        The names of the files written.

    Raises:
        FileNotFoundError: there is no `config.json` in the folder.
    """
    folder = Path(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config_class = model_class.config_class
    root = Path(sys.modules[config_class.__module__].__file__).parent
    modules = {cls: _path_of(cls, root) for cls in (config_class, model_class)}
    written = {}
    todo = list(modules.values())
    while todo:
        module = todo.pop()
        if _flat_name(module) not in written:
            written[_flat_name(module)], imported = _flatten(root, module)
            todo += imported
    for name, source in written.items():
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
    references = {cls: f"{_flat_name(module)}.{cls.__name__}" for cls, module in modules.items()}
    config["auto_map"] = {"AutoConfig": references[config_class]}
    config["auto_map"] |= dict.fromkeys(AUTO_CLASSES[model_class.__name__], references[model_class])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return sorted(f"{name}.py" for name in written)


def _path_of(cls: type, root: Path) -> Path:
    """The file of a class, relative to the package's folder."""
    return Path(sys.modules[cls.__module__].__file__).relative_to(root)


def _flat_name(module: Path) -> str:
    """`circuits/chain.py` to `codd_circuits_chain`; `modeling_codd.py` keeps its name."""
    parts = [part for part in module.with_suffix("").parts if part != "__init__"]
    name = "_".join(parts)
    return name if len(parts) == 1 and name.endswith("_codd") else f"codd_{name}"


def _without_registration(source: str) -> str:
    """Takes out the statements that make the Auto classes know a class.

    A class that came with a repository must not stand for CoDD in general: other repositories would
    be loaded by it, without being asked whether their code is trusted.
    """
    lines = source.splitlines(keepends=True)
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.Expr | ast.For) and REGISTRATION.search(
            ast.get_source_segment(source, node)
        ):
            del lines[node.lineno - 1 : node.end_lineno]
    return "".join(lines)


def _flatten(root: Path, module: Path) -> tuple[str, list[Path]]:
    """The source of a module with its relative imports made flat, and the modules imported."""
    imported = []

    def flat(dots: str, name: str) -> str:
        target = module.parents[len(dots) - 1].joinpath(*name.split("."))
        is_package = (root / target).is_dir()
        imported.append(target / "__init__.py" if is_package else target.with_suffix(".py"))
        return _flat_name(imported[-1])

    def import_names(match: re.Match) -> str:
        indent, dots, name = match.groups()
        return f"{indent}from .{flat(dots, name)} import"

    def import_module(match: re.Match) -> str:
        indent, dots, name, alias = match.groups()
        file = flat(dots, name)
        # transformers copies only what something is imported from by name.
        return (
            f"{indent}from .{file} import __name__ as _\n"
            f"{indent}from . import {file} as {alias or name}"
        )

    source = _without_registration((root / module).read_text(encoding="utf-8"))
    source = OF_A_MODULE.sub(import_module, OF_NAMES.sub(import_names, source))
    return HEADER + source, imported
