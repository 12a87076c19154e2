"""Every config builds; every recipe's train step, at its true size, lowers for TPU on a 2x2x2 mesh
without a weight in memory.
"""

import dataclasses
import functools
import importlib
import inspect
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxdistill.core import build, sharding
from jaxdistill.core.sharding import MeshShape
from jaxdistill.core.types import Refused
from jaxdistill.run import loop, plan
from jaxdistill.run.experiment import Experiment
from tools import recipes
from tools.stand_ins import load, write

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = sorted(
    ".".join(p.relative_to(CONFIGS).with_suffix("").parts) for p in CONFIGS.rglob("[!_]*.py")
)
RECIPES = [f"recipes.{name}" for name in recipes.RECIPES]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Data of the right kind, small: a path for each data set that reads files."""
    return write(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", NAMES)
def test_states_what_it_is(name):
    module = importlib.import_module(f"configs.{name}")
    assert "python -m launch.train --config=configs/" + name.replace(".", "/") in module.__doc__
    config = module.get_config()
    assert config.is_locked
    if name.startswith("toy."):
        assert {"metric", "model", "baseline", "better", "ratio"} <= set(config.claim)
    build.build(config.method)
    if config.evaluation:
        build.build(config.evaluation)


@pytest.mark.parametrize("name", NAMES)
def test_its_command_names_what_it_has(name):
    """Every --config.a.b= of the command in the docstring is a value of the config, or of that of
    the variant that it names.
    """
    module = importlib.import_module(f"configs.{name}")
    command = module.__doc__.partition("python -m launch.train")[2].partition("\n\n")[0]
    variant = re.search(r"\.py:([a-z0-9_]+)", command)
    config = module.get_config(variant[1]) if variant else module.get_config()
    for path in re.findall(r"--config\.([\w.]+)=", command):
        functools.reduce(
            lambda node, key: node[key], path.split("."), config
        )  # KeyError where there is none


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_variant_is_refused(name):
    made = importlib.import_module(f"configs.{name}").get_config
    if inspect.signature(made).parameters:  # of the others the command says that they have none
        with pytest.raises(Refused, match="no such"):
            made("no such")


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_lowers_for_tpu(name, stand_ins, lowers_for_tpu):
    config = load(name, stand_ins)
    config.mesh = build.plain(MeshShape(data=2, fsdp=2, tensor=2))
    plan.shorten(config)
    experiment = Experiment(config, Path("unused"))
    with sharding.use(experiment.mesh, experiment.settings.rules):
        programs, nets = loop.abstract_programs(experiment)
        lowers_for_tpu(programs)
    assert nets["student"].size > 1e7
    held = jax.tree.leaves(programs.abstract.params)
    whole = [w for w in held if w.size > 1e6 and w.sharding.is_fully_replicated]
    assert not whole, [w.shape for w in whole]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_data_is_read_in_the_shapes_that_it_states(name, stand_ins):
    data = Experiment(load(name, stand_ins), Path("unused")).data
    fewest = len(getattr(data, "parts", ())) or 2  # rows of every domain
    data = dataclasses.replace(data, batch_size=fewest)
    shapes = lambda batch: jax.tree.map(lambda v: (v.shape, v.dtype), batch)
    assert shapes(next(data.loader())) == shapes(data.spec())


def test_bytes_on_a_device_shrink_with_the_mesh(stand_ins):
    """Weights, moments and averages of a large model are split over fsdp and tensor, none stays
    whole.
    """
    experiment = Experiment(load("recipes.flow_matching", stand_ins), Path("unused"))
    with sharding.use(
        sharding.make_mesh(sharding.MeshShape(data=1, fsdp=4, tensor=2)), experiment.settings.rules
    ):
        experiment.__dict__["mesh"] = sharding.make_mesh(
            sharding.MeshShape(data=1, fsdp=4, tensor=2)
        )
        state = loop.abstract_programs(experiment)[0].abstract
    on_one = lambda tree: sum(
        np.prod(w.sharding.shard_shape(w.shape)) * w.dtype.itemsize for w in jax.tree.leaves(tree)
    )
    whole = lambda tree: sum(w.size * w.dtype.itemsize for w in jax.tree.leaves(tree))
    for part in (state.params, state.opt, state.ema):
        assert on_one(part) <= whole(part) / 8 * 1.02  # biases and norms stay whole
