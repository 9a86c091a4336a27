"""What all rows of a study start from, tried once before any of them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from grafting.data import load_dataset
from grafting.loading import load_model
from grafting.recipes import Recipe
from grafting.recipes.rows import Row, UnavailableError
from grafting.studies.row_run import Setting


def check_sources(setting: Setting, rows: Sequence[Row]) -> None:
    """Load the teacher and the data of the rows that are not done, if those have them in common.

    Otherwise every row would fail alone, one after another, with the same words. Raises GraftError.
    """
    recipes: list[Recipe] = []
    for row in rows:
        if not setting.result_file(row.name).is_file():
            with contextlib.suppress(UnavailableError):
                recipes.append(setting.recipe(row))
    teachers = {(recipe.model, recipe.num_heads) for recipe in recipes}
    if len(teachers) == 1:
        ((model, num_heads),) = teachers
        load_model(model, num_heads=num_heads, device="meta" if model.startswith("arch:") else "cpu")
    data = {recipe.data for recipe in recipes if recipe.synthesize is None}
    if len(data) == 1:
        load_dataset(data.pop())
