"""Suites: every variant builds and its step traces, on networks of the runs that its suite shares;
one suite end to end.
"""

import importlib
import json
import shutil
from pathlib import Path

import jax
import pytest

from jaxdistill.core import build, sharding
from jaxdistill.core.sharding import MeshShape
from jaxdistill.core.types import Refused
from jaxdistill.run import loop
from jaxdistill.run.checkpoint import save_params
from jaxdistill.run.experiment import Experiment
from launch._command import load_config
from tools import stand_ins, suites

ROOT = Path(__file__).parents[2]
VARIANTS = {
    name: list(importlib.import_module(suites.module(suite.config)).VARIANTS)
    for name, suite in suites.SUITES.items()
}
# the first of each suite in the first tier
CASES = [
    pytest.param(
        name, variant, marks=() if variant == variants[0] else pytest.mark.full
    )
    for name, variants in VARIANTS.items()
    for variant in variants
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return stand_ins.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory, files):
    """A folder of what the shared runs of each suite leave, with random weights."""
    folder = tmp_path_factory.mktemp("shared")
    for name, suite in suites.SUITES.items():
        for run, config in suite.shared.items():
            made = stand_ins.at_hand(load_config(str(ROOT / config)), files)
            where = folder / name / f"{run}_0"
            net = Experiment(made, where).nets["student"]
            where.mkdir(parents=True)
            (where / "config.json").write_text(made.to_json())
            save_params(
                where / "stages" / "0",
                {"student": jax.jit(net.init)(jax.random.key(0))},
            )
    return folder


@pytest.mark.full
@pytest.mark.parametrize("name, variant", CASES)
def test_every_variant_traces(name, variant, shared, files):
    suite = suites.SUITES[name]
    config = stand_ins.at_hand(
        load_config(f"{ROOT / suite.config}:{variant}"), files
    )
    for change in suites.starts(suite, config, name, shared / name, 0):
        role, where = change.removeprefix("--config.roles.").split(".init=")
        assert Path(where).is_dir()
        config.roles[role].init = where
    assert not any(role.init.startswith("runs/") for role in config.roles.values())
    config.mesh = build.plain(MeshShape(fsdp=1))
    experiment = Experiment(config, Path("unused"))
    with sharding.use(experiment.mesh, experiment.settings.rules):
        programs, nets = loop.abstract_programs(experiment)
    assert programs.flops > 0
    assert "student" in nets


def test_same_conditions():
    """As the digits' page says, every variant has the same data, evaluation, learning rate and
    number of updates of the student.
    """
    file = ROOT / suites.SUITES["digits"].config

    def stated(config):
        evaluation = config.evaluation.to_dict()
        evaluation.pop("student_steps", None)
        return {
            "data": config.data.to_dict(),
            "evaluation": evaluation,
            "lr": config.roles.student.optimizer.lr,
            "updates": config.steps / build.build(config.method).cycle,
        }

    expected = stated(load_config(f"{file}:dmd2"))
    for variant in VARIANTS["digits"]:
        found = stated(load_config(f"{file}:{variant}"))
        for key in expected:
            assert found[key] == expected[key], (variant, key)


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(Refused, match="--suite='digit'"):
        suites.run("digit", [], [0], tmp_path, [])
    with pytest.raises(Refused, match="--only='dmd3'"):
        suites.run("digits", ["dmd3"], [0], tmp_path, [])


def run_folder(folder, method, seed, *, steps, speed, perplexity):
    """Writes the files of a finished run of the suite that the page reads."""
    where = folder / f"{method}_{seed}"
    where.mkdir(parents=True)
    models = [{"name": "student", "nfe": 1, "perplexity": perplexity}]
    config = {
        "method": {"name": "methods.distribution.dmd2:DMD2", "critic_steps": 2}
    }
    report = {"steps": steps, "models": models, "config": config}
    (where / "report.json").write_text(json.dumps(report))
    speeds = [
        {"step": i, "perf/steps_per_second": s}
        for i, s in enumerate((speed / 10, speed, speed))
    ]
    (where / "metrics.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in speeds)
    )
    (where / "process.json").write_text('{"peak_bytes": 1048576}')


def test_seconds_of_the_clock(tmp_path, monkeypatch):
    """400 steps of the reference method at 10 a second take 40 s. A method with 20 steps a second
    makes 800 in that time, two for an update.
    """
    monkeypatch.setattr(suites, "OUT", tmp_path / "results")
    suite = suites.SUITES["lm"]
    run_folder(tmp_path, "gkd", 0, steps=400, speed=10, perplexity=2.0)
    run_folder(tmp_path, "sft", 0, steps=400, speed=20, perplexity=3.0)
    assert suites._steps_in_time(suite, "sft", 0, tmp_path) == 800
    assert suites._steps_in_time(suite, "sft", 1, tmp_path) == 0
    run_folder(tmp_path, "jsd", 0, steps=400, speed=float("nan"), perplexity=3.0)
    assert suites._steps_in_time(suite, "jsd", 0, tmp_path) == 0
    shutil.rmtree(tmp_path / "jsd_0")
    run_folder(tmp_path / "timed", "sft", 0, steps=800, speed=20, perplexity=2.5)
    text = suites.write("lm", tmp_path, {"sft": 0, "gkd": 1}).read_text()
    equal, timed = text.split("## Equal seconds, those of `gkd`")
    assert (
        "| sft | 3 |" in equal
        and "| sft | 2.5 |" in timed
        and "| gkd | 2 |" in timed
    )
    assert (
        f"| 200 | 0.1 | {suite.tokens / 0.1:,.0f} |" in equal and "| 400 |" in timed
    )
    again = suites.write(
        "lm", tmp_path / "elsewhere", {"sft": 0, "gkd": 1}
    ).read_text()
    assert again == text  # rows of earlier calls are kept


@pytest.mark.slow
def test_a_suite_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(suites, "OUT", tmp_path / "results")
    page = suites.run(
        "lm", ["sft", "forward_kl"], [0], tmp_path / "runs", ["--config.steps=20"]
    )
    text = page.read_text()
    assert "| sft |" in text and "| forward_kl |" in text and "| teacher |" in text
    assert "## Equal seconds" not in text  # nobody ran the clock's method
    found = json.loads(page.with_suffix(".json").read_text())
    assert {r["method"] for r in found} == {"teacher", "start", "sft", "forward_kl"}
    assert (
        all(r["peak_bytes"] > 1e8 for r in found)
        and page.with_suffix(".png").stat().st_size > 5000
    )
    before = {
        p: p.stat().st_mtime for p in (tmp_path / "runs").rglob("report.json")
    }
    suites.run(
        "lm", ["sft", "forward_kl"], [0], tmp_path / "runs", ["--config.steps=20"]
    )
    assert before == {
        p: p.stat().st_mtime for p in (tmp_path / "runs").rglob("report.json")
    }
