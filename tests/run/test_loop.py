"""A run: what it leaves, and that it can be killed, resumed, damaged and refused without losing
anything.
"""

import errno
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict

from jaxdistill.core.build import plain
from jaxdistill.core.optim import Optimizer
from jaxdistill.core.types import Refused
from jaxdistill.data.mixtures import Mixture
from jaxdistill.evals.points import PointEval
from jaxdistill.methods.trajectory.flow_matching import FlowMatching
from jaxdistill.methods.trajectory.progressive import Progressive
from jaxdistill.models.denoisers.mlp import MLP
from jaxdistill.run import loop, metrics
from jaxdistill.run.checkpoint import Checkpoints, load_params
from jaxdistill.run.experiment import Experiment
from jaxdistill.run.host import alone
from tests.run.counting import Poisoned

TINY = Path(__file__).with_name("tiny.py")


def load_tiny():
    found = importlib.util.spec_from_file_location("tiny", TINY)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


get_config = load_tiny().get_config


def config(**changes):
    made = get_config()
    for key, value in changes.items():
        made[key] = value
    return made


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, loop.run(get_config(), workdir, progress=False)


def weights(workdir):
    trained = loop.load(workdir)
    return {role: trained.params[role] for role in trained.experiment.method.inits}


def equal(a, b):
    return all(
        np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.full
def test_leaves_a_run_directory(finished):
    workdir, report = finished
    for name in (
        "config.json",
        "metrics.jsonl",
        "report.json",
        "report.html",
        "checkpoints",
        "samples/student_1NFE.png",
    ):
        assert (workdir / name).exists(), name
    assert json.loads((workdir / "report.json").read_text()) == report
    assert {
        "config",
        "method",
        "steps",
        "seconds",
        "models",
        "claim",
    } == report.keys()
    assert [(r["name"], r["nfe"]) for r in report["models"]] == [
        ("teacher", 3),
        ("teacher", 1),
        ("student", 1),
    ]
    assert report["claim"]["holds"] is True
    assert report["claim"]["value"] == report["models"][2]["energy"]
    assert report["claim"]["baseline"] == report["models"][1]["energy"]
    records = metrics.read(workdir / "metrics.jsonl")
    assert [r["step"] for r in records] == [5, 10, 15, 20, 25, 30]
    assert {
        "fake/loss",
        "fake/gan",
        "student/grad_norm",
        "perf/samples_per_second",
        "perf/model_flops_per_second",
    } <= records[0].keys()
    text = (workdir / "report.html").read_text()
    assert text.count("data:image/png;base64,") == 5
    assert "http" not in text.replace("http-equiv", "")


@pytest.mark.full
def test_same_seed_same_bits(finished, tmp_path):
    loop.run(get_config(), tmp_path / "again", progress=False)
    assert equal(weights(finished[0]), weights(tmp_path / "again"))


def test_a_finished_run_is_not_run_again(finished, monkeypatch):
    monkeypatch.setattr(loop, "_train", lambda *_: pytest.fail("trained again"))
    assert loop.run(get_config(), finished[0], progress=False) == finished[1]


def test_a_run_of_another_config_is_refused(finished):
    before = (finished[0] / "config.json").read_text()
    changed = get_config()
    changed.method.critic_steps = 7
    with pytest.raises(Refused, match=r"method.critic_steps is 2 there, 7 here"):
        loop.run(changed, finished[0], progress=False)
    assert (finished[0] / "config.json").read_text() == before


def test_a_folder_that_another_process_trains_in_is_refused(tmp_path):
    workdir = tmp_path / "run"
    with (
        alone(workdir),
        pytest.raises(Refused, match="another process is at work there"),
    ):
        loop.run(get_config(), workdir, progress=False)
    assert [p.name for p in workdir.iterdir()] == [".lock"]
    with alone(workdir):  # and it is free again
        pass


def start(workdir, steps=30):
    env = {
        **os.environ,
        "PYTHONPATH": str(TINY.parents[2]),
        "XLA_FLAGS": os.environ["XLA_FLAGS"],
    }
    return subprocess.Popen(
        [sys.executable, str(TINY), str(workdir), str(steps)],
        env=env,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(workdir, step, process, seconds=240):
    end = time.time() + seconds
    while time.time() < end and process.poll() is None:
        records = metrics.read(workdir / "metrics.jsonl")
        if records and records[-1]["step"] >= step:
            return
        time.sleep(0.02)
    if process.poll() is not None and process.returncode:
        pytest.fail(process.stderr.read())


@pytest.mark.full
def test_kill_and_resume_is_bit_equal(tmp_path):
    """kill -9 at a random moment, and SIGTERM, against a run left alone: the same final bits."""
    steps = 2000
    kill = random.Random().randrange(5, 300)
    killed = tmp_path / "killed"
    stopped = tmp_path / "stopped"
    processes = [start(killed, steps), start(stopped, steps)]
    wait_for_step(killed, kill, processes[0])
    processes[0].kill()
    wait_for_step(stopped, 10, processes[1])
    processes[1].send_signal(signal.SIGTERM)
    message = processes[1].communicate(timeout=120)[1]
    assert processes[1].returncode == 75, message
    assert "SIGTERM: saved step" in message
    processes[0].communicate()
    assert not (killed / "report.json").exists()
    done = metrics.read(killed / "metrics.jsonl")[-1]["step"]
    final = done // 5 * 5 + 20
    runs = {}
    for name in ("killed", "stopped", "alone"):
        folder = tmp_path / name
        latest = metrics.read(folder / "metrics.jsonl")
        if latest and latest[-1]["step"] > final:
            final = latest[-1]["step"] // 5 * 5 + 20
    for name in ("killed", "stopped", "alone"):
        folder = tmp_path / name
        if (
            folder / "config.json"
        ).exists():  # the length of a run may be changed by nobody but this test
            saved = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(
                json.dumps({**saved, "steps": final})
            )
        loop.run(config(steps=final, keep=3), folder, progress=False)
        runs[name] = weights(folder)
        assert [r["step"] for r in metrics.read(folder / "metrics.jsonl")][
            -1
        ] == final
    assert equal(runs["alone"], runs["killed"])
    assert equal(runs["alone"], runs["stopped"])


@pytest.fixture
def unfinished(finished, tmp_path):
    """A copy of the finished run that has lost its end: the checkpoints are what is left."""
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    shutil.rmtree(folder / "stages")
    (folder / "report.json").unlink()
    return folder


def truncate(folder):
    for file in folder.rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)


def newest(folder):
    return max(
        (folder / "checkpoints").iterdir(), key=lambda p: int(p.name.split("_")[-1])
    )


@pytest.mark.full
@pytest.mark.parametrize("part", ["state", "host", ""])
def test_a_damaged_checkpoint_is_set_aside(finished, unfinished, part):
    truncate(newest(unfinished) / part)
    with pytest.warns(UserWarning, match="checkpoint 30 is damaged"):
        loop.run(get_config(), unfinished, progress=False)
    assert equal(weights(unfinished), weights(finished[0]))
    assert list((unfinished / "damaged").iterdir())


def test_a_checkpoint_of_another_architecture_is_refused(unfinished):
    changed = get_config()
    changed.roles.student.model.width = 24
    saved = json.loads((unfinished / "config.json").read_text())
    saved["roles"]["student"]["model"]["width"] = 24
    (unfinished / "config.json").write_text(json.dumps(saved))
    with pytest.raises(
        Refused,
        match=r"another architecture: student/.* is float32\[.*16.*expected float32\[.*24",
    ):
        loop.run(changed, unfinished, progress=False)
    assert newest(unfinished).name.endswith("30")


@pytest.mark.full
def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    bad = config(steps=40)
    bad.roles.fake.optimizer.lr = 1e30
    bad.roles.fake.optimizer.clip = 0.0
    with pytest.raises(
        metrics.NonFinite,
        match=r"turn \d \(.*\): \w+/\w+ of role '\w+' is (nan|inf|-inf) at step \d+",
    ):
        loop.run(bad, tmp_path, progress=False)
    assert not (tmp_path / "report.json").exists()
    for folder in (tmp_path / "checkpoints").glob("*"):
        assert int(folder.name.split("_")[-1]) < 40


def flow(**rest):
    """Four steps of flow matching."""
    from jaxdistill.core.build import Role, experiment
    from jaxdistill.diffusion.denoiser import Denoiser

    return experiment(
        steps=4,
        log_every=2,
        checkpoint_every=4,
        tensorboard=False,
        data=Mixture(batch_size=16),
        method=FlowMatching(),
        mesh=load_tiny().spec_mesh(),
        roles=dict(
            student=Role(
                model=MLP(width=16, depth=1),
                denoiser=Denoiser(),
                **rest.pop("role", {}),
            )
        ),
        evaluation=PointEval(samples=100, student_steps=(2,)),
        **rest,
    )


def test_a_loss_that_is_no_number_at_first_names_its_suspects(
    tmp_path, monkeypatch
):
    """The batch; else the weights that a role starts from; else the settings."""

    def fails(folder, config, match):
        with pytest.raises(metrics.NonFinite, match=match):
            loop.run(config, tmp_path / folder, progress=False)

    hot = flow(role=dict(optimizer=Optimizer(lr=1e30, clip=0.0)))
    fails(
        "hot",
        hot,
        r"at step \d; its batch and .* finite: suspects are "
        r"roles\.student\.optimizer\.lr=1e\+30 and [a-z ]+$",
    )
    with monkeypatch.context() as patch:
        nan = lambda self, roles=None: {
            "student": jax.tree.map(
                lambda s: jnp.full(s.shape, np.nan), self.nets["student"].shapes
            )
        }
        patch.setattr(Experiment, "warm_starts", nan)
        fails(
            "weights",
            flow(),
            r"at step 1; suspects: roles\.student starts from weights that are not finite$",
        )

    poisoned = flow()
    poisoned.data = plain(Poisoned(batch_size=16))
    poisoned.log_every = 4
    poisoned.evaluation = ConfigDict()
    poisoned.claim = ConfigDict()
    step = next(
        i
        for i, batch in enumerate(Poisoned(batch_size=16).loader(), 1)
        if 7 in batch["number"]
    )
    fails(
        "data",
        poisoned,
        rf"at step {step}; suspects: batch\['x'\] of that step has values that are not finite$",
    )


def test_a_run_may_skip_updates_that_are_not_finite(tmp_path):
    """It goes on; the step of the poisoned sample has no loss in the log, and the checkpoint has
    the number of skipped updates.
    """
    skipping = flow(role=dict(optimizer=Optimizer(lr=1e-3, nonfinite="skip")))
    skipping.data = plain(Poisoned(batch_size=16))
    skipping.log_every = 1
    skipping.evaluation = ConfigDict()
    skipping.claim = ConfigDict()
    loop.run(skipping, tmp_path, progress=False)
    loader = Poisoned(batch_size=16).loader()
    hurt = [7 in batch["number"] for _, batch in zip(range(4), loader)]
    assert sum(hurt) == 1
    records_ = metrics.read(tmp_path / "metrics.jsonl")
    assert [r["student/skipped"] for r in records_] == hurt
    assert ["student/loss" not in r for r in records_] == hurt
    assert ["student/grad_norm" not in r for r in records_] == hurt
    weights = loop.load(tmp_path).params["student"]
    assert all(np.isfinite(w).all() for w in jax.tree.leaves(weights))
    file = Checkpoints(tmp_path / "checkpoints", 1)
    experiment = loop.Experiment(skipping, tmp_path)
    with loop.sharding.use(experiment.mesh, experiment.settings.rules):
        abstract = loop.abstract_programs(experiment)[0].abstract
        _, state, _ = file.restore(abstract.replace(frozen={}))
    file.close()
    assert int(state.opt["student"].skipped) == 1
    assert int(state.count["student"]) == 3


def test_the_seconds_of_a_run_are_those_of_all_its_processes(tmp_path):
    loop.run(flow(), tmp_path, progress=False)
    *records, last = metrics.read(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text(
        "".join(
            json.dumps(r) + "\n" for r in [*records, {**last, "seconds": 1000.0}]
        )
    )
    (tmp_path / "report.json").unlink()
    assert loop.run(flow(), tmp_path, progress=False)["seconds"] >= 1000.0


def test_runs_inside_a_run_share_its_seed(tmp_path):
    outer = flow(runs=dict(first=flow()), role=dict(init="@first"))
    outer.data.seed = 5
    outer.seed = 3
    assert outer.runs.first.data.seed == 5
    assert outer.runs.first.seed == 3
    loop.run(outer, tmp_path, progress=False)
    assert (
        json.loads((tmp_path / "first/config.json").read_text())["data"]["seed"]
        == 5
    )
    assert load_params(
        tmp_path / "stages/0",
        {"student": loop.load(tmp_path).experiment.nets["student"].shapes},
    )


@pytest.mark.full
def test_runs_that_are_the_same_are_trained_once(tmp_path):
    """Inside one another, in a run that goes on after a part of it, and where the caller knows of a
    finished one; a folder that is there already, and a config with another value, are left to
    themselves.
    """
    from_first = lambda **rest: flow(
        runs=dict(first=flow(**rest)), role=dict(init="@first")
    )
    claim = dict(
        metric="energy",
        model="student@2",
        baseline="other@2",
        better="lower",
        ratio=100.0,
    )

    def outer(**rest):
        return flow(
            runs=dict(first=flow(), other=from_first(**rest)),
            role=dict(init="@first"),
            claim=claim,
        )

    known = {}
    loop.run(outer(), tmp_path / "one", progress=False, known=known)
    assert (tmp_path / "one/other/first").readlink() == Path("../first") and not (
        tmp_path / "one/first"
    ).is_symlink()
    assert set(known.values()) == {
        tmp_path / "one",
        tmp_path / "one/first",
        tmp_path / "one/other",
    }
    assert loop.load(tmp_path / "one/other").experiment.runs.keys() == {"first"}

    loop.run(flow(), tmp_path / "two/first", progress=False)
    loop.run(outer(), tmp_path / "two", progress=False)
    assert (tmp_path / "two/other/first").readlink() == Path("../first")
    again = {}
    loop.run(outer(), tmp_path / "two", progress=False, known=again)
    assert again.keys() == known.keys()

    changed = outer(role=dict(optimizer=Optimizer(lr=0.5)))
    loop.run(changed, tmp_path / "three", progress=False, known=known)
    assert (tmp_path / "three/first").resolve() == tmp_path / "one/first"
    assert (
        not (tmp_path / "three/other").is_symlink()
        and not (tmp_path / "three/other/first").is_symlink()
    )


@pytest.mark.full
def test_a_teacher_that_a_stage_replaces_is_evaluated_as_given(finished, tmp_path):
    """Progressive distillation's last teacher is a student; reported, loaded and scored again is
    the teacher of the run.
    """

    made = get_config()
    with made.unlocked():
        made.method = plain(Progressive(teacher_steps=4))
        made.roles = {role: made.roles[role] for role in ("teacher", "student")}
    report = loop.run(made, tmp_path, progress=False)
    energies = lambda report, name: [
        row["energy"] for row in report["models"] if row["name"] == name
    ]
    assert energies(report, "teacher") == energies(finished[1], "teacher")
    trained = loop.load(tmp_path)
    assert trained.nets["teacher"] == trained.experiment.nets["teacher"]
    assert trained.params["teacher"] == {}
    assert energies(loop.evaluate(tmp_path), "student") == energies(
        report, "student"
    )


@pytest.mark.full
def test_dry_run_writes_nothing(tmp_path, capsys):
    table = loop.run(get_config(), tmp_path / "dry", dry_run=True)["roles"]
    assert not (tmp_path / "dry").exists()
    out = capsys.readouterr().out
    assert "turns 0: compiled" in out
    assert "turns 0+1: compiled" in out
    assert (
        table["student"]["parameters"]
        == loop.Experiment(get_config(), tmp_path).nets["student"].size
    )
    assert (
        table["student"]["flops, turns 0+1"]
        > table["student"]["flops, turns 0"]
        > 0
    )
    assert table["teacher"]["parameters"] == 0


def test_runs_that_nothing_needs_are_left_out(tmp_path):
    """A teacher from elsewhere: the one in the config is not trained, though the claim has a row
    called teacher@1.
    """
    import importlib

    from jaxdistill.run.experiment import Experiment

    config = importlib.import_module("configs.digits.dmd2").get_config()
    assert list(Experiment(config, tmp_path).runs) == ["teacher"]
    config.roles.teacher.init = "elsewhere"
    assert not Experiment(config, tmp_path).runs


def test_a_checkpoint_of_another_seed_is_refused(unfinished):
    """With a config.json that agrees, as where checkpoints were copied from another run."""
    saved = json.loads((unfinished / "config.json").read_text())
    (unfinished / "config.json").write_text(json.dumps({**saved, "seed": 7}))
    before = sorted(p.name for p in (unfinished / "checkpoints").iterdir())
    with pytest.raises(
        Refused,
        match=r"step_30 is a checkpoint of another config: seed is 0 there, 7 here; move it away",
    ):
        loop.run(config(seed=7), unfinished, progress=False)
    assert (
        sorted(p.name for p in (unfinished / "checkpoints").iterdir()) == before
        and not (unfinished / "damaged").exists()
    )


@pytest.mark.full
def test_a_finished_run_whose_config_was_changed_is_refused(finished, tmp_path):
    """By every command: its result is that of another config."""
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    saved = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps({**saved, "log_every": 3}))
    loop.load(workdir)
    (workdir / "config.json").write_text(json.dumps({**saved, "seed": 7}))
    for command in (
        lambda: loop.run(config(seed=7), workdir, progress=False),
        lambda: loop.load(workdir),
        lambda: loop.evaluate(workdir),
    ):
        with pytest.raises(
            Refused,
            match=r"report.json is of another config: seed is 0 there, 7 here; "
            "config.json was changed",
        ):
            command()
    (workdir / "config.json").write_text(
        json.dumps({**saved, "evaluation": {**saved["evaluation"], "samples": 7}})
    )
    changed = get_config()
    changed.evaluation.samples = 7
    with pytest.raises(
        Refused,
        match=r"evaluation.samples is 200 there, 7 here; launch.evaluate makes it anew",
    ):
        loop.run(changed, workdir, progress=False)
    loop.evaluate(workdir)
    assert (
        loop.run(changed, workdir, progress=False)["config"]["evaluation"][
            "samples"
        ]
        == 7
    )


def test_a_folder_that_cannot_be_written_to_is_refused(
    finished, tmp_path, monkeypatch
):
    """Before any training; what the operating system says is named."""

    def touch(self, *args, **rest):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "touch", touch)
    monkeypatch.setattr(loop, "_train", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(
        loop.report, "write", lambda *_, **__: pytest.fail("evaluated")
    )
    for command in (
        lambda: loop.run(get_config(), tmp_path / "run", progress=False),
        lambda: loop.evaluate(finished[0]),
    ):
        with pytest.raises(
            Refused, match=r"cannot be written to \(Read-only file system\)"
        ):
            command()


@pytest.mark.full
@pytest.mark.parametrize("what", ["metrics", "checkpoint", "report"])
def test_a_full_disk_keeps_the_last_checkpoint(
    finished, tmp_path, monkeypatch, what
):
    """One OSError that names file or folder, and the run goes on from its last checkpoint when
    there is room again.
    """
    full = OSError(errno.ENOSPC, "No space left on device")
    calls = []

    def third(real):
        def call(*args, **rest):
            calls.append(1)
            if len(calls) == 3 or what == "report":
                raise full
            return real(*args, **rest)

        return call

    place = {
        "metrics": (metrics.Writer, "write"),
        "checkpoint": (ocp.CheckpointManager, "save"),
        "report": (loop.report, "write_json"),
    }[what]
    monkeypatch.setattr(*place, third(getattr(*place)))
    with pytest.raises(OSError, match="No space left on device"):
        loop.run(get_config(), tmp_path, progress=False)
    monkeypatch.undo()
    assert not (tmp_path / "report.json").exists()
    saved = newest(tmp_path).name
    assert (
        saved
        == {"metrics": "step_10", "checkpoint": "step_10", "report": "step_30"}[
            what
        ]
    )
    loop.run(get_config(), tmp_path, progress=False)
    assert equal(weights(tmp_path), weights(finished[0]))


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 900 kB: three checkpoints of the tiny run."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", place],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs may be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.full
def test_a_disk_that_is_really_full(small_disk):
    process = start(small_disk / "run", 40)
    message = process.communicate(timeout=240)[1]
    said = [line for line in message.splitlines() if line.startswith("failed: ")]
    assert process.returncode == 1, message
    expected = (
        f"failed: {small_disk}/run/checkpoints: cannot be written (No space left on device); "
        "the last good checkpoint is kept"
    )
    assert said == [expected]
    assert "Traceback" not in message
    assert sorted(
        p.name
        for p in (small_disk / "run/checkpoints").glob("step_*")
        if p.name[5:].isdigit()
    )[-1:]
    subprocess.run(["mount", "-o", "remount,size=9m", small_disk], check=True)
    loop.run(config(steps=40), small_disk / "run", progress=False)
    assert metrics.read(small_disk / "run/metrics.jsonl")[-1]["step"] == 40


@pytest.mark.full
def test_a_signal_between_runs_is_heard(tmp_path, monkeypatch):
    """While a run inside another is evaluated: it ends, the next is not begun; after the training:
    not evaluated; the bits are the same in the end.
    """
    outer = lambda: flow(runs=dict(first=flow()), role=dict(init="@first"))
    loop.run(outer(), tmp_path / "whole", progress=False)

    def signalled(real):
        def call(*args, **rest):
            os.kill(os.getpid(), signal.SIGTERM)
            return real(*args, **rest)

        return call

    run = tmp_path / "run"
    with (
        monkeypatch.context() as patch,
        pytest.raises(
            loop.Stopped, match=r"SIGTERM: finished .*/first; run again"
        ) as stopped,
    ):
        patch.setattr(loop.report, "write", signalled(loop.report.write))
        loop.run(outer(), run, progress=False)
    assert (
        stopped.value.reason is signal.SIGTERM
        and (run / "first/report.json").exists()
        and not (run / "checkpoints").exists()
    )
    with (
        monkeypatch.context() as patch,
        pytest.raises(
            loop.Stopped, match=r"SIGTERM: trained in .*, not yet evaluated"
        ),
    ):
        patch.setattr(loop, "_as_given", signalled(loop._as_given))
        loop.run(outer(), run, progress=False)
    assert (run / "stages/0").exists() and not (run / "report.json").exists()
    loop.run(outer(), run, progress=False)
    assert equal(weights(run), weights(tmp_path / "whole"))


@pytest.mark.full
def test_results_of_stages_that_are_gone(tmp_path):
    """One in the middle, the first ones while a later checkpoint is there, one too many."""

    made = get_config()
    with made.unlocked():
        made.method = plain(Progressive(teacher_steps=4))
        made.roles = {role: made.roles[role] for role in ("teacher", "student")}
    loop.run(made, tmp_path, progress=False)
    run = lambda: loop.run(made, tmp_path, progress=False)
    last = max(int(p.name) for p in (tmp_path / "stages").iterdir())
    assert last > 0
    (tmp_path / "stages/0").rename(tmp_path / "0")
    for command in (
        run,
        lambda: loop.load(tmp_path),
        lambda: loop.evaluate(tmp_path),
    ):
        with pytest.raises(
            Refused, match=r"stages: stage 1 is there, stage 0 before it is missing"
        ):
            command()
    (tmp_path / "stages").rename(tmp_path / "others")
    for command in (
        run,
        lambda: loop.load(tmp_path),
        lambda: loop.evaluate(tmp_path),
    ):
        with pytest.raises(
            Refused, match=r"stages/0: no such result; has that run finished"
        ):
            command()
    (tmp_path / "report.json").unlink()
    with pytest.raises(
        Refused, match=rf"is of stage {last}, but .*stages/0 is missing"
    ):
        run()
    (tmp_path / "others").rename(tmp_path / "stages")
    shutil.copytree(tmp_path / "0", tmp_path / "stages/0")
    shutil.copytree(tmp_path / "0", tmp_path / f"stages/{last + 1}")
    with pytest.raises(
        Refused, match=rf"stages/{last + 1}: the run's method has {last + 1} stages"
    ):
        run()
