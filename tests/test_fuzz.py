"""Mutated configs: each is accepted, or refused in one line that names the key. Nothing else is
raised, and nothing is written.

A longer run by hand: python -m tests.test_fuzz COUNT SEED [trace]
"""

import functools
import importlib
import json
import random
import re
import sys
import tempfile
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from jaxdistill.core import build, net
from jaxdistill.core.types import Refused
from jaxdistill.run.check import check, check_values
from jaxdistill.run.experiment import Experiment
from tools.stand_ins import load, write

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = sorted(
    ".".join(p.relative_to(CONFIGS).with_suffix("").parts)
    for p in CONFIGS.rglob("[!_]*.py")
)
VALUES = [
    -1,
    0,
    -0.5,
    1e30,
    float("nan"),
    float("inf"),
    "",
    "ghost",
    "no.such:Class",
    "no\nsuch",
    [],
    [1, 2, 3],
    ["a"],
    None,
    True,
    {},
    {"a": 1},
    10**12,
    2.5,
    "1",
    [-1.0],
    -(10**9),
    [[1]],
    "@ghost",
    "../..",
    "x" * 300,
]
# their steps take seconds to trace
U_NETS = (
    "models.denoisers.unet",
    "models.denoisers.edm",
)


def configs(folder: Path) -> dict[str, dict]:
    """Every config that is accepted with small data and random frozen roles: name -> plain data."""
    files = write(folder)
    found = {}
    for name in NAMES:
        config = load(name, files)
        with config.unlocked():
            for role in build.build(config.method).frozen:
                given = config.roles.get(role, build.plain(build.Role()))
                config.roles[role] = given
                given.init = given.init or "random"
        try:
            check_values(
                Experiment(ConfigDict(json.loads(config.to_json())), Path("unused"))
            )
        except Refused:
            continue  # starts from a run that is not there
        found[name] = json.loads(config.to_json())
    return found


def keys(tree: dict, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of every value and group."""
    found = []
    for name, value in tree.items():
        found.append((*above, name))
        if isinstance(value, dict):
            found += keys(value, (*above, name))
    return found


def mutated(config: dict, rng: random.Random) -> tuple[dict, str]:
    """A copy with one value replaced, taken away or added, and its dotted path."""
    copy = json.loads(json.dumps(config))
    *groups, last = rng.choice(keys(copy))
    node = copy
    for group in groups:
        node = node[group]
    kind = rng.random()
    if kind < 0.08:
        del node[last]
    elif kind < 0.14:
        last += "x"
        node[last] = 1
    else:
        node[last] = rng.choice(VALUES)
    return copy, ".".join([*groups, last])


def names_its_key(message: str, key: str) -> bool:
    """Whether a refusal names the key or the group that contains it.

    A run that is gone is named by the claim or the role that needs it.
    """
    groups, _, last = key.rpartition(".")
    if key == "runs" and re.match(r"config\.(claim|roles)\.", message):
        return True
    if last.removesuffix("x") in message:
        return True
    return groups != "" and groups in message


def attempt(config: dict, key: str, trace: bool = False) -> str:
    """Checks a mutated config: "accepted" or "refused"."""
    made = Experiment(ConfigDict(config).lock(), Path("unused"))
    try:
        check_values(made)
        for name in made.runs:
            check_values(made.inner[name])
        if trace:
            check(made)
    except Refused as error:
        assert "\n" not in str(error), repr(str(error))
        assert len(str(error)) < 1000, str(error)
        assert names_its_key(str(error), key), (key, str(error))
        return "refused"
    return "accepted"


def slow(config: dict) -> bool:
    return any(name in json.dumps(config) for name in U_NETS)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Every accepted config. Each network is traced once, however many there are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            net, "_described", functools.cache(net._described.__wrapped__)
        )
        yield configs(tmp_path_factory.mktemp("files"))


@pytest.mark.full
def test_mutated_configs_are_accepted_or_refused_in_one_line(
    originals, tmp_path, monkeypatch
):
    """500 mutations over all configs; the train steps of 20 accepted ones are traced."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    accepted = []
    assert len(originals) > 70
    for _ in range(500):
        name = rng.choice(list(originals))
        config, key = mutated(originals[name], rng)
        if attempt(config, key) == "accepted":
            accepted.append((name, config, key))
    assert 20 <= len(accepted) <= 250
    quick = [
        (config, key)
        for name, config, key in accepted
        if name.startswith("toy") and not slow(config)
    ]
    for config, key in quick[:20]:
        attempt(config, key, trace=True)
    assert not list(tmp_path.iterdir())


def test_every_config_is_accepted_as_it_stands(originals):
    """The others start from runs, read files that are given by hand, are for another number of
    devices, or need more samples than the small files have.
    """
    others = {
        "digits.suite",
        "lm.suite",
        "lm.text_suite",
        "mnist.dmd2",
        "plans.dit_xl2",
        "recipes.ddk",
    }
    assert set(NAMES) - originals.keys() <= others


if __name__ == "__main__":
    count = int(sys.argv[1])
    seed = int(sys.argv[2])
    trace = len(sys.argv) > 3
    importlib.import_module("warnings").simplefilter("ignore")
    rng = random.Random(seed)
    tally = {"accepted": 0, "refused": 0, "failed": 0}
    originals = configs(Path(tempfile.mkdtemp()))
    for _ in range(count):
        name = rng.choice(list(originals))
        config, key = mutated(originals[name], rng)
        try:
            tally[attempt(config, key, trace and not slow(config))] += 1
        except BaseException as error:
            tally["failed"] += 1
            print(name, key, type(error).__name__, str(error)[:300], flush=True)
    print(tally)
