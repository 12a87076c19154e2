"""A hundred damaged checkpoints and run folders: each is read as it was written, refused in one
line that names the file, or set aside with a warning; nothing else is raised, nothing is run, and
nothing foreign is gone.
"""

import contextlib
import functools
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.sharding import MeshShape
from jaxdistill.data.mixtures import Mixture
from jaxdistill.diffusion.denoiser import Denoiser
from jaxdistill.evals.points import PointEval
from jaxdistill.methods.trajectory.flow_matching import FlowMatching
from jaxdistill.models.denoisers.mlp import MLP
from jaxdistill.run import loop, metrics
from jaxdistill.run.checkpoint import Checkpoints

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.damage import DAMAGE, JSON_DAMAGE, contents, outcome, quiet, remove

# cases of each kind
CHECKPOINTS = 40
RESULTS = 30
RECORDS = 40


def config():
    """Four steps of flow matching, a checkpoint at each second."""
    return experiment(
        steps=4,
        log_every=2,
        checkpoint_every=2,
        tensorboard=False,
        data=Mixture(batch_size=16),
        method=FlowMatching(),
        mesh=MeshShape(data=1, fsdp=1, tensor=1),
        roles=dict(student=Role(model=MLP(width=16, depth=1), denoiser=Denoiser())),
        evaluation=PointEval(samples=100, student_steps=(2,)),
    )


def equal(a, b) -> bool:
    return all(
        np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def mutated(rng, files, json_too) -> str:
    """Damages one of the files, or removes it; returns how."""
    file = files[int(rng.integers(len(files)))]
    kinds = (
        JSON_DAMAGE if json_too(file) and rng.random() < 0.6 else (*DAMAGE, remove)
    )
    return f"{file.parent.name}/{kinds[int(rng.integers(len(kinds)))](file, rng)}"


def fresh(whole: Path, number: int) -> Path:
    """A copy of the run, with files in it that are not its own."""
    copy = whole.parent / f"copy{number}"
    shutil.copytree(whole, copy)
    for place in (
        "notes.txt",
        "checkpoints/notes.txt",
        "stages/notes.txt",
        "mine/a.txt",
    ):
        (copy / place).parent.mkdir(exist_ok=True)
        (copy / place).write_text("foreign")
    return copy


def tried(number, how, copy, call, said=()) -> list:
    """[number, how, "read" | "aside" | "refused", message] of one call, and of those before it that
    have `said` something.
    """
    before = contents(copy)
    (empty := copy.parent / "empty").mkdir(exist_ok=True)
    with quiet(empty), warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        message = outcome(call, str(copy))
    aside = [
        str(w.message)
        for w in given
        if "is damaged and was moved to damaged/" in str(w.message)
    ]
    assert all(line.isprintable() for line in aside), aside
    after = contents(copy)
    message = "; ".join(filter(None, [*said, message]))
    # a run writes its own again
    lost = {v for k, v in before.items() if k != "config.json"} - set(
        after.values()
    )
    assert not lost, (
        f"{how}: {[k for k, v in before.items() if v in lost]} are gone"
    )
    shutil.rmtree(copy)
    return [
        number,
        how,
        "refused" if message else "aside" if aside else "read",
        message or "; ".join(aside),
    ]


def checkpoints(whole, rng, number):
    """One of the newest checkpoint's files: an older one is read, or the same values."""
    copy = fresh(whole, number)
    sound = _sound(whole)
    abstract = _abstract(whole)
    newest = copy / "checkpoints/step_4"
    how = mutated(
        rng,
        sorted(f for f in newest.rglob("*") if f.is_file()),
        lambda file: file.name in ("metadata", "_METADATA"),
    )

    def call():
        with contextlib.closing(Checkpoints(copy / "checkpoints")) as opened:
            found = opened.restore(abstract)
        assert (
            found is not None
            and equal(found[1], sound[found[0]][0])
            and found[2] == sound[found[0]][1]
        ), how

    return tried(number, how, copy, call)


def results(whole, rng, number):
    """One of the files of the last stage's result: the same weights, or a refusal."""
    copy = fresh(whole, number)
    how = mutated(
        rng,
        sorted(f for f in (copy / "stages/0").rglob("*") if f.is_file()),
        lambda file: file.name == "_METADATA",
    )
    return tried(
        number,
        how,
        copy,
        lambda: _same(loop.load(copy).params, _weights(whole), how),
    )


def _same(found, wanted, how):
    assert equal(found, wanted), how


def records(whole, rng, number):
    """config.json, report.json and metrics.jsonl: every command reads what was written, or refuses
    it.
    """
    copy = fresh(whole, number)
    file = copy / ("config.json", "report.json", "metrics.jsonl")[number % 3]
    how = mutated(rng, [file], lambda file: file.suffix == ".json")
    commands = [
        lambda: metrics.read(copy / "metrics.jsonl", clock=True),
        lambda: loop.load(copy),
        lambda: loop.evaluate(copy),
        lambda: loop.run(config(), copy, progress=False),
    ]
    said = [outcome(command, str(copy)) for command in commands[:-1]]
    return tried(number, how, copy, commands[-1], said)


@functools.cache
def _weights(whole):
    return jax.tree.map(np.asarray, loop.load(whole).params)


@functools.cache
def _abstract(whole):
    made = loop.Experiment(config(), whole)
    with loop.sharding.use(made.mesh, made.settings.rules):
        return loop.abstract_programs(made)[0].abstract.replace(frozen={})


@functools.cache
def _sound(whole):
    """step -> (state, host record) of the checkpoints as they were written."""
    found = {}
    for step in (4, 2):
        copy = whole.parent / "sound"
        shutil.copytree(whole / "checkpoints", copy)
        for later in range(step + 1, 5):
            shutil.rmtree(copy / f"step_{later}", ignore_errors=True)
        with contextlib.closing(Checkpoints(copy)) as opened:
            at, state, host = opened.restore(_abstract(whole))
        found[at] = (jax.device_get(state), host)
        shutil.rmtree(copy)
    return found


def all_cases(folder: Path) -> list:
    """Of every kind as many as its constant says, from one seed."""
    whole = folder / "whole"
    rng = np.random.default_rng(0)
    loop.run(config(), whole, progress=False)
    shutil.rmtree(whole / "samples")
    # what is evaluated does not matter here
    loop.report.write = lambda trained, reports, **rest: {}
    loop._train = lambda *_: None  # where report.json is gone
    loop._as_given = lambda trained: trained
    kinds = [checkpoints] * CHECKPOINTS + [results] * RESULTS + [records] * RECORDS
    return [[kind.__name__, *kind(whole, rng, i)] for i, kind in enumerate(kinds)]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """In a process of its own: reads that are still under way when one has failed complain where no
    test can hear them.
    """
    ended = subprocess.run(
        [sys.executable, __file__, tmp_path_factory.mktemp("damaged")],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.full
def test_nothing_but_a_reading_a_refusal_or_a_warning(cases):
    """What else may come of one is asserted where it is tried; all kinds of outcome occur, or the
    damage was too mild.
    """
    assert len(cases) == CHECKPOINTS + RESULTS + RECORDS
    seen = {
        kind: {what for name, _, _, what, _ in cases if name == kind}
        for kind in ("checkpoints", "results", "records")
    }
    assert seen["checkpoints"] >= {"read", "aside"}
    assert seen["results"] == {"read", "refused"}
    assert seen["records"] == {"read", "refused"}


if __name__ == "__main__":
    print(json.dumps(all_cases(Path(sys.argv[1]))))
