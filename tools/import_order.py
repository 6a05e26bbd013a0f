"""Check that imports follow the order that CONTRIBUTING.md states, and that no files import each other in a circle.

    python tools/import_order.py

All imports count, also imports inside functions and under TYPE_CHECKING, because a reader has to
follow them too.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = {"advmoe": ROOT / "advmoe", "advmoe_export": ROOT / "export" / "advmoe_export"}


def stated_order(text: str) -> list[str]:
    """The packages and files directly under `advmoe`, in the order of CONTRIBUTING.md."""
    (line,) = re.findall(r"^`errors` → .*?(?=^$)", text, flags=re.M | re.S)
    return re.findall(r"`(\w+)`", line)


def imports_of(package: str, folder: Path) -> dict[str, set[str]]:
    """Module -> the modules of this project that it imports."""
    files = {module_name(package, path.relative_to(folder)): path for path in folder.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for module, path in files.items():
        names = [name for node in ast.walk(ast.parse(path.read_text())) for name in imported(node)]
        found[module] = {target for name in names if (target := resolved(name, files)) not in {None, module}}
    return found


def module_name(package: str, path: Path) -> str:
    """Dotted name of a file in a package."""
    parts = path.with_suffix("").parts
    return ".".join([package, *(part for part in parts if part != "__init__")])


def imported(node: ast.AST) -> Iterator[str]:
    """Full names that an import statement imports. `resolved` removes the parts that are not modules."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def resolved(name: str, modules: Iterable[str]) -> str | None:
    """The module of this project that contains a name, or None."""
    parts = name.split(".")
    if parts[0] not in PACKAGES:
        return None
    known = {*modules, "advmoe.rust_router", "advmoe", "advmoe_export"}
    return next((part for n in range(len(parts), 0, -1) if (part := ".".join(parts[:n])) in known), None)


def room(module: str) -> str:
    """The package or file directly under `advmoe` that a module belongs to; `advmoe` itself is one."""
    return module.split(".")[1] if "." in module else module


def wrong_imports(imports: Mapping[str, Iterable[str]], order: list[str]) -> list[str]:
    """Imports that violate the order, and packages or files that are missing in the order."""
    place = {name: step for step, name in enumerate(order)}
    unknown = sorted({room(module) for module in imports} - set(place))
    problems = [f"CONTRIBUTING.md does not say where '{name}' stands in the order of imports" for name in unknown]
    for module, targets in sorted(imports.items()):
        for target in sorted(targets):
            own, other = room(module), room(target)
            if own != other and {own, other} <= set(place) and place[other] >= place[own]:
                problems.append(f"{module} imports {target}, but '{other}' comes after '{own}'")
    return problems


def circle(imports: Mapping[str, Iterable[str]]) -> list[str]:
    """One line about modules that import each other in a circle, or none. `__init__` files count too."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return [f"imports go in a circle: {' <- '.join(error.args[1])}"]
    return []


def problems() -> list[str]:
    """All violations in both packages, one line each."""
    order = stated_order((ROOT / "CONTRIBUTING.md").read_text())
    ours, exporter = (imports_of(package, folder) for package, folder in PACKAGES.items())
    foreign = [
        f"{module} imports advmoe; the exporter must work without it"
        for module, targets in exporter.items()
        if any(target.split(".")[0] == "advmoe" for target in targets)
    ]
    ours = {
        module: {target for target in targets if target.split(".")[0] == "advmoe"} for module, targets in ours.items()
    }
    return [*wrong_imports(ours, order), *circle(ours), *circle(exporter), *foreign]


if __name__ == "__main__":
    found = problems()
    print("\n".join(found) or "imports are in order")
    sys.exit(bool(found))
