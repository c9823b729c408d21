"""Our own modules as files beside a model, for libraries that run a folder's code: one source, of which a folder holds a copy with relative imports.

transformers and diffusers look for modules beside the one that they open, and diffusers copies only those that this one names. So the files lie flat, and
modules that a library opens name all that they need.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import openvision3
from openvision3.files import write_whole

PACKAGE = Path(openvision3.__file__).parent
_IMPORT = re.compile(r"^(\s*)from openvision3\.([\w.]+) import", re.MULTILINE)
_IMPORT_MODULES = re.compile(r"^(\s*)from openvision3 import ([\w, ]+)$", re.MULTILINE)


def write_modules(named: dict[str, str], folder: Path) -> list[str]:
    """Write modules and all of ours that they import -> the names of the files.

    `named` are the modules with a file name of their own, such as {"adapters.transformers_model": "modeling_openvision3"}.
    """
    modules = _closure([*named])
    files = {module: named.get(module) or f"openvision3_{module.replace('.', '_')}" for module in modules}
    for module, name in files.items():
        text = _IMPORT.sub(lambda line: f"{line[1]}from .{files[line[2]]} import", _source(module))
        text = _IMPORT_MODULES.sub(lambda line: f"{line[1]}from . import {', '.join(f'{files[name]} as {name}' for name in line[2].split(', '))}", text)
        head = f"# Part of openvision3 {openvision3.__version__}, Apache-2.0 (see LICENSE): openvision3/{module.replace('.', '/')}.py with relative imports.\n"
        if module in named:  # after the imports from __future__
            others = "".join(f"from .{other} import __name__ as _  # noqa: F401\n" for other in sorted({*files.values()} - {*named.values()}))
            text = text.replace("from __future__ import annotations\n", f"from __future__ import annotations\n\n{others}", 1)
        write_whole(folder / f"{name}.py", (head + text).encode())
    return sorted(f"{name}.py" for name in files.values())


def _closure(modules: list[str]) -> list[str]:
    """The modules and all of this package that they import, at their heads or within functions."""
    seen: list[str] = []
    while modules:
        module = modules.pop()
        if module in seen:
            continue
        seen.append(module)
        for node in ast.walk(ast.parse(_source(module))):
            if isinstance(node, ast.ImportFrom) and node.module == "openvision3":
                modules += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("openvision3."):
                modules.append((node.module or "").removeprefix("openvision3."))
    return seen


def _source(module: str) -> str:
    return (PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
