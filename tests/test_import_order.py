"""Imports follow the order in CONTRIBUTING.md, and the check finds violations."""

from pathlib import Path

import pytest
from import_order import circle, imports_of, problems, stated_order, wrong_imports


def test_imports_are_in_the_order_that_is_stated() -> None:
    assert problems() == []


def test_no_two_rooms_stand_on_one_step() -> None:
    text = "Before.\n\n`errors` → `config` →\n`models` → `cli`\n\nAfter `that`.\n"
    assert stated_order(text) == ["errors", "config", "models", "cli"]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    for name, text in {
        "__init__.py": "",
        "config.py": "def late():\n    from advmoe.models.net import Net\n",
        "models/__init__.py": "",
        "models/net.py": "from advmoe.models import layer\nfrom advmoe import config\n",
        "models/layer.py": "import typing\nif typing.TYPE_CHECKING:\n    import advmoe.models.net\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_an_import_against_the_order_is_named_wherever_it_stands(package: Path) -> None:
    imports = imports_of("advmoe", package)
    assert imports["advmoe.models.net"] == {"advmoe.models.layer", "advmoe.config"}
    assert wrong_imports(imports, ["config", "models", "advmoe"]) == [
        "advmoe.config imports advmoe.models.net, but 'models' comes after 'config'"
    ]
    assert "does not say where 'models' stands" in wrong_imports(imports, ["config", "advmoe"])[0]


def test_a_circle_of_files_is_named(package: Path) -> None:
    imports = imports_of("advmoe", package)
    del imports["advmoe.config"]
    (line,) = circle(imports)
    assert "advmoe.models.net <- advmoe.models.layer" in line or "advmoe.models.layer <- advmoe.models.net" in line
    assert circle({"a": {"b"}, "b": set()}) == []
