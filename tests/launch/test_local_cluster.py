"""Processes joined by gloo: they train what one process trains, lose nothing when one is killed,
and stop together.
"""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxdistill.run import loop

ROOT = Path(__file__).parents[2]
TINY = "tests/run/tiny.py"


def start(workdir, processes, devices, variant="bare", steps=20, config="", **more):
    command = [
        sys.executable,
        "-m",
        "launch.local_cluster",
        str(processes),
        f"--devices={devices}",
        "--timeout=10",
        "--",
        f"--config={config or f'{TINY}:{variant}'}",
        f"--workdir={workdir}",
        f"--config.steps={steps}",
        f"--config.mesh.fsdp={processes * devices}",
        *(f"--config.{k}={v}" for k, v in more.items()),
    ]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process) -> str:
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err[-3000:]
    return out


def weights(workdir):
    return jax.tree.map(np.asarray, loop.load(workdir).params)


def logged(workdir) -> list[dict]:
    return [
        json.loads(line)
        for line in (workdir / "metrics.jsonl").read_text().splitlines()
    ]


def largest_difference(a, b) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max((np.abs(x - y).max() for x, y in pairs if x.size), default=0.0)


OFTEN = dict(steps=60, checkpoint_every=5, log_every=5)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A finished run of two processes with two devices each."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    finish(start(workdir, 2, 2, **OFTEN))
    return workdir


@pytest.mark.full
def test_two_processes_equal_one(two, tmp_path):
    finish(start(tmp_path / "one", 1, 4, **OFTEN))
    assert largest_difference(weights(two), weights(tmp_path / "one")) < 1e-5
    for mine, other in zip(logged(two), logged(tmp_path / "one"), strict=True):
        assert mine["step"] == other["step"]
        assert abs(mine["fake/loss"] - other["fake/loss"]) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["bare", "language"])
def test_four_processes_equal_one(tmp_path, variant):
    finish(start(tmp_path / "four", 4, 1, variant))
    finish(start(tmp_path / "two", 2, 2, variant))
    finish(start(tmp_path / "one", 1, 4, variant))
    one = weights(tmp_path / "one")
    assert largest_difference(weights(tmp_path / "four"), one) < 1e-5
    assert largest_difference(weights(tmp_path / "two"), one) < 1e-5


def newest(workdir) -> int:
    names = [path.name for path in (workdir / "checkpoints").glob("step_*")]
    steps = [int(name[5:]) for name in names if name[5:].isdigit()]
    return max(steps, default=0)


def wait_for(process, workdir, step: int) -> None:
    """Returns once a checkpoint of at least `step` is there."""
    while newest(workdir) < step:
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.02)


def kill_one(workdir, rng: random.Random, **run) -> int:
    """Starts two processes and kills one at a random moment after a new checkpoint: the job exits
    with 1 and one line at once.

    Returns the newest checkpoint's step.
    """
    process = start(workdir, 2, 2, **run)
    wait_for(process, workdir, newest(workdir) + 5)
    time.sleep(rng.uniform(0, 0.3))
    listed = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    )
    os.kill(int(rng.choice(listed.stdout.split())), signal.SIGKILL)
    killed = time.monotonic()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    # the timeout is 10 s; the rest is a busy machine
    assert time.monotonic() - killed < 60
    assert "of 2 was lost (killed by SIGKILL)" in err
    assert "run the same command again" in err
    return newest(workdir)


def check_kills(killed, undisturbed, kills: int, **run) -> None:
    """A run killed `kills` times and resumed each time ends with the weights of one that was not,
    bit for bit.
    """
    rng = random.Random(0)
    saved = [0]
    for _ in range(kills):
        saved.append(kill_one(killed, rng, **run))
        # nothing is lost but the steps after the last checkpoint
        assert saved[-1] >= saved[-2] + 5
    finish(start(killed, 2, 2, **run))
    assert [record["step"] for record in logged(killed)] == list(
        range(5, run["steps"] + 1, 5)
    )
    assert largest_difference(weights(killed), weights(undisturbed)) == 0


@pytest.mark.full
def test_a_lost_process_ends_the_job_and_the_rerun_goes_on(two, tmp_path):
    check_kills(tmp_path / "killed", two, kills=1, **OFTEN)


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    run = {**OFTEN, "steps": 400}
    finish(start(tmp_path / "undisturbed", 2, 2, **run))
    check_kills(tmp_path / "killed", tmp_path / "undisturbed", kills=20, **run)


@pytest.mark.full
def test_sigterm_reaches_all_and_they_save_the_same_step(tmp_path):
    process = start(tmp_path / "run", 2, 1, steps=3000, checkpoint_every=5)
    wait_for(process, tmp_path / "run", 5)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 75, err[-2000:]
    assert err.count("SIGTERM: saved step") == 2
    said = [line for line in err.splitlines() if "saved step" in line]
    stopped = {line.split("saved step ")[1].split()[0] for line in said}
    assert stopped == {str(newest(tmp_path / "run"))}


@pytest.mark.full
def test_another_number_of_processes_goes_on(tmp_path):
    """Saved by two processes with two devices each, resumed by one with one: no step is repeated,
    no sample is skipped or seen twice, as their sums tell, and the weights are the same.
    """
    run = tmp_path / "run"
    how = dict(variant="counted", steps=40, checkpoint_every=10, log_every=1)
    finish(start(run, 2, 2, **how))
    expected = weights(run)
    first = logged(run)
    shutil.rmtree(run / "stages")
    (run / "report.json").unlink()
    for step in (30, 40):
        shutil.rmtree(run / "checkpoints" / f"step_{step}")
    finish(start(run, 1, 1, **how))
    second = logged(run)
    for key in ("step", "fake/numbers", "fake/squares"):
        assert [record[key] for record in second] == [
            record[key] for record in first
        ], key
    assert [record["step"] for record in second] == list(range(1, 41))
    assert largest_difference(weights(run), expected) < 1e-5


def test_dry_run_prints_what_every_process_executes(tmp_path):
    command = [
        sys.executable,
        "-m",
        "launch.local_cluster",
        "3",
        "--dry_run",
        "--",
        f"--config={TINY}",
        f"--workdir={tmp_path / 'x'}",
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert not (tmp_path / "x").exists()
    for i, line in enumerate(lines):
        words = shlex.split(line)
        assert f"JAXDISTILL_PROCESS={i}" in words
        assert "JAXDISTILL_PROCESSES=3" in words
        assert "launch.train" in words


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["0"], "number of processes"),
        (["2", "--devces=1"], "did you mean 'devices'"),
    ],
)
def test_bad_input(arguments, message):
    done = subprocess.run(
        [sys.executable, "-m", "launch.local_cluster", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and message in done.stderr
        and len(done.stderr.strip().splitlines()) == 1
    )


@pytest.mark.full
def test_stages_that_measure_and_pool_on_two_processes(tmp_path):
    """Measured fields, pooled records, running statistics and a trained part as on one process."""
    config = "tests/run/staged_config.py"
    finish(start(tmp_path / "two", 2, 1, config=config))
    finish(start(tmp_path / "one", 1, 2, config=config))
    two = weights(tmp_path / "two")
    assert largest_difference(two, weights(tmp_path / "one")) < 1e-5
    scales = []
    for name in ("one", "two"):
        scales.append(
            json.loads((tmp_path / name / "measured.json").read_text())["scale"]
        )
    np.testing.assert_allclose(*scales, rtol=1e-6)
    pools = [
        sorted((tmp_path / name / "pools" / "1").iterdir())
        for name in ("one", "two")
    ]
    assert [file.name for file in pools[0]] == [file.name for file in pools[1]]
