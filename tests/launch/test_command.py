"""Exit codes, the folders where a config is looked up, and the limit of restarts without a new
checkpoint.
"""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxdistill.core.types import Refused
from jaxdistill.run.loop import Stopped
from jaxdistill.run.metrics import NonFinite
from launch import _command, _restarts, export, generate, sample, train

ROOT = Path(__file__).parents[2]

ENDS = [  # what a command raises, its exit code, what stands in its one line
    (Refused("no such file"), 2, "refused: no such file"),
    (NonFinite("turn 0: loss is nan", 3), 1, "the last good checkpoint is kept"),
    (
        Stopped(signal.SIGTERM, "saved step 7 in x"),
        75,
        "stopped: SIGTERM: saved step 7 in x; run again to go on",
    ),
    (Stopped(signal.SIGINT, "saved step 7 in x"), 75, "stopped: SIGINT"),
    (
        OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl"),
        1,
        "failed: runs/x/metrics.jsonl: No space left on device",
    ),
    (OSError("UNAVAILABLE: and\nmore"), 1, "failed: UNAVAILABLE: and more"),
    (
        PermissionError(
            errno.EACCES, "checkpoints/step_7: cannot be read (Permission denied)"
        ),
        1,
        "failed: checkpoints/step_7: cannot be read",
    ),
    (MemoryError(), 1, "failed: out of memory"),
    (KeyboardInterrupt(), 75, "interrupted"),
]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    ENDS,
    ids=[f"{type(e).__name__}-{code}" for e, code, _ in ENDS],
)
def test_exit_codes(error, code, said, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command"])
    before = signal.getsignal(signal.SIGTERM)

    def command(argv):
        raise error

    try:
        with pytest.raises(SystemExit) as ended:
            _command.main(command)
    finally:
        signal.signal(signal.SIGTERM, before)
    printed = capsys.readouterr().err
    assert ended.value.code == code and said in printed and printed.count("\n") == 1


def test_sigterm_before_a_run_has_begun_is_75():
    command = "lambda argv: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(5))"
    code = f"import os, signal, time\nfrom launch import _command\n_command.main({command})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 75 and done.stderr.startswith("interrupted"), (
        done.stderr
    )


def test_a_relative_config_is_one_of_the_current_folder_or_of_the_checkout(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert _command.load_config("configs/toy/dmd2.py").steps
    (tmp_path / "configs/toy").mkdir(parents=True)
    mine = """from ml_collections import ConfigDict

def get_config():
    return ConfigDict({'mine': 1})
"""
    (tmp_path / "configs/toy/dmd2.py").write_text(mine)
    assert "mine" in _command.load_config("configs/toy/dmd2.py")
    with pytest.raises(
        Refused,
        match=r"--config=configs/toy/dmd22.py: no such file; did you mean 'configs/toy/dmd2.py'",
    ):
        _command.load_config("configs/toy/dmd22.py")


def test_distributed_without_a_cluster_is_refused():
    env = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("SLURM", "JAXDISTILL_", "OMPI", "KUBERNETES"))
    }
    command = [
        sys.executable,
        "-m",
        "launch.train",
        "--config=configs/toy/dmd2.py",
        "--workdir=/nowhere/x",
        "--distributed",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert (
        done.stderr.startswith("refused: --distributed: found no")
        and done.stderr.count("\n") == 1
    )


ADDRESS = "gs://bucket/x"
PLACES = [
    (
        train.train,
        ["--config=configs/toy/dmd2.py", f"--workdir={ADDRESS}"],
        "--workdir",
    ),
    (train.train, [f"--workdir={ADDRESS}"], "--workdir"),
    (
        train.train,
        [
            "--config=configs/toy/dmd2.py",
            "--workdir=W",
            f"--config.roles.teacher.init={ADDRESS}",
        ],
        "config.roles.teacher.init",
    ),
    (
        train.train,
        [
            "--config=configs/mnist/dmd2.py",
            "--workdir=W",
            f"--config.data.path={ADDRESS}",
        ],
        "config.data.path",
    ),
    (
        sample.sample,
        ["--config=configs/toy/dmd2.py", "--workdir=W", f"--out={ADDRESS}"],
        "--out",
    ),
    (
        export.export,
        ["--config=configs/toy/dmd2.py", "--workdir=W", f"--out={ADDRESS}"],
        "--out",
    ),
    (
        generate.generate,
        ["--pipeline=P", "--prompt=p", f"--out={ADDRESS}"],
        "--out",
    ),
]


@pytest.mark.parametrize(
    ("command", "argv", "key"),
    PLACES,
    ids=[f"{c.__name__}{i}" for i, (c, _, _) in enumerate(PLACES)],
)
def test_addresses_of_object_stores_are_refused(
    command, argv, key, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused, match=f"^{key}={ADDRESS}: gs:// is not supported"):
        command(argv)
    assert not list(tmp_path.iterdir())


def failing(workdir, most, error=RuntimeError("lost")):
    with pytest.raises(type(error)), _restarts.bounded(workdir, most, lambda: None):
        raise error


def test_restarts_without_a_new_checkpoint_come_to_an_end(tmp_path):
    workdir = tmp_path / "run"
    failing(workdir, 2)
    assert not workdir.exists()  # nothing is made before the input is checked
    (workdir / "checkpoints/step_5").mkdir(parents=True)
    for _ in range(2):
        failing(workdir, 2)
    refused = Refused("")
    failing(workdir, 2, refused)
    said = (
        f"^{workdir}: 2 restarts without a new checkpoint; see why it fails, "
        "remove restarts.json there"
    )
    with (
        pytest.raises(Refused, match=said),
        _restarts.bounded(workdir, 2, lambda: pytest.fail("joined the others")),
    ):
        pass
    for new in (
        "checkpoints/step_10",
        "teacher/checkpoints/step_5",
        "stages/0",
        "data/0/batch000000_0.arrayrecord",
    ):
        place = workdir / new
        (place.parent if place.suffix else place).mkdir(parents=True)
        if place.suffix:
            place.write_text("")
        for _ in range(2):
            failing(workdir, 2)
        failing(workdir, 2, refused)


@pytest.mark.parametrize(
    "stop", [Stopped(signal.SIGTERM, "saved"), KeyboardInterrupt()]
)
def test_a_run_that_was_stopped_has_not_failed(tmp_path, stop):
    for _ in range(5):
        failing(tmp_path, 1, stop)
    failing(tmp_path, 1)
    failing(tmp_path, 1, Refused(""))


def test_a_torn_count_is_none(tmp_path):
    for text in ("", "[]", json.dumps({"count": 9}), "\xff"):
        (tmp_path / _restarts.FILE).write_text(text)
        failing(tmp_path, 1)


def test_no_bound_counts_nothing(tmp_path):
    for _ in range(3):
        failing(tmp_path, 0)
    assert not list(tmp_path.iterdir())
