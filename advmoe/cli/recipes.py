"""`advmoe recipes`."""

from __future__ import annotations

from typing import Annotated

import typer

from advmoe.cli import console
from advmoe.cli.options import Json
from advmoe.config import check, to_dict
from advmoe.recipes import Recipe, shown_in
from advmoe.recipes import recipes as all_recipes
from advmoe.schema import closest


def recipes(
    search: Annotated[
        str | None,
        typer.Argument(help="Show only runs of this table or figure (table1, fig2), or with this in the name."),
    ] = None,
    json: Json = False,
) -> None:
    """List the paper's runs by name: what each row of its tables and figures trains, one run a line."""
    known = all_recipes().values()
    found = [
        recipe for recipe in known if search is None or search in shown_in(recipe) or search.lower() in recipe.name
    ]
    names = [name for recipe in known for name in (recipe.name, *shown_in(recipe))]
    check(bool(found), f"no recipe matches '{search}'; 'advmoe recipes' lists them all{closest(str(search), names)}")
    if json:
        console.emit_json({recipe.name: to_dict(recipe) for recipe in found})
        return
    width = max(len(recipe.name) for recipe in found)
    for group, members in grouped(found).items():
        console.out.print(group, style="bold", highlight=False)
        for recipe in members:
            start = "" if recipe.starts_from is None else f" (after {recipe.starts_from})"
            console.out.print(f"  {recipe.name:<{width}}  {recipe.summary}{start}", highlight=False, markup=False)


def grouped(found: list[Recipe]) -> dict[str, list[Recipe]]:
    """The recipes under headings: the table or figure, the data set and the backbone."""
    groups: dict[str, list[Recipe]] = {}
    for recipe in found:
        place = recipe.shown_in.split(", ")[0]
        groups.setdefault(f"{place}: {recipe.dataset}, {recipe.model['arch']}", []).append(recipe)
    return groups
