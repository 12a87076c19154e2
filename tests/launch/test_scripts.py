"""The launch scripts: shellcheck clean, dry runs that show what would run, one line for bad
input.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*ROOT.glob("launch/**/*.sh"), *ROOT.glob("tools/*.sh")])
TRAIN = ["--", "--config=a.py", "--workdir=/data/my run"]
GKE = ["run", "image", "tpu-v5p-slice", "4x4x4"]
CASES = {  # script -> (its own arguments, what a dry run must show)
    "launch/slurm.sh": (
        ["4"],
        [
            "--nodes=4",
            r"launch.train --distributed --config=a.py --workdir=/data/my\ run",
            "--kill-on-bad-exit=1",
            "--requeue",
            "TERM@",
            "--restarts=3 ||",
            f"PYTHONPATH={ROOT}",
        ],
    ),
    "launch/tpu_pod.sh": (
        ["pod", "us-east5-a"],
        ["tpu-vm ssh pod --worker=all --zone=us-east5-a", "launch.train", "flock"],
    ),
    "launch/gke/jobset.sh": (
        GKE,
        [
            "completions: 16",
            '"--workdir=/data/my run"',
            "tpu-v5p-slice",
            "maxRestarts",
            "values: [2]",
            "FailJobSet",
            '"--restarts=3"',
        ],
    ),
}


def bash(script, *arguments):
    return subprocess.run(
        ["bash", ROOT / script, *arguments], capture_output=True, text=True
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck(script):
    tool = shutil.which("shellcheck")
    assert tool, "shellcheck is missing: pip install -e '.[dev]'"
    done = subprocess.run(
        [tool, "-x", script.relative_to(ROOT)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", CASES)
def test_dry_run_shows_every_command(script):
    arguments, expected = CASES[script]
    done = bash(script, "--dry_run", *arguments, *TRAIN)
    assert done.returncode == 0, done.stderr
    for text in expected:
        assert text in done.stdout, done.stdout


@pytest.mark.parametrize("script", CASES)
def test_bad_input_is_one_line(script):
    for arguments in (
        [],
        ["--dry_run", *CASES[script][0]],
        ["--dry_run", *CASES[script][0], "--"],
    ):
        done = bash(script, *arguments)
        assert (
            done.returncode == 2
            and done.stderr.startswith("refused: ")
            and len(done.stderr.strip().splitlines()) == 1
        )


def test_jobset_is_yaml_with_the_command_as_given():
    yaml = pytest.importorskip("yaml")
    done = bash(
        "launch/gke/jobset.sh",
        "--dry_run",
        *CASES["launch/gke/jobset.sh"][0],
        *TRAIN,
        '--config.name="x"',
    )
    pod = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"][0]["template"][
        "spec"
    ]["template"]["spec"]
    assert pod["containers"][0]["command"][-3:] == [
        "--config=a.py",
        "--workdir=/data/my run",
        '--config.name="x"',
    ]


def program(folder, name, body):
    """Writes an executable of that name, to be found in place of the real one."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("code", "requeued", "ends"),
    [(0, False, 0), (2, False, 2), (75, True, 0), (1, True, 0), (137, True, 0)],
)
def test_slurm_requeues_what_a_rerun_can_help(tmp_path, code, requeued, ends):
    job = bash("launch/slurm.sh", "--dry_run", "1", *TRAIN).stdout
    program(tmp_path / "bin", "srun", f"exit {code}")
    program(tmp_path / "bin", "scontrol", 'echo "scontrol $*"')
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(
        ["bash", "-c", job], env=env, capture_output=True, text=True
    )
    assert done.returncode == ends, done.stderr
    assert ("scontrol requeue 7" in done.stdout) == requeued


def remote_line(tmp_path, old: bool):
    """Runs the command that a worker of a TPU slice gets, with a Python that is too old or not.
    Returns the log of the programs that were called.
    """
    home = tmp_path / "home"
    log = tmp_path / "log"
    home.mkdir()
    script = f'printf "#!/bin/sh\\necho $n \\"\\$@\\" >> {log}\\n" > "$last/bin/$n"'
    stand_in = f'{script}; chmod +x "$last/bin/$n"'
    made = f'mkdir -p "$last/bin"; for n in pip python; do {stand_in}; done'
    python = f"""echo "$(basename $0) $*" >> {log}
[ "$1" = -c ] && exit {int(old)}
last="${{@: -1}}"
if [ "$2" = venv ] || [ "$3" = venv ]; then {made}; fi"""
    program(tmp_path / "bin", "python3", python)
    for name in ("python3.13", "python3.12", "python3.11"):
        program(tmp_path / "bin", name, "exit 127")
    gcloud = """case "$*" in
*" scp "*) cp "$5" "$HOME/jaxdistill.tar.gz" ;;
*) cd "$HOME"
for word in "$@"; do [[ $word = --command=* ]] && bash -c "${word#--command=}"; done ;;
esac"""
    program(tmp_path / "bin", "gcloud", gcloud)
    program(tmp_path / "bin", "flock", 'shift 4; exec "$@"')
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(home)}
    script = ROOT / "launch/tpu_pod.sh"
    given = ["--config=configs/toy/dmd2.py", "--workdir=/data/x"]
    done = subprocess.run(
        ["bash", script, "pod", "zone", "--", *given],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return log.read_text().splitlines()


def test_a_worker_with_an_old_python_gets_another(tmp_path):
    called = remote_line(tmp_path, old=True)
    assert (
        "python3 -m pip install -qq --user uv" in called
        and "python3 -m uv venv -q --seed --python 3.12 .venv" in called
    )
    assert called[-2:] == [
        "pip install -qq -e .[tpu]",
        "python -m launch.train --distributed --config=configs/toy/dmd2.py --workdir=/data/x",
    ]


def test_a_worker_with_a_new_python_keeps_it(tmp_path):
    called = remote_line(tmp_path, old=False)
    assert (
        not any("uv" in line.split() for line in called)
        and "python3 -m venv --clear .venv" in called
    )
    assert called[-1].startswith("python -m launch.train --distributed")


@pytest.mark.parametrize(
    ("inside", "given", "named"),
    [
        ("configs", "--config=toy/dmd2.py", "--config=configs/toy/dmd2.py"),
        ("configs/toy", "--config=dmd2.py:x", "--config=configs/toy/dmd2.py:x"),
        ("docs", "--config=configs/toy/dmd2.py", "--config=configs/toy/dmd2.py"),
        (".", "--config=no.py", "--config=no.py"),
    ],
)
def test_a_config_may_be_named_from_any_folder(inside, given, named):
    command = [
        "bash",
        ROOT / "launch/tpu_pod.sh",
        "--dry_run",
        "pod",
        "zone",
        "--",
        given,
        "--workdir=/x",
    ]
    done = subprocess.run(
        command, cwd=ROOT / inside, capture_output=True, text=True
    )
    assert done.returncode == 0 and f"{named}\\ --workdir=/x" in done.stdout, (
        done.stdout[-300:]
    )


def test_a_config_that_is_not_copied_is_refused(tmp_path):
    (tmp_path / "c.py").write_text("")
    command = [
        "bash",
        ROOT / "launch/tpu_pod.sh",
        "--dry_run",
        "pod",
        "zone",
        "--",
        "--config=c.py",
        "--workdir=/x",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (
        done.returncode == 2
        and "is outside of" in done.stderr
        and len(done.stderr.splitlines()) == 1
    )
