"""`advmoe recipes`."""

from __future__ import annotations

from typing import Annotated

import typer

from advmoe.cli import console
from advmoe.cli.options import Json
from advmoe.config import check, to_dict
from advmoe.recipes import Recipe
from advmoe.recipes import recipes as all_recipes


def recipes(
    search: Annotated[str | None, typer.Argument(help="Show only recipes with this in their name or figure.")] = None,
    json: Json = False,
) -> None:
    """List the paper's runs by name: what each row of its tables and figures trains."""
    found = [
        recipe
        for recipe in all_recipes().values()
        if search is None or search.lower() in f"{recipe.name} {recipe.shown_in}".lower()
    ]
    check(bool(found), f"no recipe matches '{search}'; 'advmoe recipes' lists them all")
    if json:
        console.emit_json({recipe.name: to_dict(recipe) for recipe in found})
        return
    rows = [
        (
            recipe.name,
            recipe.shown_in,
            recipe.dataset,
            settings(recipe),
            recipe.starts_from or "-",
        )
        for recipe in found
    ]
    console.show_table("Recipes", ("name", "shown in", "data set", "settings", "starts from"), rows)


def settings(recipe: Recipe) -> str:
    """What a recipe changes, in words; lengths in levels of 255."""
    levels = {name: f"{255 * value:g}/255" for name, value in recipe.attack.items() if name in {"eps", "step_size"}}
    return ", ".join(
        f"{name} {value}" for name, value in {**recipe.model, **recipe.train, **recipe.attack, **levels}.items()
    )
