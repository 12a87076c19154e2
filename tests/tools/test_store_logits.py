"""The store of a teacher's most likely tokens: made once, complete or refused, and equivalent to
the teacher.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import interop
from jaxdistill.core import build
from jaxdistill.core.net import make_net
from jaxdistill.core.step import bind
from jaxdistill.core.types import Ctx, Refused
from jaxdistill.data.language import Markov
from jaxdistill.data.logits import StoredLogits
from jaxdistill.evals.text import TextEval
from jaxdistill.methods.language.kd import KD, StoredKD
from jaxdistill.models.language.lm import LM
from jaxdistill.objectives.divergence import ForwardKL, JensenShannon
from jaxdistill.run import loop
from launch import _command
from tools import store_logits

ROOT = Path(__file__).parents[2]
STUDENT = make_net(LM(vocab=259, dim=8, mlp=8, heads=2, depth=1))
CONFIG = """
from jaxdistill.core.build import Role, experiment, spec
from jaxdistill.core.sharding import MeshShape

def get_config():
    student = Role(model=spec("models.language.lm:LM", vocab=259, dim=8, mlp=8, heads=2, depth=1))
    return experiment(
        steps=3,
        tensorboard=False,
        mesh=MeshShape(data=1, fsdp=1),
        data=spec("data.text:Text", length=12, batch_size=4),
        method=spec("methods.language.sft:SFT"),
        roles=dict(student=student),
    )
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with text, a config that reads it, and a teacher as a PyTorch folder."""
    folder = tmp_path_factory.mktemp("store")
    letters = np.random.default_rng(0).integers(97, 105, 700, np.uint8)
    (folder / "text.txt").write_bytes(bytes(letters))
    (folder / "config.py").write_text(CONFIG)
    teacher = make_net(
        config := LM(vocab=259, dim=12, mlp=16, heads=2, depth=1), config=config
    )
    rng = np.random.default_rng(1)
    weights = jax.tree.map(
        lambda s: jnp.asarray(0.5 * rng.standard_normal(s.shape), s.dtype),
        teacher.shapes,
    )
    interop.save(folder / "teacher", teacher, weights)
    return folder


def arguments(place, out, /, **changes):
    given = {
        "config": place / "config.py",
        "config.data.path": place / "text.txt",
        "teacher": place / "teacher",
        "out": out,
        "top_k": 5,
    }
    return [
        f"--{k}={v}" for k, v in {**given, "file_batches": 2, **changes}.items()
    ]


@pytest.fixture(scope="module")
def whole(place):
    """A complete store in float32, made without interruption."""
    store_logits.store(arguments(place, place / "whole", dtype="float32"))
    return place / "whole"


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_holds_every_row_once_beside_the_teachers_law(place, whole):
    config = _command.load_config(str(place / "config.py"))
    config.data.path = str(place / "text.txt")
    text = build.build(config.data)
    data = StoredLogits(path=str(whole), batch_size=4)
    assert (
        type(data.texts) is type(text)
        and data.texts.tokenizer_files() == text.tokenizer_files() != {}
    )
    net, params = interop.load(place / "teacher")
    for split in ("train", "test"):
        rows = text.examples(split)
        stored = data.examples(split)
        assert len(stored) == len(rows) > 4
        np.testing.assert_array_equal(
            [r["tokens"] for r in stored], [r["tokens"] for r in rows]
        )
        np.testing.assert_array_equal(
            [r["mask"] for r in stored], [r["mask"] for r in rows]
        )
        tokens = np.stack([row["tokens"] for row in rows])
        law = np.asarray(jax.nn.log_softmax(jax.jit(net.apply)(params, tokens)))
        ids, log_probs, log_tail = (
            np.stack([r[f"teacher_{k}"] for r in stored])
            for k in ("ids", "log_probs", "log_tail")
        )
        np.testing.assert_array_equal(
            np.sort(ids), np.sort(np.argsort(-law)[..., :5])
        )
        np.testing.assert_allclose(
            log_probs, np.take_along_axis(law, ids, -1), atol=1e-5
        )
        np.testing.assert_allclose(
            np.exp(log_probs).sum(-1) + np.exp(log_tail), 1.0, rtol=1e-5
        )
    assert data.store["vocab"] == 259 and data.spec()["teacher_ids"].shape == (
        4,
        12,
        5,
    )


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "hard_weight"), [(ForwardKL(), 0.0), (JensenShannon(), 0.5)]
)
@pytest.mark.parametrize(
    ("dtype", "bound"), [("float32", 1e-5), ("float16", 2.0**-11)]
)
def test_learning_from_it_is_learning_from_the_teacher(
    place, whole, dtype, bound, kind, hard_weight
):
    """Value and gradient of KD with the same top_k; in float16 log-probabilities are off by 2^-11
    of themselves at most.
    """
    out = whole if dtype == "float32" else place / dtype
    if not out.exists():
        store_logits.store(arguments(place, out, dtype=dtype, splits="train"))
    batch = next(StoredLogits(path=str(out), batch_size=8).loader())
    teacher, weights = interop.load(place / "teacher")
    student = STUDENT.init(jax.random.key(2))

    def run(method, nets, params):
        bound = lambda p: method.loss(
            bind(nets, {**params, "student": p}),
            Ctx(batch, jax.random.key(0), 0, {}),
        )
        return jax.jit(lambda p: (jax.grad(lambda p: bound(p).loss)(p), bound(p)))(
            student
        )

    common = dict(divergence=kind, hard_weight=hard_weight)
    got_grad, got = run(StoredKD(**common), {"student": STUDENT}, {})
    grad, live = run(
        KD(top_k=5, **common),
        {"student": STUDENT, "teacher": teacher},
        {"teacher": weights},
    )
    assert got.count == live.count and got.metrics["divergence"] >= 0
    scale = bound * 10 * float(live.count)  # log-probabilities reach -10
    np.testing.assert_allclose(got.loss, live.loss, atol=scale)
    for a, b in zip(jax.tree.leaves(got_grad), jax.tree.leaves(grad)):
        np.testing.assert_allclose(
            a, b, atol=scale * max(1.0, float(jnp.abs(b).max()))
        )


def test_rounded_laws_are_laws(place, whole):
    """No divergence is negative, even where k + 1 probabilities rounded to bfloat16 do not sum to
    1.
    """
    data = StoredLogits(path=str(whole), batch_size=16)
    batch = {k: jnp.asarray(v) for k, v in next(data.loader()).items()}
    ids, *logs = (batch[f"teacher_{k}"] for k in ("ids", "log_probs", "log_tail"))
    log_probs, log_tail = (x.astype(jnp.bfloat16) for x in logs)
    # a student that is the teacher, to rounding
    near = jnp.log((jnp.exp(logs[1]) / 254)[..., None]) * jnp.ones(259)
    near = jnp.put_along_axis(near, ids, logs[0], -1, inplace=False)
    each = StoredKD().soft((ids, log_probs, log_tail), near)
    assert (
        jnp.exp(log_probs.astype(jnp.float32)).sum(-1).std() > 0
        and (each >= -1e-6).all()
        and (each < 1e-2).all()
    )


def test_a_killed_call_goes_on_without_making_anything_twice(
    place, whole, tmp_path, capsys
):
    out = tmp_path / "killed"
    argv = arguments(place, tmp_path / "killed", dtype="float32")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, *argv],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    until = time.time() + 120
    while (
        not (out / "train-00002.arrayrecord").exists()
        and time.time() < until
        and child.poll() is None
    ):
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    made = {f.name: f.stat().st_mtime_ns for f in out.glob("*.arrayrecord")}
    assert 3 <= len(made) < len(contents(whole)) - 1
    with pytest.raises(
        Refused, match=r"\d of 8 train files; tools/store_logits.py goes on"
    ):
        StoredLogits(path=str(out)).loader()
    (out / ".train-00005.arrayrecord.99").write_bytes(b"half")
    store_logits.store(argv)
    assert all(
        (out / name).stat().st_mtime_ns == before for name, before in made.items()
    )
    assert contents(out).keys() == contents(whole).keys()
    for split in ("train", "test"):
        again, expected = (
            StoredLogits(path=str(f)).examples(split) for f in (out, whole)
        )
        np.testing.assert_array_equal(
            [r["tokens"] for r in again], [r["tokens"] for r in expected]
        )
        np.testing.assert_allclose(
            [r["teacher_log_probs"] for r in again],
            [r["teacher_log_probs"] for r in expected],
            atol=1e-5,
        )
    said = capsys.readouterr().out
    assert "a second" in said
    before = contents(out)
    store_logits.store(argv)
    assert contents(out) == before and " 0 tokens in" in capsys.readouterr().out


SLOW = """
import sys, time
from jaxdistill.data import arrayrecord
from tools import store_logits
fast = arrayrecord.write
def slowly(file, rows):
    return fast(file, (time.sleep(0.02) or row for row in rows))
arrayrecord.write = slowly
store_logits.store(sys.argv[1:])
"""


def test_sets_without_end(tmp_path):
    argv = [
        "--config=configs/toy/kd.py",
        f"--out={tmp_path / 'out'}",
        "--top_k=4",
        "--rows=70",
        "--test_rows=9",
        "--file_batches=1",
    ]
    more = [
        "--config.data.batch_size=32",
        "--config.mesh.fsdp=1",
        "--temperature=2",
    ]
    store_logits.store([*argv, *more])
    data = StoredLogits(path=str(tmp_path / "out"))
    exact = build.build(_command.load_config("configs/toy/kd.py").data)
    rows = np.stack([r["tokens"] for r in data.examples("train")])
    np.testing.assert_array_equal(
        rows,
        np.concatenate([exact.batch(i, slice(None))["tokens"] for i in range(3)])[
            :70
        ],
    )
    np.testing.assert_array_equal(
        np.stack([r["tokens"] for r in data.examples("test")]),
        exact.evaluation(9)["tokens"],
    )
    law = jax.nn.log_softmax(exact.net().apply({}, rows[:1]) / 2)
    np.testing.assert_allclose(
        data.examples("train")[0]["teacher_log_probs"][:, 0],
        law.max(-1)[0],
        rtol=2.0**-10,
    )


def test_a_run_that_learns_from_it(place, whole, tmp_path):
    config = _command.load_config(str(place / "config.py"))
    with config.unlocked():
        config.data = build.plain(StoredLogits(path=str(whole), batch_size=4))
        config.method = build.plain(StoredKD(hard_weight=0.1))
        config.evaluation = build.plain(
            TextEval(samples=4, batch=4, prompt_length=2)
        )
    report = loop.run(config, tmp_path / "run", progress=False)
    assert [r["name"] for r in report["models"]] == ["student"] and report[
        "models"
    ][0]["perplexity"] > 1
    for change, said in [
        (
            {"temperature": 2.0},
            "of 259 tokens at temperature 1.0, "
            "expected the student's 259 at method.temperature=2.0",
        ),
        (
            {"top_k": 3},
            "it has no effect on stored logits, whose tokens the file fixes",
        ),
    ]:
        other = config.copy_and_resolve_references()
        other.method.update(change)
        with pytest.raises(Refused, match=said):
            loop.run(other, tmp_path / "other", progress=False)
    other = config.copy_and_resolve_references()
    other.roles.student.model.vocab = 300
    with pytest.raises(Refused, match="expected the student's 300"):
        loop.run(other, tmp_path / "other", progress=False)
    with other.unlocked():
        other.data = build.plain(Markov())
    with pytest.raises(Refused, match=r"config.data: StoredKD needs 'teacher_ids'"):
        loop.run(other, tmp_path / "other", progress=False)
    assert not (tmp_path / "other").exists()


REFUSALS = [
    ({"out": ""}, "--out=FOLDER is needed"),
    ({"config": ""}, "needs --config=FILE"),
    ({"teacher": ""}, "--teacher=DIR is needed"),
    ({"teacher": "nowhere"}, "no such role, run or folder"),
    ({"top_k": 0}, "--top_k=0"),
    ({"top_k": 259}, "k=259: expected 1 to 258"),
    ({"dtype": "float15"}, "did you mean 'float16'"),
    ({"temperature": "hot"}, "--temperature=hot"),
    ({"temperature": "nan"}, "--temperature=nan: expected a number above 0"),
    ({"temperature": "inf"}, "--temperature=inf"),
    ({"splits": ""}, "--splits=''"),
    ({"file_batches": 0}, "--file_batches=0"),
    ({"out": "BELOW"}, "text.txt is no folder"),
    (
        {"out": "gs://bucket/store"},
        "gs:// is not supported, expected a folder of this machine",
    ),
    ({"teacher": "PLACE"}, "store"),
    ({"splits": "train,tests"}, "did you mean 'test'"),
    ({"rows": "many"}, "--rows=many"),
    ({"config.data.path": "/nowhere"}, "data.path=/nowhere: no such"),
    (
        {"out": "WHOLE", "dtype": "float32", "top_k": 6},
        "holds another store: top_k is 5 there, 6 here",
    ),
    (
        {"out": "WHOLE", "dtype": "float32", "config.data.length": 13},
        "data.length is 12 there, 13 here",
    ),
    ({"out": "PLACE"}, "not empty and no store"),
    ({"out": "FILE"}, "is a file"),
    ({"tepmerature": 1}, "did you mean 'temperature'"),
]


@pytest.mark.parametrize(
    ("changes", "said"), REFUSALS, ids=[said for _, said in REFUSALS]
)
def test_bad_input_is_one_line(
    place, whole, tmp_path, capsys, monkeypatch, changes, said
):
    before = contents(whole)
    names = {
        "WHOLE": whole,
        "PLACE": place,
        "FILE": place / "text.txt",
        "BELOW": place / "text.txt/store",
    }
    changes = {k: names.get(v, v) for k, v in changes.items()}
    monkeypatch.setattr(
        sys,
        "argv",
        ["store_logits", *arguments(place, tmp_path / "out", **changes)],
    )
    with pytest.raises(SystemExit) as exit:
        _command.main(store_logits.store)
    err = capsys.readouterr().err
    assert (
        exit.value.code == 2
        and err.startswith("refused: ")
        and err.count("\n") == 1
        and said in err
    )
    assert not (tmp_path / "out").exists() and contents(whole) == before


def test_sets_without_end_say_so(tmp_path):
    with pytest.raises(Refused, match="Markov makes samples without end"):
        store_logits.store(
            [
                "--config=configs/toy/kd.py",
                f"--out={tmp_path / 'out'}",
                "--config.mesh.fsdp=1",
            ]
        )


def test_pictures_are_refused(tmp_path):
    with pytest.raises(Refused, match=r"expected text \(tokens and mask\)"):
        store_logits.store(
            [
                "--config=configs/toy/dmd2.py",
                f"--out={tmp_path / 'out'}",
                "--rows=8",
                "--test_rows=8",
            ]
        )


@pytest.mark.parametrize(
    ("text", "said"), [(None, "no store.json"), ("{", "store.json: not JSON")]
)
def test_other_folders_are_no_stores(tmp_path, text, said):
    if text is not None:
        (tmp_path / "store.json").write_text(text)
    with pytest.raises(Refused, match=said):
        StoredLogits(path=str(tmp_path)).loader()
