"""Suites: every variant builds and its step traces, on the networks of the runs that all share; one suite end to end."""

import dataclasses
import importlib
import json
from pathlib import Path

import jax
import pytest

from jaxdistill.core import build, loop, sharding
from jaxdistill.core.checkpoint import save_params
from jaxdistill.core.experiment import Experiment
from jaxdistill.core.types import Refused
from launch._command import load_config
from tools import suites

ROOT = Path(__file__).parents[2]
VARIANTS = [(name, v) for name, s in suites.SUITES.items() for v in importlib.import_module(suites.module(s.config)).VARIANTS]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What the shared runs of each suite leave, with random weights: a function of suite and run to the folder."""
    folder = tmp_path_factory.mktemp("shared")
    for name, suite in suites.SUITES.items():
        for run, config in suite.shared.items():
            made = load_config(str(ROOT / config))
            where = folder / name / f"{run}_0"
            net = Experiment(made, where).nets["student"]
            where.mkdir(parents=True)
            (where / "config.json").write_text(made.to_json())
            save_params(where / "stages" / "0", {"student": jax.jit(net.init)(jax.random.key(0))})
    return folder


@pytest.mark.parametrize("name, variant", VARIANTS)
def test_every_variant_traces(name, variant, shared):
    suite = suites.SUITES[name]
    config = load_config(f"{ROOT / suite.config}:{variant}")
    for change in suites.starts(suite, config, name, shared / name, 0):
        role, where = change.removeprefix("--config.roles.").split(".init=")
        assert Path(where).is_dir()
        config.roles[role].init = where
    assert not any(role.init.startswith("runs/") for role in config.roles.values())
    config.mesh = build.spec("core.sharding:MeshShape", **dataclasses.asdict(sharding.MeshShape(fsdp=1)))
    experiment = Experiment(config, Path("unused"))
    with sharding.use(experiment.mesh, experiment.settings.rules):
        programs, nets = loop.abstract_programs(experiment)
    assert programs.flops > 0 and "student" in nets


def test_same_conditions():
    """What the digits' page says of all: data, batch, evaluation, learning rate and updates of the student."""
    configs = {v: load_config(f"{ROOT / suites.SUITES['digits'].config}:{v}") for n, v in VARIANTS if n == "digits"}
    for v, config in configs.items():
        first = configs["dmd2"]
        assert config.data == first.data, v
        same = lambda config: {k: v for k, v in config.evaluation.items() if k != "student_steps"}
        assert same(config) == same(first), v
        assert config.roles.student.optimizer.lr == first.roles.student.optimizer.lr, v
        assert config.steps / suites.updates_every(config.method.to_dict()) == first.steps / first.method.critic_steps, v


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(Refused, match="--suite='digit'"):
        suites.run("digit", [], [0], tmp_path, [])
    with pytest.raises(Refused, match="--only='dmd3'"):
        suites.run("digits", ["dmd3"], [0], tmp_path, [])


@pytest.mark.slow
def test_a_suite_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(suites, "OUT", tmp_path / "results")
    page = suites.run("lm", ["sft", "forward_kl"], [0], tmp_path / "runs", ["--config.steps=20"])
    text = page.read_text()
    assert "| sft |" in text and "| forward_kl |" in text and "| teacher |" in text
    found = json.loads(page.with_suffix(".json").read_text())
    assert {r["method"] for r in found} == {"teacher", "start", "sft", "forward_kl"}
    assert all(r["peak_bytes"] > 1e8 for r in found) and page.with_suffix(".png").stat().st_size > 5000
    before = {p: p.stat().st_mtime for p in (tmp_path / "runs").rglob("report.json")}
    suites.run("lm", ["sft", "forward_kl"], [0], tmp_path / "runs", ["--config.steps=20"])
    assert before == {p: p.stat().st_mtime for p in (tmp_path / "runs").rglob("report.json")}
