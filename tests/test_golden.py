"""Recipes make what their golden files say: config, weights, initialisers, decay, bytes."""

import difflib

import jax
import pytest
from flax import nnx

from jaxdistill.core.net import make_net
from tools import golden, recipes
from tools.stand_ins import write


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data"))


@pytest.mark.full
@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipe_is_what_its_golden_file_says(name, stand_ins):
    file = golden.file_of(name)
    expected = file.read_text() if file.exists() else ""
    found = golden.text_of(name, stand_ins)
    if found != expected:
        pair = [expected.splitlines(), found.splitlines()]
        changes = list(
            difflib.unified_diff(*pair, "golden", "now", lineterm="", n=0)
        )
        pytest.fail(
            "\n".join(
                [
                    f"{file.name} has other lines; where the change is meant: "
                    f"python tools/golden.py --only={name}",
                    *changes[:40],
                ]
            ),
            pytrace=False,
        )


def test_every_golden_file_is_of_a_recipe():
    expected = {golden.file_of(name) for name in recipes.RECIPES}
    assert set(golden.FOLDER.iterdir()) == expected


class Model(nnx.Module):
    """A weight of every kind of initialiser, the first one in stacked layers."""

    def __init__(self, rngs):
        make = nnx.initializers
        keys = jax.random.split(rngs(), 3)
        self.stacked = nnx.Param(
            jax.vmap(lambda key: make.lecun_normal()(key, (9, 4)))(keys)
        )
        self.normal = nnx.Param(make.normal(0.02)(rngs(), (5,)))
        self.truncated = nnx.Param(make.truncated_normal(0.02)(rngs(), (5,)))
        self.uniform = nnx.Param(make.xavier_uniform()(rngs(), (2, 4)))
        self.shifted = nnx.Param(1 - make.normal(0.5)(rngs(), (5,)) / 2)
        self.zeros = nnx.Param(make.zeros_init()(rngs(), (5,)))
        self.ones = nnx.Param(make.ones_init()(rngs(), (5,)))
        self.constant = nnx.Param(make.constant(0.25)(rngs(), (5,)))
        self.other = nnx.Param(jax.numpy.cumsum(make.normal(1.0)(rngs(), (5,))))


def test_initialisers_are_read_off_the_traced_program():
    assert (
        golden.initialisers(make_net(Model))
        == {
            "stacked": "truncated_normal(-2, 2) * 0.3789",  # 1 / 3 / .8796, which truncation takes
            "normal": "normal * 0.02",
            "truncated": "truncated_normal(-2, 2) * 0.02",
            "uniform": "uniform(-1, 1) * 1",  # sqrt(6 / (2 + 4))
            "shifted": "normal * -0.25 + 1",
            "zeros": "zeros",
            "ones": "ones",
            "constant": "constant 0.25",
            "other": "computed",
        }
    )
