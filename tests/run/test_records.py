"""What a run's folder says of itself is read whole, or refused in one line that names the file."""

import json
import re

import pytest

from jaxdistill.core.build import experiment
from jaxdistill.core.types import Refused
from jaxdistill.data.mixtures import Mixture
from jaxdistill.methods.trajectory.flow_matching import FlowMatching
from jaxdistill.run import metrics, records, report

CONFIG = experiment(
    method=FlowMatching(),
    data=Mixture(),
    roles={},
)
CLAIM = dict(
    metric="fid",
    model="a@1",
    against="b@1",
    value=1.0,
    baseline=2.0,
    bound=1.0,
    better="lower",
    holds=True,
)
MODELS = [dict(name="student", nfe=1, fid=2.0)]
REPORT = dict(
    config=json.loads(CONFIG.to_json()),
    method=CONFIG.method.name,
    steps=3,
    seconds=1.5,
    models=MODELS,
    claim=CLAIM,
)


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "config.json").write_text(CONFIG.to_json())
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "seconds": 0.5, "a/loss": null}\n'
        '{"step": 2, "seconds": 1, "a/loss": 1e300}\n{"st'
    )
    return tmp_path


def refused(file, call, said):
    """The message of a refusal, which must begin with the file and be one line."""
    with pytest.raises(Refused, match=re.escape(said)) as found:
        call()
    message = str(found.value)
    assert message.startswith(str(file)) and message.isprintable(), message


def test_what_is_sound_is_read(workdir):
    assert records.read_config(workdir).to_json() == CONFIG.to_json()
    assert report.read(workdir) == REPORT
    assert [
        r["step"] for r in metrics.read(workdir / "metrics.jsonl", clock=True)
    ] == [
        1,
        2,
    ]
    assert metrics.read(workdir / "none.jsonl") == []


TORN = [
    (b'{"a"', "is no JSON"),
    (b"", "is no JSON"),
    (b'{"a": "\xff"}', "no UTF-8"),
    (b"[1]", "expected an object"),
    (b"[" * 100_000, "is no JSON"),
]


@pytest.mark.parametrize(("content", "said"), TORN, ids=[said for _, said in TORN])
@pytest.mark.parametrize("name", ["config.json", "report.json"])
def test_what_is_torn_is_refused(workdir, name, content, said):
    (workdir / name).write_bytes(content)
    refused(
        workdir / name,
        lambda: {"config.json": records.read_config, "report.json": report.read}[
            name
        ](workdir),
        said,
    )


@pytest.mark.parametrize("key", REPORT)
def test_a_report_without_a_part_is_refused(workdir, key):
    (workdir / "report.json").write_text(
        json.dumps({k: v for k, v in REPORT.items() if k != key})
    )
    refused(
        workdir / "report.json", lambda: report.read(workdir), f"has no key {key!r}"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", True),
        ("steps", 10**400),
        ("models", [3]),
        ("claim", {"metric": 3}),
        ("seconds", "1"),
    ],
)
def test_a_report_with_a_part_of_another_kind_is_refused(workdir, key, value):
    (workdir / "report.json").write_text(json.dumps({**REPORT, key: value}))
    refused(workdir / "report.json", lambda: report.read(workdir), "expected")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 0),
        ("seconds", -1.0),
        ("seconds", float("nan")),
        ("seconds", float("inf")),
        ("method", "m"),
        *(("nfe", nfe) for nfe in ("x", "1", 0, -4, 2.5, True, None, [1])),
    ],
)
def test_a_report_with_a_value_that_no_run_writes_is_refused(workdir, key, value):
    changed = (
        {"models": [*REPORT["models"], dict(name="student", nfe=value)]}
        if key == "nfe"
        else {key: value}
    )
    (workdir / "report.json").write_text(json.dumps({**REPORT, **changed}))
    file = workdir / "report.json"
    refused(
        f"{file}: models[1]: nfe" if key == "nfe" else f"{file}: {key}",
        lambda: report.read(workdir),
        "expected",
    )


@pytest.mark.parametrize("key", json.loads(CONFIG.to_json()))
def test_a_config_without_a_part_is_refused(workdir, key):
    """At its top and in a run inside it."""
    whole = json.loads(CONFIG.to_json())
    part = {k: v for k, v in whole.items() if k != key}
    for found in (part, {**whole, "runs": {"inner": part}}):
        (workdir / "config.json").write_text(json.dumps(found))
        refused(
            workdir / "config.json",
            lambda: records.read_config(workdir),
            f"has no key {key!r}",
        )


@pytest.mark.parametrize(
    "line",
    [
        b'{"ste',
        b'{"step": 1, "seconds": 2, "x": "\xff"}',
        b'{"seconds": 1}',
        b'{"step": 1, "seconds": NaN}',
        b'{"step": 1}',
        b"3",
        b'{"step": 1, "seconds": 1, "a/loss": "x"}',
    ],
)
def test_only_the_last_line_of_metrics_may_be_torn(workdir, line):
    file = workdir / "metrics.jsonl"
    file.write_bytes(line + b'\n{"step": 2, "seconds": 1}\n')
    refused(
        f"{file}:1: ", lambda: metrics.read(file, clock=True), "metrics.jsonl:1"
    )


def test_stages_without_a_gap(tmp_path):
    assert records.stages(tmp_path) == []
    for number in (0, 1, 3):
        (tmp_path / "stages" / str(number)).mkdir(parents=True)
    refused(
        tmp_path / "stages",
        lambda: records.stages(tmp_path),
        "stage 3 is there, stage 2 before it is missing",
    )
    (tmp_path / "stages/2").write_text("")
    refused(tmp_path / "stages/2", lambda: records.stages(tmp_path), "is a file")
    (tmp_path / "stages/2").unlink()
    (tmp_path / "stages/2").mkdir()
    # what a killed process leaves
    (tmp_path / "stages/2.orbax-checkpoint-tmp-7").mkdir()
    assert [p.name for p in records.stages(tmp_path)] == ["0", "1", "2", "3"]


def test_a_report_of_another_config_is_refused(workdir):
    records.check_result(workdir, CONFIG)
    changed = CONFIG.copy_and_resolve_references()
    changed.log_every = 7
    records.check_result(workdir, changed)
    changed.seed = 5
    refused(
        workdir / "report.json",
        lambda: records.check_result(workdir, changed),
        "seed is 0 there, 5 here",
    )


@pytest.mark.parametrize(
    "place",
    ["gs://bucket/x", "s3://bucket/x", "memory://x", "gs:/bucket/x", "file:///x"],
)
def test_addresses_are_no_folders(place):
    with pytest.raises(
        Refused,
        match=rf"^--workdir={place}: \w+:// is not supported, expected a folder of this machine",
    ):
        records.local(place, "--workdir")


@pytest.mark.parametrize("place", ["runs/x", "/runs/x:1/y", "./a:b", "C:/x", "x"])
def test_folders_are_folders(place):
    assert str(records.local(place, "--workdir")) == str(place).removeprefix("./")


def test_a_path_is_the_users_own(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert records.local("~/runs/a", "--workdir") == tmp_path / "runs/a"
    for place in ("~nobody_of_that_name/x", "a\0b"):
        with pytest.raises(Refused, match="--workdir="):
            records.local(place, "--workdir")
