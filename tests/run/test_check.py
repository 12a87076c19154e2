"""What is refused before a run begins: one line that names the key and both sides, and nothing is
written.
"""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxdistill.core import build
from jaxdistill.core.build import Role, experiment, spec
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.core.types import Refused
from jaxdistill.data.digits import Digits
from jaxdistill.data.mixtures import Mixture
from jaxdistill.diffusion.denoiser import Denoiser
from jaxdistill.methods.trajectory.flow_matching import FlowMatching
from jaxdistill.models.denoisers.dit import DiT
from jaxdistill.run import loop
from jaxdistill.run.check import check, rows
from jaxdistill.run.experiment import Experiment

TINY = importlib.util.spec_from_file_location(
    "tiny", Path(__file__).with_name("tiny.py")
)
tiny = importlib.util.module_from_spec(TINY)
TINY.loader.exec_module(tiny)


def changed(config, changes):
    """`config` with other values at dotted paths."""
    plain = json.loads(config.to_json())
    for path, value in changes.items():
        *groups, last = path.split(".")
        node = plain
        for group in groups:
            node = node[group]
        node[last] = value
    return ConfigDict(plain).lock()


MLP = {"name": "models.denoisers.mlp:MLP", "width": 16, "depth": 1}
CASES = {
    "a mesh axis": (
        {"roles.student.rules.mlp": "ghost"},
        r"config\.roles\.student\.rules\.mlp='ghost': no mesh axis",
    ),
    "a size": (
        {"roles.student.model.width": 0},
        r"config\.roles\.student\.model\.width=0: expected an integer of at least 1",
    ),
    "a factor of no weight": (
        {"roles.student.optimizer.rates": [["upp.*", 0.1]]},
        r"config\.roles\.student\.optimizer\.rates\[0\]\[0\]='upp\.\*' matches no weight: its",
    ),
    "a factor of no number": (
        {"roles.student.optimizer.rates": [["up.*", "slow"]]},
        r"config\.roles\.student\.optimizer\.rates=.*'slow'.*: expected a list, each",
    ),
    "a type": (
        {"data.batch_size": "many"},
        r"config\.data\.batch_size='many': expected an integer",
    ),
    "a number": (
        {"method.gan_weight": float("nan")},
        r"config\.method\.gan_weight=nan: expected a finite number",
    ),
    "a class": (
        {"method.name": "methods.distribution.dmd2:DMD3"},
        r"config\.method\.name=.*did you mean 'DMD2'",
    ),
    "no class": (
        {"data.name": ""},
        r"config\.data\.name='': expected the name of a class",
    ),
    "another kind": ({"data.name": "models.denoisers.mlp:MLP"}, r"config\.data"),
    "dtype": (
        {"roles.student.model.dtype": "float23"},
        r"config\.roles\.student\.model\.dtype='float23'.*'float32'",
    ),
    "starts from itself": (
        {"roles.student.init": "student"},
        r"config\.roles\.student\.init: student <- student",
    ),
    "starts in a circle": (
        {"roles.student.init": "fake", "roles.fake.init": "student"},
        r"config\.roles\.(student|fake)\.init: .* <- .* <- ",
    ),
    "no source": (
        {"roles.student.init": "/no/such/folder"},
        r"config\.roles\.student\.init='/no/such/folder': no such role",
    ),
    "a source of too long a name": (
        {"roles.student.init": "x" * 300},
        r"config\.roles\.student\.init='xxx.*no such role",
    ),
    "no inner run": (
        {"roles.student.init": "@teacher"},
        r"config\.roles\.student\.init='@teacher': config\.runs has no 'teacher'",
    ),
    "no base": (
        {"roles.fake.lora.rank": 2, "roles.fake.lora.base": "tutor"},
        r"config\.roles\.fake\.lora\.base='tutor': no such role",
    ),
    "itself as base": (
        {"roles.fake.lora.rank": 2, "roles.fake.lora.base": "fake"},
        r"config\.roles\.fake\.lora\.base='fake'",
    ),
    "a frozen role without weights": (
        {
            "roles.teacher": {
                "name": "core.build:Role",
                "model": MLP,
                "denoiser": {"name": "diffusion.denoiser:Denoiser"},
            }
        },
        r"config\.roles\.teacher\.init is empty",
    ),
    "a metric": (
        {"claim.metric": "enregy"},
        r"config\.claim\.metric='enregy': no metric of student@1; did you mean 'energy'",
    ),
    "a row": (
        {"claim.baseline": "teacher@7"},
        r"config\.claim\.baseline='teacher@7': no such row of the evaluation",
    ),
    "a direction": (
        {"claim.better": "smaller"},
        r"config\.claim\.better='smaller'",
    ),
    "a ratio": ({"claim.ratio": -1.0}, r"config\.claim\.ratio=-1\.0"),
    "a claim without evaluation": (
        {"evaluation": {}},
        r"config\.claim: nothing is evaluated",
    ),
    "an evaluation of other data": (
        {"evaluation": {"name": "evals.text:TextEval"}, "claim": {}},
        r"config\.evaluation.*needs `tokens`",
    ),
    "a solver": (
        {"evaluation.solver": "dopri"},
        r"config\.evaluation\.solver='dopri'",
    ),
    "steps": (
        {"steps": 10**12},
        r"config\.steps=1000000000000: expected an integer",
    ),
    "a missing part": ({"mesh": {}}, r"config\.mesh"),
    "a group": ({"roles": 3}, r"config\.roles=3: expected a group"),
}


@pytest.mark.parametrize("name", CASES)
def test_refuses(name, tmp_path):
    changes, text = CASES[name]
    with pytest.raises(Refused, match=text) as refusal:
        loop.run(
            changed(tiny.get_config(), changes), tmp_path / "run", progress=False
        )
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_a_network_of_other_samples_names_both_sides(tmp_path):
    with pytest.raises(
        Refused,
        match=r"config\.roles\.(student|fake) \(MLP\).*config\.data \(.*x float32\[2\]\)",
    ):
        check(
            Experiment(
                changed(
                    tiny.get_config(),
                    {"roles.student.model.dim": 3, "roles.fake.model.dim": 3},
                ),
                tmp_path,
            )
        )


def labelled(classes: dict, count: int = 3):
    """Flow matching of labelled points, every label dropped; role -> the classes of its network."""
    role = lambda n: Role(
        model=spec("models.denoisers.mlp:MLP", width=8, depth=1, classes=n),
        denoiser=Denoiser(),
        ema=Ema(rate=0.1),
        optimizer=Optimizer(lr=0.3),
    )
    method = FlowMatching(label_dropout=1.0)
    data = Mixture(modes=count, batch_size=8)
    return experiment(
        steps=4,
        tensorboard=False,
        data=data,
        method=method,
        roles={k: role(n) for k, n in classes.items()},
    )


@pytest.mark.full
def test_the_null_label_is_the_networks(tmp_path):
    """20 classes in the network, 3 in the data, all labels dropped: row 20 moves, and no other."""
    loop.run(labelled({"student": 20}), tmp_path / "run", progress=False)
    table = np.asarray(
        loop.load(tmp_path / "run").params["student"]["label_embed"]["embedding"]
    )
    fresh = Experiment(labelled({"student": 20}), tmp_path).nets["student"]
    assert table.shape[0] == 21 and fresh.config.null_label == 20
    loop.run(
        changed(
            labelled({"student": 20}),
            {"steps": 1, "roles.student.optimizer.lr": 1e-9},
        ),
        tmp_path / "still",
        progress=False,
    )
    still = np.asarray(
        loop.load(tmp_path / "still").params["student"]["label_embed"]["embedding"]
    )
    assert np.flatnonzero(np.abs(table - still).max(1) > 1e-3).tolist() == [20]


def test_a_batch_has_the_networks_null_label():
    made = Experiment(labelled({"student": 20}), Path("unused"))
    batch = {
        "x": np.zeros((2, 2), np.float32),
        "cond": np.array([1, 2], np.int32),
        "null_cond": np.array([3, 3], np.int32),
    }
    assert made.conditioned(batch)["null_cond"].tolist() == [20, 20]
    text = {**batch, "null_cond": {"text": np.zeros((2, 4))}}
    assert made.conditioned(text) is text
    on_device = {**batch, "null_cond": jnp.array([3, 3])}
    assert made.conditioned({"x": batch["x"]}) == {"x": batch["x"]}
    eight = jax.tree.map(lambda v: np.repeat(v, 4, axis=0), batch)
    assert set(made.put_batch()(eight)["null_cond"].tolist()) == {20}
    assert on_device["null_cond"].tolist() == [3, 3]


def test_labels_beyond_the_networks_table_are_refused(tmp_path):
    text = (
        r"config\.data has labels 0 to 5, config\.roles\.student\.model\.classes=4: "
        "expected at least 6"
    )
    with pytest.raises(Refused, match=text):
        check(Experiment(labelled({"student": 4}, count=6), tmp_path))


def test_networks_of_other_numbers_of_classes_are_refused(tmp_path):
    config = changed(
        tiny.get_config(),
        {
            "data.labelled": True,
            "roles.student.model.classes": 6,
            "roles.fake.model.classes": 7,
            "roles.disc.model.classes": 6,
        },
    )
    with pytest.raises(
        Refused,
        match=r"config\.roles\.fake\.model\.classes=7: config\.roles\.student has 6",
    ):
        check(Experiment(config, tmp_path))


@pytest.mark.full
def test_the_table_is_what_the_evaluation_gives(tmp_path):
    """Names and metrics that a claim is held against are those of the report."""
    config = tiny.get_config()
    expected = rows(Experiment(config, tmp_path / "run"))
    report = loop.run(config, tmp_path / "run", progress=False)
    found = {
        f"{row['name']}@{row['nfe']}": set(row) - {"name", "nfe"}
        for row in report["models"]
    }
    assert {name: set(metrics) for name, metrics in expected.items()} == found


def test_a_method_that_does_not_trace_is_refused_with_its_line(tmp_path):
    config = changed(tiny.get_config(), {"roles.disc.model.dim": 5})
    text = (
        r"config\.method \(methods\.distribution\.dmd2:DMD2\) does not run on "
        r".*disc Discriminator.*\.py:\d+\)"
    )
    with pytest.raises(Refused, match=text):
        check(Experiment(config, tmp_path))


def test_exact_data_may_have_fewer_labels_than_the_network():
    """The exact law takes every label from its own count on for none."""
    data = Mixture(modes=3)
    x = jnp.ones((2, 2))
    t = jnp.full(2, 0.5)
    a, b = (data.net().apply({}, x, t, jnp.full(2, null)).x0 for null in (3, 20))
    np.testing.assert_array_equal(a, b)


@pytest.mark.full
def test_a_refusal_after_the_check_leaves_the_folder_free(tmp_path):
    """A source that turns out to hold another network: the corrected config may take the same
    folder.
    """
    loop.run(
        changed(tiny.get_config("bare"), {"steps": 2}),
        tmp_path / "first",
        progress=False,
    )
    wide = {
        "steps": 2,
        "roles.student.init": str(tmp_path / "first"),
        "roles.student.model.width": 24,
    }
    with pytest.raises(Refused, match="expected"):
        loop.run(
            changed(tiny.get_config("bare"), wide),
            tmp_path / "second",
            progress=False,
        )
    assert not (tmp_path / "second" / "config.json").exists()
    loop.run(
        changed(tiny.get_config("bare"), {"steps": 2}),
        tmp_path / "second",
        progress=False,
    )


@pytest.mark.full
def test_a_run_of_before_a_field_came_in_goes_on(tmp_path):
    """Fields that a class has gained are at their defaults in an older config.json."""
    config = changed(tiny.get_config("bare"), {"steps": 2})
    loop.run(config, tmp_path / "run", progress=False)
    for name in ("config", "report"):
        file = tmp_path / "run" / f"{name}.json"
        held = json.loads(file.read_text())
        del (held if name == "config" else held["config"])["roles"]["student"][
            "optimizer"
        ]["eps"]
        file.write_text(json.dumps(held))
    loop.run(config, tmp_path / "run", progress=False)
    with pytest.raises(
        Refused, match=r"roles\.student\.optimizer\.eps is 1e-08 there, 1e-06 here"
    ):
        loop.run(
            changed(config, {"roles.student.optimizer.eps": 1e-6}),
            tmp_path / "run",
            progress=False,
        )


@pytest.mark.parametrize(
    "name", ["stages", "checkpoints", "a/b", "", "x" * 300, "a\nb", "-x"]
)
def test_a_run_inside_has_a_plain_name_of_its_own(name, tmp_path):
    config = json.loads(tiny.get_config().to_json())
    config["runs"] = {name: json.loads(tiny.get_config().to_json())}
    with pytest.raises(
        Refused, match=r"config\.runs has .*: expected a plain name of a folder"
    ):
        loop.run(ConfigDict(config), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_folders_config_imports_nothing_by_being_compared(tmp_path, monkeypatch):
    """Names of other packages are left alone; the library's own gain their new fields."""
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(tmp_path)
    assert build.completed({"name": "evil:Y", "a": 1}) == {"name": "evil:Y", "a": 1}
    assert build.completed({"name": "os:system"}) == {"name": "os:system"}
    assert build.completed({"name": "core.optim:Ema", "rate": 0.5}) == {
        "name": "core.optim:Ema",
        "start": 0,
        "rate": 0.5,
        "warmup": True,
    }


def test_a_network_of_another_size_is_refused(tmp_path):
    """It would be taken, with positions in between."""
    role = Role(
        model=DiT(size=4, dim=16, depth=1, heads=2),
        denoiser=Denoiser(),
    )
    config = experiment(
        data=Digits(),
        method=FlowMatching(),
        roles={"student": role},
    )
    with pytest.raises(
        Refused,
        match=r"config\.roles\.student\.model\.size=4: config\.data\.x is 8 x 8, expected 8",
    ):
        check(Experiment(config, tmp_path))


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(Refused, match=r"dim=30: expected a multiple of heads=4"):
        DiT(dim=30, heads=4)
