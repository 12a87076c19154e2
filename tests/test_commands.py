"""The commands as a user meets them: arguments, exit codes, one line for bad input, nothing half-written."""

import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import interop
from jaxdistill.core import loop
from jaxdistill.core.types import Refused
from launch import _command, evaluate, export, sample, train

ROOT = Path(__file__).parents[1]
TOY = "--config=configs/toy/dmd2.py"


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def refused(argv, capsys, command=train.train):
    """The one line that a refused command prints; it must exit with 2."""
    old, sys.argv = sys.argv, ["command", *argv]
    try:
        with pytest.raises(SystemExit) as exit:
            _command.main(command)
    finally:
        sys.argv = old
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("refused: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--workdir=DIR is needed"),
        (["--workdir=W"], "--config=FILE is needed"),
        (["--config=configs/toy/dmd3.py", "--workdir=W"], "did you mean 'configs/toy/dmd2.py'"),
        ([f"{TOY}:gan", "--workdir=W"], "has no variants"),
        (["--config=configs/toy/snoopi.py:nsa", "--workdir=W"], "did you mean 'nasa'"),
        ([TOY, "--workdir=W", "--config.stps=3"], "did you mean 'steps'"),
        ([TOY, "--workdir=W", "--config.method.gan_wieght=3"], "did you mean 'gan_weight'"),
        ([TOY, "--workdir=W", "--config.steps=many"], "expected int"),
        ([TOY, "--workdir=W", "--config.steps=-3"], "positive integer"),
        ([TOY, "--workdir=W", "--config.data.batch_size=100.5"], "expected int"),
        ([TOY, "--workdir=W", "--config.mesh.data=64"], "does not fit the 8 devices"),
        ([TOY, "--workdir=W", "--config.mesh.data=8", "--config.data.batch_size=12"], "not divisible by 8"),
        ([TOY, "--workdir=W", "--config.method.name=methods.distribution.dmd2:DMD"], "did you mean 'DMD2'"),
        ([TOY, "--workdir=W", "--config.method"], "needs a value"),
        ([TOY, "--workdir=W", "--config.method=3"], "is a group"),
        ([TOY, "--wrkdir=W"], "did you mean 'workdir'"),
        ([TOY, "--workdir=W", "--config.roles.teacher.init=nowhere"], "no such role, run or folder"),
        ([TOY, "--workdir=W", "--config.roles.student.optimizer.algorithm=adamm"], "expected adamw"),
        (["--config=configs/mnist/dmd2.py", "--workdir=W"], "data.path is empty"),
        (["--config=configs/mnist/dmd2.py", "--workdir=W", "--config.data.path=/nowhere"], "data.path=/nowhere: no such"),
    ],
)
def test_bad_input(argv, said, capsys, tmp_path):
    argv = [a.replace("--workdir=W", f"--workdir={tmp_path / 'run'}") for a in argv]
    assert said in refused(argv, capsys)
    assert not (tmp_path / "run").exists()


def test_truncated_data_file(capsys, tmp_path):
    for name in ("train-images", "t10k-images"):
        (tmp_path / f"{name}-idx3-ubyte").write_bytes(b"\x00\x00\x08\x03\x00\x00\x00\x09")
    for name in ("train-labels", "t10k-labels"):
        (tmp_path / f"{name}-idx1-ubyte").write_bytes(b"\x00\x00\x08\x01\x00\x00\x00\x09")
    said = refused(["--config=configs/mnist/dmd2.py", f"--workdir={tmp_path / 'run'}", f"--config.data.path={tmp_path}"], capsys)
    assert "ubyte: expected 17 bytes for shape (9,), found 8" in said
    assert not (tmp_path / "run").exists()


def test_overrides_keep_their_types():
    config = _command.load_config("configs/toy/dmd2.py")
    _command.override(config, "steps", "12")
    _command.override(config, "method.gan_weight", "1")
    _command.override(config, "method.student_times", "(1, 0.5)")
    _command.override(config, "method.taps", "2")
    _command.override(config, "tensorboard", "false")
    assert (config.steps, config.method.gan_weight, config.method.student_times) == (12, 1.0, (1.0, 0.5))
    assert (config.method.taps, config.tensorboard) == ((2,), False)
    with pytest.raises(Refused, match="expected tuple of int"):
        _command.override(config, "method.taps", "('a',)")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A digits run of a few steps: teacher, then DMD2."""
    workdir = tmp_path_factory.mktemp("digits") / "run"
    os.environ["JAXDISTILL_CACHE"] = str(workdir.parent / "cache")
    config = _command.load_config("configs/digits/dmd2.py")
    for c in (config, config.runs.teacher):
        c.steps, c.data.batch_size, c.mesh.data, c.mesh.fsdp, c.mesh.tensor, c.tensorboard = 2, 8, 1, 1, 1, False
        c.evaluation.samples = c.evaluation.batch = 100
    config.evaluation.teacher_steps, config.runs.teacher.evaluation.student_steps = (2, 1), (2,)
    config.method.critic_steps = 1
    loop.run(config, workdir, progress=False)
    return workdir


def test_evaluate_rewrites_the_report(digits, capsys):
    evaluate.evaluate([f"--workdir={digits}"])
    out = capsys.readouterr().out
    assert "frechet" in out
    assert "report.html" in out
    assert {"teacher", "student"} == {r["name"] for r in json.loads((digits / "report.json").read_text())["models"]}


def test_sample_writes_a_grid_and_arrays(digits, tmp_path):
    sample.sample([f"--workdir={digits}", "--n=20", "--seed=3", f"--out={tmp_path / 'grid.png'}"])
    saved = np.load(tmp_path / "grid.npz")
    assert saved["x"].shape == (20, 8, 8, 1)
    assert (tmp_path / "grid.png").stat().st_size > 0
    sample.sample([f"--workdir={digits}", "--n=20", "--seed=3", f"--out={tmp_path / 'again.png'}"])
    np.testing.assert_array_equal(np.load(tmp_path / "again.npz")["x"], saved["x"])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--n=0"], "--n=0"),
        (["--role=studnet"], "did you mean 'student'"),
        (["--steps=x"], "--steps"),
        (["--role=fake"], "--steps=N is needed: the run's own evaluation does not draw from fake"),
        (["--role=disc", "--steps=1"], "--role=disc: is no denoiser"),
        (["--out=grid.jpg"], "--out=grid.jpg: expected a name that ends in .png"),
    ],
)
def test_sample_refuses(digits, argv, said, capsys):
    assert said in refused([f"--workdir={digits}", *argv], capsys, sample.sample)


def test_export_loads_in_diffusers_and_gives_the_same_samples(digits, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    out = tmp_path / "export"
    export.export([f"--workdir={digits}", f"--out={out}"])
    trained = loop.load(digits)
    noise = np.random.default_rng(0).standard_normal((10, 8, 8, 1)).astype("f4")
    label = np.arange(10)
    sampled = trained.experiment.method.sample(trained.bound().student, jnp.asarray(noise), jnp.asarray(label), jax.random.key(0), 1)
    ours = np.asarray(sampled)
    model = diffusers.DiTTransformer2DModel.from_pretrained(out).eval()
    z = torch.from_numpy(noise.transpose(0, 3, 1, 2))
    with torch.no_grad():
        v = model(z, timestep=torch.full((10,), 1000.0), class_labels=torch.from_numpy(label)).sample
    theirs = (z - v).numpy().transpose(0, 2, 3, 1)
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()
    card = (out / "README.md").read_text()
    assert "DMD2" in card
    assert "NFE: 1" in card
    code = card.split("```python\n")[1].split("```")[0].replace('"."', repr(str(out)))
    scope = {}
    exec(code, scope)  # the recipe on the card runs as it stands
    assert scope["x"].shape == (10, 1, 8, 8)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(out, subfolder="scheduler")
    scheduler.set_timesteps(1)
    with torch.no_grad():
        v = model(z, timestep=scheduler.timesteps.expand(10), class_labels=torch.from_numpy(label)).sample
    stepped = scheduler.step(v, scheduler.timesteps[0], z).prev_sample.numpy().transpose(0, 2, 3, 1)
    assert np.abs(ours - stepped).max() <= 1e-4 * np.abs(theirs).max()
    assert interop.load(out)[0].config == trained.nets["student"].config


def test_full_weights_are_no_adapter(digits, tmp_path, capsys):
    said = refused([f"--workdir={digits}", f"--out={tmp_path / 'out'}", "--adapter"], capsys, export.export)
    assert "student has full weights, no adapter; export it without --adapter" in said
    assert not (tmp_path / "out").exists()


def test_a_run_that_has_not_finished_cannot_be_exported(tmp_path, capsys):
    said = refused([TOY, f"--workdir={tmp_path / 'none'}"], capsys, export.export)
    assert "no finished run" in said or "no such result" in said
    assert not (tmp_path / "none").exists()
