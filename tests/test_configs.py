"""Every config builds; every recipe's train step, at its true size, lowers for TPU on a 2x2x2 mesh without a weight in memory."""

import importlib
import io
import json
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jaxdistill.core import build, loop, sharding
from jaxdistill.core.experiment import Experiment
from jaxdistill.data import arrayrecord

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = sorted(".".join(p.relative_to(CONFIGS).with_suffix("").parts) for p in CONFIGS.rglob("[!_]*.py"))
RECIPES = [n for n in NAMES if n.startswith("recipes.")]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Data of the right kind, small: a path for each data set that reads files."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    latent = lambda: {"x": rng.standard_normal((32, 32, 4)).astype("f4"), "cond": np.int32(3), "null_cond": np.int32(1000)}
    arrayrecord.write(folder / "latents" / "train.arrayrecord", [latent() for _ in range(4)])
    text = lambda: {"text": np.zeros((77, 2048), "f2"), "pooled": np.zeros(1280, "f2"), "size": np.zeros(6, "f4")}
    captions = {f"{group}/{k}": v for group in ("cond", "null_cond") for k, v in text().items()}
    image = {"x": np.zeros((128, 128, 4), "f4"), "image": np.zeros((1024, 1024, 3), "u1"), **captions}
    arrayrecord.write(folder / "captioned" / "train.arrayrecord", [image] * 2)
    (folder / "train.jsonl").write_text("".join(json.dumps({"prompt": "ab" * i, "response": "cd" * i}) + "\n" for i in range(1, 300)))
    (folder / "text.txt").write_text("To be, or not to be. " * 500)
    for domain in ("books", "code"):
        (folder / "domains" / domain).mkdir(parents=True)
        (folder / "domains" / domain / "train.jsonl").write_text((folder / "train.jsonl").read_text())
        (folder / "domains" / domain / "test.jsonl").write_text((folder / "train.jsonl").read_text())
    told = {"input": "1 + 1", "label": "2", "rationale": "one and one"}
    (folder / "told.jsonl").write_text("".join(json.dumps(told) + "\n" for _ in range(40)))
    named = {"text": "Ada saw Rome", "entities": [["Ada", "person"], ["Rome", "place"]]}
    (folder / "named.jsonl").write_text("".join(json.dumps(named) + "\n" for _ in range(40)))
    png = io.BytesIO()
    Image.new("RGB", (32, 32)).save(png, format="PNG")
    pictures = [{"bytes": png.getvalue(), "path": None}] * 40
    (folder / "pictures").mkdir()
    pq.write_table(pa.table({"img": pictures, "label": [i % 10 for i in range(40)]}), folder / "pictures" / "train-0.parquet")
    return {"data.arrayrecord:ArrayRecords": folder / "latents", "data.arrayrecord:GroupedRecords": folder / "captioned",
            "data.domains:Folders": folder / "domains",
            "data.rationales:Rationales": folder / "told.jsonl", "data.ner:Conversations": folder / "named.jsonl",
            "data.images:ParquetImages": folder / "pictures", "data.text:PackedJson": folder / "train.jsonl",
            "data.two_tokenizers:AlignedJson": folder / "train.jsonl",
            "data.text:PaddedJson": folder / "train.jsonl", "data.text:Text": folder / "text.txt"}  # fmt: skip


def load(name, stand_ins):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    if hasattr(module, "RECORD"):  # what a sample holds, where it is too large to be written here
        with config.unlocked():
            config.data = build.spec("data.synthetic:Synthetic", batch_size=config.data.batch_size, arrays=module.RECORD)
    elif config.data.name in stand_ins:
        config.data.path = str(stand_ins[config.data.name])
    return config


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


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_lowers_for_tpu(name, stand_ins, lowers_for_tpu):
    config = load(name, stand_ins)
    config.mesh = build.spec("core.sharding:MeshShape", data=2, fsdp=2, tensor=2)
    for method in (config.method, config.method.get("host", {})):
        if "critic_only" in method:
            method.critic_only = 0
    config.steps = 2 * max(1, config.method.get("critic_steps", 1)) + config.method.get("measures", 0)  # every pattern of turns shows
    experiment = Experiment(config, Path("unused"))
    with sharding.use(experiment.mesh, experiment.settings.rules):
        programs, nets = loop.abstract_programs(experiment)
        lowers_for_tpu(programs)
    assert nets["student"].size > 1e7
    held = jax.tree.leaves(programs.abstract.params)
    whole = [w for w in held if w.size > 1e6 and w.sharding.is_fully_replicated]
    assert not whole, [w.shape for w in whole]


def test_bytes_on_a_device_shrink_with_the_mesh(stand_ins):
    """Weights, moments and averages of a large model are split over fsdp and tensor, none stays whole."""
    experiment = Experiment(load("recipes.flow_matching", stand_ins), Path("unused"))
    with sharding.use(sharding.make_mesh(sharding.MeshShape(data=1, fsdp=4, tensor=2)), experiment.settings.rules):
        experiment.__dict__["mesh"] = sharding.make_mesh(sharding.MeshShape(data=1, fsdp=4, tensor=2))
        state = loop.abstract_programs(experiment)[0].abstract
    on_one = lambda tree: sum(np.prod(w.sharding.shard_shape(w.shape)) * w.dtype.itemsize for w in jax.tree.leaves(tree))
    whole = lambda tree: sum(w.size * w.dtype.itemsize for w in jax.tree.leaves(tree))
    for part in (state.params, state.opt, state.ema):
        assert on_one(part) <= whole(part) / 8 * 1.02  # biases and norms stay whole
