import json

import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.data import arrayrecord
from jaxdistill.data.logits import ABOUT, StoredLogits, store_file

DATA = {"name": "data.language:Markov", "vocab": 30, "branch": 2, "length": 6}


def rows(n: int, top_k: int = 3, vocab: int = 40, length: int = 6) -> list[dict]:
    rng = np.random.default_rng(0)
    law = lambda *shape: -rng.random(shape, np.float32)
    tokens = lambda *shape: rng.integers(0, vocab, shape, np.int32)
    return [
        {
            "tokens": tokens(length),
            "mask": np.ones(length, np.float32),
            "teacher_ids": tokens(length, top_k),
            "teacher_log_probs": law(length, top_k),
            "teacher_log_tail": law(length),
        }
        for _ in range(n)
    ]


def make(folder, **changed):
    """A store of 4 training and 2 test rows, two to a file."""
    about = {
        "data": DATA,
        "top_k": 3,
        "vocab": 40,
        "rows": {"train": 4, "test": 2},
        "files": {"train": 2, "test": 1},
        **changed,
    }
    folder.mkdir(exist_ok=True)
    (folder / ABOUT).write_text(json.dumps(about))
    for split, files in (("train", 2), ("test", 1)):
        for i in range(files):
            arrayrecord.write(store_file(folder, split, i), rows(2))
    return str(folder)


def test_a_sound_store(tmp_path):
    data = StoredLogits(path=make(tmp_path), batch_size=2)
    data.check()
    assert data.vocab_size == 30, (
        "of the data, whose ids a student must have, not of the teacher's table"
    )
    assert (
        StoredLogits(
            path=make(
                tmp_path / "b",
                data={"name": "data.text:Text", "tokenizer": "/gone"},
            )
        ).vocab_size
        == 40
    )
    (tmp_path / "only").mkdir()
    alone = make(tmp_path / "only" / "train", rows={"train": 4}, files={"train": 2})
    store_file(tmp_path / "only" / "train", "test", 0).unlink()
    StoredLogits(path=alone, heldout=0.25).check()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            dict(vocab=20),
            r"train-0000\d.arrayrecord record \d: teacher_ids are not 0 to 19, "
            "the teacher's vocabulary",
        ),
        (
            dict(top_k=4),
            r"record \d: teacher_ids is \[6, 3\], expected \[6, 4\] in a store of 4 tokens a place",
        ),
        (dict(rows={"train": 5, "test": 2}), r"4 train rows, store.json says 5"),
        (dict(rows={"train": 4, "test": 3}), r"2 test rows, store.json says 3"),
        (dict(files={"train": 3, "test": 1}), r"2 of 3 train files"),
        (
            dict(files={"train": 10**12, "test": 1}),
            r"2 of 1000000000000 train files",
        ),
        (
            dict(files=[2, 1]),
            r"store.json: 'files' is '\[2, 1\]', expected what tools/store_logits.py writes",
        ),
        (dict(files={"train": 2, "../../x": 1}), r"store.json: 'files' is"),
        (dict(files={"train": -2}), r"store.json: 'files' is"),
        (dict(top_k="3"), r"store.json: 'top_k' is '3'"),
        (dict(vocab=True), r"store.json: 'vocab' is 'True'"),
        (dict(data=None), r"store.json: 'data' is 'None'"),
    ],
)
def test_a_store_that_does_not_fit_its_files(tmp_path, changed, message):
    with pytest.raises(Refused, match=message) as refused:
        StoredLogits(path=make(tmp_path, **changed)).check()
    assert str(refused.value).isprintable()


def test_records_of_another_kind(tmp_path):
    make(tmp_path)
    arrayrecord.write(
        store_file(tmp_path, "train", 0),
        [
            {k: v for k, v in row.items() if k != "teacher_log_tail"}
            for row in rows(2)
        ],
    )
    with pytest.raises(
        Refused,
        match=r"record \d: (teacher_log_tail is missing|'teacher_log_tail' is)",
    ):
        StoredLogits(path=str(tmp_path), batch_size=4).check()
        next(StoredLogits(path=str(tmp_path), batch_size=4).loader())


@pytest.mark.parametrize("text", ["[1]", "3", "[" * 100_000, "{"])
def test_descriptions_that_are_none(tmp_path, text):
    make(tmp_path)
    (tmp_path / ABOUT).write_text(text)
    with pytest.raises(
        Refused, match=r"store.json: (expected a JSON object|not JSON)"
    ):
        StoredLogits(path=str(tmp_path)).check()
