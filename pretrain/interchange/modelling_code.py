"""The model's own source as the flat files that transformers loads with ``trust_remote_code=True``.

Nothing is written twice: the files of ``model/`` that the model needs are copied, with their imports made relative,

    model/attention/cache.py               ice_attention_cache.py
    from model.attention.slot import X     from .ice_attention_slot import X
    from model import remat                from . import ice_remat as remat

because transformers copies one folder without subfolders, and of it only the files that lines of the form ``from .name
import`` lead to (``transformers.dynamic_module_utils.get_relative_imports`` finds them by a regular expression). Which
files are needed is found by following the imports from ``modeling_ice.py``.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

_ROOT = Path(__file__).resolve().parent.parent.parent
_MODEL = "model"
_HERE = "pretrain.interchange"
MODELING = "modeling_ice"
CONFIGURATION = "configuration_ice"


class _Import(NamedTuple):
    """A ``from ... import`` of ours: where it stands, and what it says."""

    first_line: int
    last_line: int
    column: int
    module: str
    names: tuple[tuple[str, str | None], ...]


@functools.cache
def modelling_code() -> Mapping[str, str]:
    """File names and contents, ``modeling_ice.py`` and ``configuration_ice.py`` among them.

    Raises ``ValueError`` for a source file whose imports cannot be rewritten.
    """
    first = f"{_HERE}.{MODELING}"
    sources: dict[str, str] = {}
    waiting = [first]
    while waiting:
        module = waiting.pop()
        if module in sources:
            continue
        sources[module] = _source_file(module).read_text(encoding="utf-8")
        for statement in _own_imports(module, sources[module]):
            waiting += _modules_named(statement)
    files = {f"{_flat_name(module)}.py": _flattened(module, source) for module, source in sorted(sources.items())}
    # What `from . import name` needs is not found by transformers, so every file is named once more, where it does not
    # run.
    listed = "".join(
        f"    from .{_flat_name(module)} import __doc__ as _\n" for module in sorted(sources) if module != first
    )
    files[f"{MODELING}.py"] += (
        f"\n\nif False:  # transformers copies the files that such lines name, without running them\n{listed}"
    )
    return files


def _source_file(module: str) -> Path:
    path = _ROOT.joinpath(*module.split("."))
    package = path / "__init__.py"
    return package if package.is_file() else path.with_suffix(".py")


def _flat_name(module: str) -> str:
    """The name of a module's file without ``.py``; ``model`` itself has none."""
    if module.startswith(f"{_HERE}."):
        return module.removeprefix(f"{_HERE}.")
    return "ice_" + module.removeprefix(f"{_MODEL}.").replace(".", "_")


def _is_ours(module: str) -> bool:
    return module.split(".")[0] in ("model", "pretrain", "launch", "data_pipeline")


def _own_imports(module: str, source: str) -> list[_Import]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(_is_ours(alias.name) for alias in node.names):
            raise ValueError(f"{module}, line {node.lineno}: write `from x import y`; this form cannot be exported")
        if not isinstance(node, ast.ImportFrom) or node.module is None or not _is_ours(node.module):
            continue
        if not (node.module == _MODEL or node.module.startswith((f"{_MODEL}.", f"{_HERE}."))):
            raise ValueError(f"{module}, line {node.lineno}: imports {node.module}, which an export does not have")
        names = tuple((alias.name, alias.asname) for alias in node.names)
        found.append(_Import(node.lineno, node.end_lineno or node.lineno, node.col_offset, node.module, names))
    return found


def _submodule(statement: _Import, name: str) -> str | None:
    """The module that ``from statement.module import name`` means, None where ``name`` is not one."""
    module = f"{statement.module}.{name}"
    return module if _source_file(module).is_file() else None


def _modules_named(statement: _Import) -> list[str]:
    submodules = [_submodule(statement, name) for name, _ in statement.names]
    found = [module for module in submodules if module is not None]
    return found if len(found) == len(submodules) else [*found, statement.module]


def _flattened(module: str, source: str) -> str:
    """``source`` with relative imports, under a line that says where it is from."""
    lines = source.splitlines(keepends=True)
    for statement in _own_imports(module, source):
        submodules = [_submodule(statement, name) for name, _ in statement.names]
        first = statement.first_line - 1
        if not any(submodules):
            # The names stay as they are, on however many lines.
            old, new = f"from {statement.module} import", f"from .{_flat_name(statement.module)} import"
            lines[first] = lines[first].replace(old, new, 1)
            if new not in lines[first] or statement.module == _MODEL:
                raise ValueError(f"{module}, line {statement.first_line}: `{old}` cannot be rewritten")
        elif all(submodules):
            names = ", ".join(
                f"{_flat_name(str(submodule))} as {alias or name}"
                for submodule, (name, alias) in zip(submodules, statement.names, strict=True)
            )
            lines[first] = f"{' ' * statement.column}from . import {names}\n"
            for line in range(statement.first_line, statement.last_line):
                lines[line] = ""
        else:
            raise ValueError(f"{module}, line {statement.first_line}: modules and other names in one import")
    origin = _source_file(module).relative_to(_ROOT).as_posix()
    return f"# Ice, Apache-2.0: {origin} with relative imports, written by pretrain/export.py.\n{''.join(lines)}"
