import json
import os
import pickle

import numpy as np
import pytest

from jaxdistill.core.types import Refused
from tests import damage


@pytest.mark.parametrize(
    "mutator",
    sorted(set(damage.DAMAGE + damage.JSON_DAMAGE), key=lambda f: f.__name__),
)
def test_mutators_repeat_by_seed_and_take_any_file_of_their_kind(tmp_path, mutator):
    texts = ["{}", "[]", "1", '{"a": {"b": [1, 2]}, "c": null}'] + (
        [] if mutator in damage.JSON_DAMAGE else ["", "x"]
    )
    for text in texts:
        results = []
        for name in ("a.json", "a.json"):
            (tmp_path / name).write_text(text)
            results.append(
                (
                    mutator(tmp_path / name, np.random.default_rng(3)),
                    (tmp_path / name).read_bytes(),
                )
            )
        assert results[0] == results[1]


def test_most_damage_changes_the_file(tmp_path):
    file = tmp_path / "a.json"
    changed = 0
    for seed in range(50):
        file.write_text(json.dumps({"a": {"b": [1, 2]}, "c": None, "d": "text"}))
        before = file.read_bytes()
        rng = np.random.default_rng(seed)
        damage.damage(file, rng)
        changed += file.read_bytes() != before
        damage.damage(file, rng)  # of what is damaged already
    assert changed >= 40


def refuse(message):
    raise Refused(message)


def test_an_outcome_is_none_or_one_line():
    assert damage.outcome(lambda: 1) is None
    assert damage.outcome(lambda: refuse("x.json: bad"), "x.json") == "x.json: bad"
    for message in ("", "x" * 5000):
        with pytest.raises(AssertionError):
            damage.outcome(lambda message=message: refuse(message))
    with pytest.raises(AssertionError, match="names none of"):
        damage.outcome(lambda: refuse("bad"), "x.json")
    with pytest.raises(ZeroDivisionError):
        damage.outcome(lambda: 1 / 0)


class Found:
    pass


def test_quiet_notices_what_runs_and_what_is_written(tmp_path):
    with damage.quiet(tmp_path):
        pass
    with pytest.raises(AssertionError, match="find_class"), damage.quiet(tmp_path):
        pickle.loads(pickle.dumps(Found()))
    with pytest.raises(AssertionError, match=r"os\.system"), damage.quiet(tmp_path):
        os.system("true")
    with pytest.raises(AssertionError), damage.quiet(tmp_path):
        (tmp_path / "new").write_text("")
