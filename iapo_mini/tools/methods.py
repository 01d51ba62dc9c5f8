"""A text about every method: one line, its source and its settings."""

from __future__ import annotations

import textwrap

from iapo_mini.recipes import FROM_RECIPE, RECIPES, Recipe


def recipe_line(recipe: Recipe) -> str:
    """The settings of a recipe in one line."""
    told = [f"{name} {getattr(recipe, name):g}" for name in FROM_RECIPE if name != "aggregation"]
    return ", ".join([f"{recipe.aggregation} mean of the loss", *told])


def methods_text() -> str:
    """A paragraph about each method of ``recipes.RECIPES``."""
    out = []
    for name, recipe in RECIPES.items():
        lines = [": ".join(filter(None, (recipe.label or name, recipe.what))) + "."]
        if recipe.source:
            lines.append(f"Source: {recipe.source}.")
        if isinstance(recipe.information, str):
            lines.append(f"Informativeness is from {recipe.information.replace('_', ' ')}.")
        lines.append(f"Settings: {recipe_line(recipe)}.")
        if recipe.absent:
            lines.append(f"Not implemented: {recipe.absent}.")
        body = textwrap.fill(" ".join(lines), 100, initial_indent="    ", subsequent_indent="    ")
        out.append(f"{name}\n{body}")
    return "\n\n".join(out)
