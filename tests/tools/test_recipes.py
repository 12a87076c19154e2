"""The table of recipes: the page shows the stored figures, and names are checked before anything is
compiled.
"""

import json

import pytest

from jaxdistill.core.types import Refused
from tools import recipes


def test_the_page_is_that_of_the_figures():
    file = recipes.ROOT / "docs/results/recipes.json"
    kept = json.loads(file.read_text())
    assert set(kept) <= set(recipes.RECIPES)
    assert (
        file.with_suffix(".md").read_text()
        == recipes.PAGE.format(effort=recipes.EFFORT) + recipes.page(kept) + "\n"
    )


def test_slices_are_of_recipes():
    assert {*recipes.SLICES, *recipes.TENSOR} <= set(recipes.RECIPES)


def test_unknown_names_are_refused():
    with pytest.raises(Refused, match="--only='dmd3'"):
        recipes.recipes(["--only=dmd3"])
