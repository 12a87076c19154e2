"""The commands as a user meets them: arguments, exit codes, one line for bad input, no partial
output.
"""

import importlib
import io
import json
import os
import pkgutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jaxdistill import interop
from jaxdistill.core.build import Role, experiment, spec
from jaxdistill.core.sharding import MeshShape
from jaxdistill.core.types import Refused
from jaxdistill.data import arrayrecord
from jaxdistill.data.base import Dataset
from jaxdistill.diffusion.denoiser import Denoiser, Velocity
from jaxdistill.methods.trajectory.flow_matching import FlowMatching
from jaxdistill.models.denoisers.dit import DiT
from jaxdistill.models.denoisers.mlp import MLP
from jaxdistill.models.denoisers.unet import UNet
from jaxdistill.run import loop
from launch import _command, evaluate, export, sample, train

ROOT = Path(__file__).parents[1]
TOY = "--config=configs/toy/dmd2.py"


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def refused(argv, capsys, command=train.train):
    """The one line that a refused command prints; it must exit with 2."""
    old = sys.argv
    sys.argv = ["command", *argv]
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
        (
            ["--config=configs/toy/scmm.py", "--workdir=W"],
            "did you mean 'configs/toy/scm.py'",
        ),
        ([f"{TOY}:gan", "--workdir=W"], "has no variants"),
        (
            ["--config=configs/toy/snoopi.py:nsa", "--workdir=W"],
            "did you mean 'nasa'",
        ),
        ([TOY, "--workdir=W", "--config.stps=3"], "did you mean 'steps'"),
        (
            [TOY, "--workdir=W", "--config.method.gan_wieght=3"],
            "did you mean 'gan_weight'",
        ),
        ([TOY, "--workdir=W", "--config.steps=many"], "expected int"),
        (
            [TOY, "--workdir=W", "--config.steps=-3"],
            "an integer of at least 1 and at most 10,000,000",
        ),
        ([TOY, "--workdir=W", "--config.data.batch_size=100.5"], "expected int"),
        (
            [TOY, "--workdir=W", "--config.mesh.data=64"],
            "does not fit the 8 devices",
        ),
        (
            [
                TOY,
                "--workdir=W",
                "--config.mesh.data=8",
                "--config.data.batch_size=12",
            ],
            "not divisible by 8",
        ),
        (
            [
                TOY,
                "--workdir=W",
                "--config.method.name=methods.distribution.dmd2:DMD",
            ],
            "did you mean 'DMD2'",
        ),
        ([TOY, "--workdir=W", "--config.method"], "needs a value"),
        ([TOY, "--workdir=W", "--config.method=3"], "is a group"),
        ([TOY, "--wrkdir=W"], "did you mean 'workdir'"),
        (
            [TOY, "--workdir=W", "--config.roles.teacher.init=nowhere"],
            "no such role, run or folder",
        ),
        (
            [
                TOY,
                "--workdir=W",
                "--config.roles.student.optimizer.algorithm=adamm",
            ],
            "did you mean 'adam'",
        ),
        (["--config=configs/mnist/dmd2.py", "--workdir=W"], "data.path is empty"),
        (
            [
                "--config=configs/mnist/dmd2.py",
                "--workdir=W",
                "--config.data.path=/nowhere",
            ],
            "data.path=/nowhere: no such",
        ),
    ],
)
def test_bad_input(argv, said, capsys, tmp_path):
    argv = [a.replace("--workdir=W", f"--workdir={tmp_path / 'run'}") for a in argv]
    assert said in refused(argv, capsys)
    assert not (tmp_path / "run").exists()


def test_truncated_data_file(capsys, tmp_path):
    for name in ("train-images", "t10k-images"):
        (tmp_path / f"{name}-idx3-ubyte").write_bytes(
            b"\x00\x00\x08\x03\x00\x00\x00\x09"
        )
    for name in ("train-labels", "t10k-labels"):
        (tmp_path / f"{name}-idx1-ubyte").write_bytes(
            b"\x00\x00\x08\x01\x00\x00\x00\x09"
        )
    said = refused(
        [
            "--config=configs/mnist/dmd2.py",
            f"--workdir={tmp_path / 'run'}",
            f"--config.data.path={tmp_path}",
        ],
        capsys,
    )
    assert "ubyte: expected 17 bytes for shape (9,), found 8" in said
    assert not (tmp_path / "run").exists()


def test_overrides_keep_their_types():
    config = _command.load_config("configs/toy/dmd2.py")
    _command.override(config, "steps", "12")
    _command.override(config, "method.gan_weight", "1")
    _command.override(config, "method.student_times", "(1, 0.5)")
    _command.override(config, "method.taps", "2")
    _command.override(config, "tensorboard", "false")
    assert config.steps == 12
    assert config.method.gan_weight == 1.0
    assert config.method.student_times == (1.0, 0.5)
    assert config.method.taps == (2,)
    assert config.tensorboard is False
    with pytest.raises(Refused, match="expected tuple of int"):
        _command.override(config, "method.taps", "('a',)")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A digits run of a few steps: teacher, then DMD2."""
    workdir = tmp_path_factory.mktemp("digits") / "run"
    os.environ["JAXDISTILL_CACHE"] = str(workdir.parent / "cache")
    config = _command.load_config("configs/digits/dmd2.py")
    for c in (config, config.runs.teacher):
        c.steps = 2
        c.data.batch_size = 8
        c.mesh.data = 1
        c.mesh.fsdp = 1
        c.mesh.tensor = 1
        c.tensorboard = False
        c.evaluation.samples = c.evaluation.batch = 100
    config.evaluation.teacher_steps = (2, 1)
    config.runs.teacher.evaluation.student_steps = (2,)
    config.method.critic_steps = 1
    loop.run(config, workdir, progress=False)
    return workdir


@pytest.mark.full
def test_evaluate_rewrites_the_report(digits, capsys):
    evaluate.evaluate([f"--workdir={digits}"])
    out = capsys.readouterr().out
    assert "frechet" in out
    assert "report.html" in out
    assert {"teacher", "student"} == {
        r["name"]
        for r in json.loads((digits / "report.json").read_text())["models"]
    }


def test_sample_writes_a_grid_and_arrays(digits, tmp_path):
    sample.sample(
        [
            f"--workdir={digits}",
            "--n=20",
            "--seed=3",
            f"--out={tmp_path / 'grid.png'}",
        ]
    )
    saved = np.load(tmp_path / "grid.npz")
    assert saved["x"].shape == (20, 8, 8, 1)
    assert (tmp_path / "grid.png").stat().st_size > 0
    sample.sample(
        [
            f"--workdir={digits}",
            "--n=20",
            "--seed=3",
            f"--out={tmp_path / 'again.png'}",
        ]
    )
    np.testing.assert_array_equal(np.load(tmp_path / "again.npz")["x"], saved["x"])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--n=0"], "--n=0"),
        (["--role=studnet"], "did you mean 'student'"),
        (["--steps=x"], "--steps"),
        (
            ["--role=fake"],
            "--steps=N is needed: the run's own evaluation does not draw from fake",
        ),
        (["--role=disc", "--steps=1"], "--role=disc: is no denoiser"),
        (["--out=grid.jpg"], "--out=grid.jpg: expected a name that ends in .png"),
    ],
)
def test_sample_refuses(digits, argv, said, capsys):
    assert said in refused([f"--workdir={digits}", *argv], capsys, sample.sample)


@pytest.mark.full
def test_export_loads_in_diffusers_and_gives_the_same_samples(digits, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    diffusers = pytest.importorskip(
        "diffusers", reason="diffusers is not installed"
    )
    out = tmp_path / "export"
    export.export([f"--workdir={digits}", f"--out={out}"])
    trained = loop.load(digits)
    noise = np.random.default_rng(0).standard_normal((10, 8, 8, 1)).astype("f4")
    label = np.arange(10)
    sampled = trained.experiment.method.sample(
        trained.bound().student,
        jnp.asarray(noise),
        jnp.asarray(label),
        jax.random.key(0),
        1,
    )
    ours = np.asarray(sampled)
    model = diffusers.DiTTransformer2DModel.from_pretrained(out).eval()
    z = torch.from_numpy(noise.transpose(0, 3, 1, 2))
    with torch.no_grad():
        v = model(
            z,
            timestep=torch.full((10,), 1000.0),
            class_labels=torch.from_numpy(label),
        ).sample
    theirs = (z - v).numpy().transpose(0, 2, 3, 1)
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()
    card = (out / "README.md").read_text()
    assert "DMD2" in card
    assert "NFE: 1" in card
    code = (
        card.split("```python\n")[1].split("```")[0].replace('"."', repr(str(out)))
    )
    scope = {}
    exec(code, scope)  # the recipe on the card runs as it stands
    assert scope["x"].shape == (10, 1, 8, 8)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(
        out, subfolder="scheduler"
    )
    scheduler.set_timesteps(1)
    with torch.no_grad():
        v = model(
            z,
            timestep=scheduler.timesteps.expand(10),
            class_labels=torch.from_numpy(label),
        ).sample
    stepped = (
        scheduler.step(v, scheduler.timesteps[0], z)
        .prev_sample.numpy()
        .transpose(0, 2, 3, 1)
    )
    assert np.abs(ours - stepped).max() <= 1e-4 * np.abs(theirs).max()
    assert interop.load(out)[0].config == trained.nets["student"].config


def test_full_weights_are_no_adapter(digits, tmp_path, capsys):
    said = refused(
        [f"--workdir={digits}", f"--out={tmp_path / 'out'}", "--adapter"],
        capsys,
        export.export,
    )
    assert (
        "student has full weights, no adapter; export it without --adapter" in said
    )
    assert not (tmp_path / "out").exists()


def test_a_run_that_has_not_finished_cannot_be_exported(tmp_path, capsys):
    said = refused([TOY, f"--workdir={tmp_path / 'none'}"], capsys, export.export)
    assert "has that run finished?" in said
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "out",
    [
        "RUN",
        "RUN/teacher",
        "RUN/stages/9",
        "RUN/..",
        "RUN/config.json",
        "/" + "x" * 300,
    ],
)
def test_an_export_leaves_runs_alone(digits, out, capsys, monkeypatch):
    """An export into a run's folder is refused before a weight is read."""
    monkeypatch.setattr(
        loop, "load", lambda *_, **__: pytest.fail("weights were read")
    )
    files = lambda: {
        path: path.read_bytes()
        for path in digits.parent.rglob("*")
        if path.is_file()
    }
    before = files()
    refused(
        [f"--workdir={digits}", f"--out={out.replace('RUN', str(digits))}"],
        capsys,
        export.export,
    )
    assert files() == before


def test_an_export_takes_the_place_of_an_export(digits):
    for _ in range(2):
        export.export([f"--workdir={digits}"])
    assert sorted(
        path.name for path in digits.iterdir() if path.name.startswith(".")
    ) in (
        [],
        [".lock"],
    )


def png(seed):
    out = io.BytesIO()
    Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    ).save(out, "PNG")
    return out.getvalue()


def image_folder(path):
    for label in "abc":
        (path / label).mkdir()
        for i in range(40):
            (path / label / f"{i}.png").write_bytes(png(i))


def parquet(path):
    for split, count in (("train", 9), ("test", 6)):
        images = pa.array(
            [{"bytes": png(i), "path": None} for i in range(count)],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        )
        pq.write_table(
            pa.table({"image": images, "label": [i % 3 for i in range(count)]}),
            path / f"{split}-00000.parquet",
        )


def idx(path):
    draw = np.random.default_rng(0)
    for split, count in (("train", 9), ("t10k", 6)):
        pixels = draw.integers(0, 256, (count, 8, 8), np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 3
        for kind, values in (("images-idx3", pixels), ("labels-idx1", labels)):
            head = (
                bytes([0, 0, 8, values.ndim])
                + np.array(values.shape, ">u4").tobytes()
            )
            (path / f"{split}-{kind}-ubyte").write_bytes(head + values.tobytes())


def records(path, null="null_cond", dtype=np.float32, **rest):
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        rows = (
            {
                "x": draw.integers(0, 255, (8, 8, 3)).astype(dtype),
                "cond": np.int32(i % 3),
                null: np.int32(3),
                **rest,
            }
            for i in range(8)
        )
        arrayrecord.write(path / f"{split}.arrayrecord", rows)


LATENTS = {"x": "normal 8 8 3", "cond": "integers 3", "null_cond": "constant 3"}
PICTURES = {  # data set -> (its files, its fields)
    "images:ImageFolder": (image_folder, dict(size=8, heldout=0.3)),
    "images:ParquetImages": (parquet, dict(size=8)),
    "idx:IDX": (idx, {}),
    "arrayrecord:ArrayRecords": (records, {}),
    "arrayrecord:WeightedRecords": (
        lambda path: records(path, worth=np.float32(1)),
        {},
    ),
    "arrayrecord:GroupedRecords": (lambda path: records(path, dtype=np.uint8), {}),
    "arrayrecord:LoadedRecords": (records, dict(heldout=0.5)),
    "digits:Digits": (None, {}),
    "synthetic:Synthetic": (None, dict(arrays=LATENTS)),
}
CLASSIFIED = ("digits:LabelledDigits",)  # for classifiers: no null condition
POINTS = ("mixtures:Mixture", "mixtures:Blurred", "rings:Rings")
TEXT_CONDITIONAL = ("shapes:Shapes", "arrayrecord:GroupedRecords of text")
# modules of texts
TEXTS = (
    "domains",
    "language",
    "logits",
    "ner",
    "patterns",
    "rationales",
    "text",
    "two_tokenizers",
)
# one of each kind in the first tier; tests/data has tests of every data set
QUICK = (
    "images:ImageFolder",
    "synthetic:Synthetic",
    "mixtures:Mixture",
    "shapes:Shapes",
)


def tiers(names):
    """Parameters of a test: those that are not QUICK are second tier."""
    return [
        pytest.param(n, marks=() if n in QUICK else pytest.mark.full) for n in names
    ]


def data_sets(module) -> set[str]:
    """The data sets that a module of jaxdistill.data defines: "file:Class"."""
    found = set()
    for name, value in vars(module).items():
        is_class = isinstance(value, type) and issubclass(value, Dataset)
        if is_class and value.__module__ == module.__name__:
            found.add(f"{module.__name__.rpartition('.')[2]}:{name}")
    return found


def test_every_data_set_is_of_a_kind_that_is_tried():
    """Every data set of pictures, latents or points has a test here."""
    known = {
        name.split(" ")[0]
        for name in (*PICTURES, *CLASSIFIED, *POINTS, *TEXT_CONDITIONAL)
    }
    bases = {"base:Dataset", "base:InMemory", "base:Records", "images:Images"}
    for found in pkgutil.iter_modules([str(ROOT / "jaxdistill" / "data")]):
        if found.name not in TEXTS:
            module = importlib.import_module(f"jaxdistill.data.{found.name}")
            assert data_sets(module) - bases <= known


def through(workdir, data, model, capsys, **evaluation):
    """Trains two steps on a data set, evaluates and samples. Returns the stored samples."""
    config = experiment(
        steps=2,
        mesh=MeshShape(data=1, fsdp=1),
        tensorboard=False,
        data=data,
        method=FlowMatching(solver="ddim"),
        roles=dict(
            student=Role(
                model=model, denoiser=Denoiser(param=Velocity(time_scale=1000.0))
            )
        ),
        evaluation=spec(samples=6, batch=6, **evaluation),
    )
    loop.run(config, workdir, progress=False)
    sample.sample(
        [f"--workdir={workdir}", "--n=6", f"--out={workdir / 'grid.png'}"]
    )
    capsys.readouterr()
    with np.load(workdir / "grid.npz") as saved:
        return dict(saved)


def run_the_card(workdir):
    """The samples `x` that the code of the export's card makes."""
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    export.export([f"--workdir={workdir}"])
    card = (workdir / "export" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    scope = {}
    exec(code.replace('"."', repr(str(workdir / "export"))), scope)
    return scope["x"]


@pytest.mark.full
@pytest.mark.parametrize("name", tiers(PICTURES))
def test_every_kind_of_pictures_trains_samples_and_leaves(name, tmp_path, capsys):
    write, fields = PICTURES[name]
    (tmp_path / "data").mkdir()
    if write:
        write(tmp_path / "data")
    data = spec(f"data.{name}", batch_size=4, path=str(tmp_path / "data"), **fields)
    coloured = name.partition(":")[0] in ("images", "arrayrecord", "synthetic")
    channels = 3 if coloured else 1
    classes = 10 if name == "digits:Digits" else 3
    model = DiT(
        size=8,
        patch=4,
        channels=channels,
        dim=16,
        depth=1,
        heads=2,
        classes=classes,
    )
    saved = through(
        tmp_path / "run",
        data,
        model,
        capsys,
        name="evals.images:ImageEval",
        features="pixels",
    )
    assert saved["x"].shape == (6, 8, 8, channels)
    assert saved["cond"].shape == (6,)
    assert run_the_card(tmp_path / "run").shape == (classes, channels, 8, 8)


@pytest.mark.full
@pytest.mark.parametrize("name", tiers(TEXT_CONDITIONAL))
def test_pictures_of_a_text_do_too(name, tmp_path, capsys):
    """The condition is a group of arrays, and is stored as such beside the samples."""
    fields = dict(dim=6) if name == "shapes:Shapes" else dict(path=str(tmp_path))
    if "path" in fields:
        draw = np.random.default_rng(0)
        shapes = {"x": (6, 6, 3), "cond/text": (3, 6), "null_cond/text": (3, 6)}
        mask = {"cond/mask": np.ones(3, bool), "null_cond/mask": np.ones(3, bool)}
        for split in ("train", "test"):
            samples = []
            for _ in range(6):
                drawn = {
                    k: draw.standard_normal(s, np.float32)
                    for k, s in shapes.items()
                }
                samples.append({**mask, **drawn})
            arrayrecord.write(tmp_path / f"{split}.arrayrecord", samples)
    model = UNet(
        size=6,
        channels=3,
        widths=(8, 8),
        layers=1,
        depths=(1, 0),
        mid_depth=1,
        heads=(2, 2),
        text_dim=6,
        groups=4,
    )
    data = spec(f"data.{name.split(' ')[0]}", batch_size=4, **fields)
    saved = through(
        tmp_path / "run",
        data,
        model,
        capsys,
        name="evals.images:ImageEval",
        features="pixels",
    )
    assert saved["x"].shape == (6, 6, 6, 3)
    assert saved["cond/text"].shape == (6, 3, 6)
    assert run_the_card(tmp_path / "run").shape == (2, 3, 6, 6)


@pytest.mark.parametrize("name", tiers(POINTS))
def test_points_do_too_as_far_as_pytorch_has_a_class(name, tmp_path, capsys):
    model = MLP(dim=2, width=8, depth=1, classes=8)
    data = spec(f"data.{name}", batch_size=4)
    saved = through(
        tmp_path / "run", data, model, capsys, name="evals.points:PointEval"
    )
    assert saved["x"].shape == (6, 2)
    assert saved["cond"].shape == (6,)
    said = refused([f"--workdir={tmp_path / 'run'}"], capsys, export.export)
    assert "no PyTorch class for MLP" in said
    assert not (tmp_path / "run" / "export").exists()
