"""The stub of the compiled module agrees with the module."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

from advmoe import rust_router

STUB = Path(rust_router.__file__).with_name("rust_router.pyi")


def parameters(function: ast.FunctionDef, *, bound: bool) -> list[str]:
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args)][bound:]
    return names + [a.arg for a in arguments.kwonlyargs]


def compiled_parameters(obj: object) -> list[str]:
    signature = inspect.signature(obj)  # type: ignore[arg-type]
    return [name for name in signature.parameters if name not in ("self", "cls")]


def test_the_stub_lists_what_the_compiled_module_exports() -> None:
    stub = {
        node.name: node
        for node in ast.parse(STUB.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    exported = {name for name in vars(rust_router) if not name.startswith("__")}
    assert set(stub) == exported
    for name, node in stub.items():
        compiled = getattr(rust_router, name)
        if isinstance(node, ast.FunctionDef):
            assert parameters(node, bound=False) == compiled_parameters(compiled), name
            continue
        stubbed = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
        members = {m for m in vars(compiled) if not m.startswith("__") or m in ("__new__", "__len__")}
        assert set(stubbed) == members, name
        for member, function in stubbed.items():
            if any(isinstance(d, ast.Name) and d.id == "property" for d in function.decorator_list):
                assert inspect.isgetsetdescriptor(getattr(compiled, member)), f"{name}.{member}"
                continue
            target = compiled if member == "__new__" else getattr(compiled, member)
            if member != "__len__":
                static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in function.decorator_list)
                assert parameters(function, bound=not static) == compiled_parameters(target), f"{name}.{member}"
