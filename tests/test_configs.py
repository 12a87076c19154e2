"""Every config builds. Every recipe's train step lowers for TPU on a 2x2x2 mesh, at its true size
and without a weight in memory.
"""

import dataclasses
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
    ".".join(p.relative_to(CONFIGS).with_suffix("").parts)
    for p in CONFIGS.rglob("[!_]*.py")
)
RECIPES = [f"recipes.{name}" for name in recipes.RECIPES]
# of a second each; tests/test_golden.py builds every recipe in the first tier
QUICK = (
    "recipes.flow_matching",
    "recipes.kd",
    "recipes.meanflow",
    "recipes.prune_then_distil",
)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Data of the right kind, small: a path for each data set that reads files."""
    return write(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", NAMES)
def test_states_what_it_is(name):
    module = importlib.import_module(f"configs.{name}")
    assert (
        "python -m launch.train --config=configs/" + name.replace(".", "/")
        in module.__doc__
    )
    config = module.get_config()
    assert config.is_locked
    if name.startswith("toy."):
        assert {"metric", "model", "baseline", "better", "ratio"} <= set(
            config.claim
        )
    build.build(config.method)
    if config.evaluation:
        build.build(config.evaluation)


@pytest.mark.parametrize("name", NAMES)
def test_its_command_names_what_it_has(name):
    """Every --config.a.b= of the docstring's command is a key of the config, or of the variant that
    the command names.
    """
    module = importlib.import_module(f"configs.{name}")
    command = module.__doc__.partition("python -m launch.train")[2].partition(
        "\n\n"
    )[0]
    variant = re.search(r"\.py:([a-z0-9_]+)", command)
    config = module.get_config(variant[1]) if variant else module.get_config()
    for path in re.findall(r"--config\.([\w.]+)=", command):
        node = config
        for key in path.split("."):
            node = node[key]  # KeyError where there is none


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_variant_is_refused(name):
    made = importlib.import_module(f"configs.{name}").get_config
    if inspect.signature(
        made
    ).parameters:  # of the others the command says that they have none
        with pytest.raises(Refused, match="no such"):
            made("no such")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.full)
        for name in RECIPES
    ],
)
def test_recipe_lowers_for_tpu(name, stand_ins, lowers_for_tpu):
    config = load(name, stand_ins)
    config.mesh = build.plain(MeshShape(data=2, fsdp=2, tensor=2))
    plan.shorten(config)
    experiment = Experiment(config, Path("unused"))
    with sharding.use(experiment.mesh, experiment.settings.rules):
        programs, nets = loop.abstract_programs(experiment)
        lowers_for_tpu(programs)
    assert nets["student"].size > 1e7
    large = [w for w in jax.tree.leaves(programs.abstract.params) if w.size > 1e6]
    replicated = [w.shape for w in large if w.sharding.is_fully_replicated]
    assert not replicated


@pytest.mark.full
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_data_is_read_in_the_shapes_that_it_states(name, stand_ins):
    data = Experiment(load(name, stand_ins), Path("unused")).data
    fewest = len(getattr(data, "parts", ())) or 2  # samples: one of every domain
    data = dataclasses.replace(data, batch_size=fewest)
    shapes = lambda batch: jax.tree.map(lambda v: (v.shape, v.dtype), batch)
    assert shapes(next(data.loader())) == shapes(data.spec())


@pytest.mark.full
def test_bytes_on_a_device_shrink_with_the_mesh(stand_ins):
    """Weights, moments and averages of a large model are sharded over fsdp and tensor."""
    experiment = Experiment(
        load("recipes.flow_matching", stand_ins), Path("unused")
    )
    mesh = sharding.make_mesh(MeshShape(data=1, fsdp=4, tensor=2))
    with sharding.use(mesh, experiment.settings.rules):
        experiment.__dict__["mesh"] = mesh
        state = loop.abstract_programs(experiment)[0].abstract
    for part in (state.params, state.opt, state.ema):
        on_one = 0
        complete = 0
        for weight in jax.tree.leaves(part):
            shard = weight.sharding.shard_shape(weight.shape)
            on_one += np.prod(shard) * weight.dtype.itemsize
            complete += weight.size * weight.dtype.itemsize
        assert on_one <= complete / 8 * 1.02  # biases and norms are replicated
