import json

import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.data.domains import Chains, Folders, Mixer
from jaxdistill.data.language import Markov
from jaxdistill.data.text import PackedJson, Text

TINY = Chains(
    vocab=4, length=6, branches=(2, 3), size=50, held_out=20, batch_size=8
)


def take(data, n):
    loader = data.loader()
    return [next(loader) for _ in range(n)]


def test_domains_come_with_their_probabilities():
    r = np.array([0.5, 0.3, 0.15, 0.05])
    n = 100_000
    domain, _, taken = Mixer([10] * 4, 0).draw(0, [0] * 4, r, n)
    assert (
        np.abs(np.bincount(domain) / n - r) < 3 * np.sqrt(r * (1 - r) / n)
    ).all()
    assert taken == np.bincount(domain).tolist()


def test_a_short_domain_goes_round():
    mixer = Mixer([10], 1)
    taken = [0]
    rows = []
    for index in range(5):
        _, row, taken = mixer.draw(index, taken, [1.0], 5)
        rows += row.tolist()
    assert taken == [25] and set(np.bincount(rows, minlength=10)) == {2, 3}
    assert (
        sorted(rows[:10]) == sorted(rows[10:20]) == list(range(10))
        and rows[:10] != rows[10:20]
    )


def test_measurements_are_the_same_held_out_rows():
    data = Chains(
        vocab=4,
        length=6,
        branches=(2, 3),
        size=50,
        held_out=20,
        batch_size=8,
        interval=3,
        measures=2,
    )
    batches = take(data, 12)
    assert [bool(b["heldout"].all()) for b in batches] == [
        True,
        True,
        False,
        False,
        False,
    ] * 2 + [
        True,
        True,
    ]
    for i in (5, 10):
        assert (batches[i]["tokens"] == batches[0]["tokens"]).all() and (
            batches[i + 1]["tokens"] == batches[1]["tokens"]
        ).all()
    assert (np.bincount(batches[0]["domain"]) == 4).all() and (
        batches[0]["tokens"] != batches[1]["tokens"]
    ).any()
    scored = {row.tobytes() for row in data.evaluation(24)["tokens"]}
    assert len(data.evaluation(24)["tokens"]) == 24
    held = [part[1]["tokens"] for part in data.parts.values()]
    for d, rows in enumerate(held):
        assert (
            np.concatenate([b["tokens"][b["domain"] == d] for b in batches[:2]])
            == rows[:8]
        ).all()
    assert scored == {row.tobytes() for h in held for row in h[8:]}


def test_steering_changes_what_comes_next_and_nothing_else():
    loader = TINY.loader()
    for _ in range(3):
        next(loader)
    state = json.loads(json.dumps(loader.get_state()))
    steered = TINY.steer({"weights": [0.0, 1.0]})
    after = steered.loader()
    after.set_state(state)
    batch = next(after)
    assert (batch["domain"] == 1).all() and batch["heldout"].sum() == 0
    assert after.get_state() == {
        "index": 4,
        "taken": [state["taken"][0], state["taken"][1] + 8],
    }
    assert (
        steered.evaluation(4)["tokens"].tolist()
        == TINY.evaluation(4)["tokens"].tolist()
    )


def test_stream(check_stream):
    check_stream(TINY)
    check_stream(
        Chains(
            vocab=4,
            length=6,
            branches=(2, 3),
            size=50,
            held_out=20,
            batch_size=8,
            interval=3,
            measures=1,
        )
    )


def test_natural_proportions_of_folders(tmp_path):
    (tmp_path / "b.txt").write_text("to be or not to be " * 40)
    (tmp_path / "a.txt").write_text("abc" * 80)
    data = Folders(path=str(tmp_path), each=Text(length=11), batch_size=4)
    assert list(data.parts) == ["a.txt", "b.txt"]
    # windows of the nine tenths that are not held out
    np.testing.assert_allclose(data.probabilities, np.array([21, 68]) / 89)
    assert data.spec()["tokens"].shape == (4, 11)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            dict(weights=(0.5, 0.6)),
            r"data.weights=\(0.5, 0.6\): expected a probability for each of chain0, chain1",
        ),
        (dict(interval=-1), r"data.interval=-1: expected an integer of at least 0"),
        (
            dict(interval=2, measures=0),
            r"data.measures=0: expected an integer of at least 1",
        ),
        (dict(weights=(1.0,)), r"data.weights=\(1.0,\)"),
        (
            dict(interval=3, measures=6),
            r"data.measures=6: a domain has only 20 held-out samples, 24 are asked for",
        ),
        (
            dict(interval=3, batch_size=7),
            r"data.batch_size=7: expected a multiple of the 2 domains",
        ),
    ],
)
def test_refused(fields, message):
    with pytest.raises(Refused, match=message):
        take(
            Chains(
                **{
                    **dict(
                        vocab=4,
                        length=6,
                        branches=(2, 3),
                        size=50,
                        held_out=20,
                        batch_size=8,
                    ),
                    **fields,
                }
            ),
            6,
        )


def test_check_reads_what_measurements_and_evaluation_need(tmp_path):
    TINY.check()
    Chains(
        vocab=4,
        length=6,
        branches=(2, 3),
        size=50,
        held_out=9,
        batch_size=8,
        interval=3,
        measures=2,
    ).check()
    with pytest.raises(
        Refused, match=r"a domain has only 7 held-out samples, 8 are asked for"
    ):
        Chains(
            vocab=4,
            length=6,
            branches=(2, 3),
            size=50,
            held_out=7,
            batch_size=8,
            interval=3,
            measures=2,
        ).check()
    with pytest.raises(
        Refused,
        match=r"the domain 'chain0' has 8 held-out samples, expected 9 or more",
    ):
        Chains(
            vocab=4,
            length=6,
            branches=(2, 3),
            size=50,
            held_out=8,
            batch_size=8,
            interval=3,
            measures=2,
        ).check()
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "response": "b"}')
    with pytest.raises(
        Refused, match=r"the domain 'a.jsonl' has no training samples"
    ):
        Folders(path=str(tmp_path), each=PackedJson(length=9, heldout=0.9)).check()
    with pytest.raises(
        Refused,
        match=r"1 held-out samples are asked for, expected at least one of each of chain0, chain1",
    ):
        TINY.evaluation(1)
    with pytest.raises(
        Refused,
        match=r"data.each: Markov, expected a data set that keeps its arrays in memory",
    ):
        Folders(path=str(tmp_path), each=Markov()).check()


def test_examples_are_every_row_of_every_domain():
    for split, size, heldout in (("train", 50, 0), ("test", 20, 1)):
        rows = TINY.examples(split)
        assert (
            len(rows) == 2 * size
            and [row["domain"] for row in rows] == [0] * size + [1] * size
        )
        assert all(row["heldout"] == heldout for row in rows)
        expected = np.concatenate(
            [part[heldout]["tokens"] for part in TINY.parts.values()]
        )
        np.testing.assert_array_equal([row["tokens"] for row in rows], expected)
