"""The launch scripts: shellcheck clean, dry runs that show what would run, one line for bad input."""

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
        ["--nodes=4", r"launch.train --distributed --config=a.py --workdir=/data/my\ run", "--kill-on-bad-exit=1", "--requeue", "TERM@"],
    ),
    "launch/tpu_pod.sh": (["pod", "us-east5-a"], ["tpu-vm ssh pod --worker=all --zone=us-east5-a", "launch.train", "flock"]),
    "launch/gke/jobset.sh": (GKE, ["completions: 16", '"--workdir=/data/my run"', "tpu-v5p-slice", "maxRestarts", "values: [2]"]),
}


def bash(script, *arguments):
    return subprocess.run(["bash", ROOT / script, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck(script):
    tool = shutil.which("shellcheck")
    assert tool, "shellcheck is missing: pip install -e '.[dev]'"
    done = subprocess.run([tool, "-x", script.relative_to(ROOT)], cwd=ROOT, capture_output=True, text=True)
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
    for arguments in ([], ["--dry_run", *CASES[script][0]], ["--dry_run", *CASES[script][0], "--"]):
        done = bash(script, *arguments)
        assert done.returncode == 2 and done.stderr.startswith("refused: ") and len(done.stderr.strip().splitlines()) == 1


def test_jobset_is_yaml_with_the_command_as_given():
    yaml = pytest.importorskip("yaml")
    done = bash("launch/gke/jobset.sh", "--dry_run", *CASES["launch/gke/jobset.sh"][0], *TRAIN, '--config.name="x"')
    pod = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"][-3:] == ["--config=a.py", "--workdir=/data/my run", '--config.name="x"']
