"""Runs whose roles share one base: whole leaves, adapters on adapters, sums of several runs."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxdistill import interop
from jaxdistill.core.build import Lora, Role, experiment
from jaxdistill.core.lora import Part, combined
from jaxdistill.core.net import paths
from jaxdistill.core.optim import Optimizer
from jaxdistill.core.sharding import MeshShape
from jaxdistill.core.types import Refused
from jaxdistill.data.digits import Digits
from jaxdistill.data.mixtures import Mixture
from jaxdistill.diffusion.denoiser import Denoiser, Velocity
from jaxdistill.evals.points import PointEval
from jaxdistill.interop.safetensors import write_json
from jaxdistill.methods.distribution.diff_instruct import DiffInstruct
from jaxdistill.models.denoisers.dit import DiT
from jaxdistill.models.denoisers.mlp import MLP
from jaxdistill.run import adapters, loop
from jaxdistill.run.checkpoint import load_params, save_params
from jaxdistill.run.experiment import Experiment
from jaxdistill.run.export import needed_roles
from launch import export, sample
from launch._command import shares

NET = MLP(width=16, depth=1)
TEACHER = Role(model=NET, denoiser=Denoiser(), init="random")
ON = dict(optimizer=Optimizer(lr=1e-2))


def get_config(seed=0, teacher=TEACHER, **roles):
    """Two steps; the student has adapters and whole biases, the fake score adapts the student."""
    student = Role(lora=Lora(rank=2, full=r".*bias"), **ON)
    fake = Role(lora=Lora(rank=1, base="student"), **ON)
    return experiment(
        seed=seed,
        steps=2,
        tensorboard=False,
        mesh=MeshShape(data=1, fsdp=1, tensor=1),
        data=Mixture(batch_size=16),
        method=DiffInstruct(),
        evaluation=PointEval(samples=50, batch=50, teacher_steps=(2, 1)),
        roles=dict(teacher=teacher, student=student, fake=fake) | roles,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "a"
    loop.run(get_config(), workdir, progress=False)
    return workdir


def drawn(workdir, *argv):
    out = workdir.parent / "drawn.png"
    sample.sample([f"--workdir={workdir}", "--n=20", f"--out={out}", *argv])
    return np.load(out.with_suffix(".npz"))["x"]


def test_a_base_is_stored_once_and_stays(run):
    trained = loop.load(run)
    teacher = paths(trained.params["teacher"])
    start = paths(trained.experiment.warm_starts()["teacher"])
    jax.tree.map(np.testing.assert_array_equal, teacher, start)
    stored = trained.params["student"]
    assert {p for p in stored if p.endswith("bias")} == {
        p for p in teacher if p.endswith("bias")
    }
    assert any(
        np.abs(stored[p] - teacher[p]).max() > 1e-3 for p in stored if "bias" in p
    )
    assert all(
        np.asarray(pair["b"]).any() for pair in trained.params["fake"].values()
    )
    experiment = trained.experiment
    assert experiment.with_bases(["fake"]) == {"teacher", "student", "fake"}
    assert needed_roles(experiment) == {"teacher", "student"}
    assert needed_roles(experiment, adapter=True) == {"student"}


def test_a_weighted_sum_is_sampled(run):
    other = run.parent / "b"
    shutil.copytree(run, other)
    plain = drawn(run)
    np.testing.assert_array_equal(drawn(run, "--adapters=."), plain)
    # the same adapters, in halves
    halves = drawn(run, f"--adapters=.:0.5,{other}:0.5")
    np.testing.assert_allclose(halves, plain, rtol=1e-4, atol=1e-5)
    base = drawn(run, "--adapters=.:0")
    np.testing.assert_array_equal(base, drawn(run, f"--adapters={run}:0,{other}:0"))
    assert np.abs(base - plain).max() > 1e-3
    twice = drawn(run, f"--adapters={other}")
    assert np.abs(twice - plain).max() > 1e-3


def test_the_weights_of_a_sum(run, tmp_path):
    """The student is a plain network then; the fake score, which was on it, is left out."""
    shutil.copytree(run, tmp_path / "b")
    trained = loop.load(run)
    found = adapters.summed(trained, {"student"}, {tmp_path / "b": -0.5})
    part = Part(trained.params["student"], trained.nets["student"].scale)
    parts = [part, part._replace(weight=-0.5)]
    expected = combined(trained.params["teacher"], parts)
    jax.tree.map(np.testing.assert_array_equal, found.params["student"], expected)
    assert found.nets["student"].depth == 0
    assert found.params.keys() == {"teacher", "student"}


def other_run(config, folder):
    """A finished run of a config as far as its files say."""
    write_json(folder / "config.json", json.loads(config.to_json()))
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            dict(seed=1),
            r"student is on teacher \(init 'random'\) of .*other, expected",
        ),
        (
            dict(student=Role()),
            "student has full weights, expected a role with `lora`",
        ),
        (
            dict(
                student=Role(
                    lora=Lora(rank=2), model=MLP(width=16, depth=1, classes=3)
                )
            ),
            "student has label_embed/embedding, which student and its base lack",
        ),
        (
            dict(student=Role(lora=Lora(rank=2, base="fake")), fake=Role()),
            "student is on fake",
        ),
    ],
)
def test_adapters_of_another_base_are_refused(run, change, said, tmp_path):
    other = other_run(get_config(**change), tmp_path / "other")
    with pytest.raises(Refused, match=rf"^--adapters=\S*other: {said}"):
        adapters.check(Experiment(get_config(), run), {"student"}, {other: 1.0})


def test_a_role_with_full_weights_has_no_adapters(run):
    with pytest.raises(Refused, match="--adapters: teacher has full weights"):
        drawn(run, "--role=teacher", "--steps=1", "--adapters=.")


def test_bases_are_known_by_their_sources(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    one = Experiment(
        get_config(teacher=Role(model=NET, init=str(folder))), tmp_path / "a"
    )
    same = Experiment(
        get_config(seed=3, teacher=Role(model=NET, init=f"{folder}/../base")),
        tmp_path / "b",
    )
    identity = adapters.identity
    assert identity(one, "teacher") == identity(same, "teacher")
    assert identity(one, "student") != identity(same, "student")
    random = Experiment(get_config(), tmp_path / "a")
    assert identity(random, "teacher") != identity(one, "teacher")


def test_shares_are_read():
    own = Path("own")
    read = lambda text: shares({"adapters": text}, "adapters", own)
    assert read("") == {}
    assert read(".:0.25,a/b,c:-2") == {own: 0.25, Path("a/b"): 1.0, Path("c"): -2.0}
    for text in ("a:x", "a:nan", ":1", "a,a:2", "a:inf", "s3://bucket:1"):
        with pytest.raises(Refused, match=r"^--adapters="):
            read(text)


def test_a_sum_leaves_for_pytorch(tmp_path):
    """The exported weights are the sum's, and the card says of what."""
    net = DiT(size=8, patch=4, channels=1, dim=16, depth=1, heads=2)
    teacher = Role(
        model=net,
        denoiser=Denoiser(param=Velocity(time_scale=1000.0)),
        init="random",
    )
    adapter = Role(lora=Lora(rank=2, full="norm_out/.*|.*to_out/bias"))
    config = experiment(
        data=Digits(),
        method=DiffInstruct(),
        roles=dict(teacher=teacher, student=adapter, fake=adapter),
        mesh=MeshShape(data=1, fsdp=1, tensor=1),
    )
    folders = [tmp_path / name for name in ("a", "b")]
    weights = []
    for i, folder in enumerate(folders):
        built = Experiment(config, folder)
        draw = np.random.default_rng(i).standard_normal
        found = jax.tree.map(
            lambda s: draw(s.shape, np.float32), built.nets["student"].shapes
        )
        weights.append(found)
        save_params(folder / "stages" / "0", {"student": found, "fake": found})
        write_json(folder / "config.json", json.loads(config.to_json()))
        report = dict(
            config=json.loads(config.to_json()),
            method=config.method.name,
            steps=1,
            seconds=1.0,
            models=[{"name": "student", "nfe": 1}],
            claim={},
        )
        write_json(folder / "report.json", report)
    export.export([f"--workdir={folders[0]}", f"--adapters=.:0.25,{folders[1]}:2"])
    _, loaded = interop.load(folders[0] / "export")
    base = built.warm_starts()["teacher"]
    parts = [Part(weights[0], 1.0, 0.25), Part(weights[1], 1.0, 2.0)]
    expected = combined(base, parts)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        loaded,
        expected,
    )
    card = (folders[0] / "export" / "README.md").read_text()
    assert (
        f"weighted sum of adapters: `{folders[0]}` 0.25, `{folders[1]}` 2." in card
    )
    with pytest.raises(Refused, match="expected no --adapter"):
        export.export([f"--workdir={folders[0]}", "--adapters=.", "--adapter"])


def test_a_second_time_on_a_shared_base(tmp_path):
    """The role's own model has one leaf more than its base; nothing else is trained."""
    own = MLP(width=16, depth=1, second_time=True)
    student = Role(model=own, lora=Lora(rank=1, targets=""), **ON)
    built = Experiment(get_config(student=student), tmp_path)
    net = built.nets["student"]
    assert net.shapes.keys() == {"gap_embed/bias", "gap_embed/kernel"}
    assert net.config == own
    assert built.described("student")[0] == own
    assert built.described("fake")[0] == own
    loop.run(built.config, tmp_path / "run", progress=False)
    stored = load_params(tmp_path / "run" / "stages" / "0", {"student": net.shapes})
    assert stored["student"].keys() == net.shapes.keys()


@pytest.mark.parametrize(
    ("student", "fake", "said"),
    [
        (
            Role(lora=Lora(rank=1, base="fake")),
            Role(lora=Lora(full=".*", base="student")),
            r"config\.roles\.student\.lora\.base='fake': a circle, student <- fake <- student",
        ),
        (
            Role(lora=Lora(rank=1, full=".*kernel")),
            Role(),
            r"config\.roles\.student\.lora\.full='\.\*kernel': .* has adapters too",
        ),
        (
            Role(lora=Lora(rank=1), model=MLP(width=8, depth=1)),
            Role(),
            r"config\.roles\.student\.lora\.full='': .* is \[8\] in the role and \[16\] in",
        ),
    ],
)
def test_roles_that_do_not_fit_are_refused(student, fake, said, tmp_path):
    built = Experiment(get_config(student=student, fake=fake), tmp_path)
    with pytest.raises(Refused, match=said):
        _ = built.nets
