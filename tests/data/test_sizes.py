"""How many token ids and labels each data set says it has, against its own batches."""

import json

import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.data.digits import Digits, LabelledDigits
from jaxdistill.data.domains import Chains, Folders
from jaxdistill.data.images import ImageFolder, ParquetImages
from jaxdistill.data.language import Carry, JunkCarry, Markov, Recall
from jaxdistill.data.mixtures import Mixture
from jaxdistill.data.ner import Slots
from jaxdistill.data.patterns import Patterns
from jaxdistill.data.rationales import Rationales, Sums
from jaxdistill.data.rings import Rings
from jaxdistill.data.shapes import Shapes
from jaxdistill.data.synthetic import Synthetic
from jaxdistill.data.text import PackedJson, PaddedJson, Text
from jaxdistill.data.two_tokenizers import Blocks

TEXT = {
    "markov": (Markov(vocab=6, length=16, branch=2), 6),
    "carry": (Carry(), 14),
    "junk": (JunkCarry(), 14),
    "recall": (Recall(symbols=5), 5),
    "slots": (Slots(size=50), 3 + 12 + 72 + 20),
    "sums": (Sums(), 15),
    "patterns": (Patterns(size=50), 12),
    "chains": (Chains(vocab=7, length=8, branches=(2, 3), size=30, held_out=10), 7),
    "blocks": (Blocks(vocab=5, length=8, branch=2), 5),
    "synthetic": (
        Synthetic(arrays={"tokens": "integers 90 12", "mask": "constant 1 12"}),
        90,
    ),
}
LABELLED = {
    "modes": (Mixture(modes=5), 5),
    "sectors": (Mixture(modes=6, classes=3), 3),
    "rings": (Rings(), 8),
    "digits": (Digits(), 10),
    "labelled": (LabelledDigits(), 10),
    "synthetic": (
        Synthetic(arrays={"x": "normal 4", "cond": "integers 1000"}),
        1000,
    ),
}


@pytest.mark.parametrize("name", TEXT)
def test_ids_are_below_the_size(name):
    data, size = TEXT[name]
    tokens = data.batch(0, slice(None))["tokens"]
    assert data.vocab_size == size and tokens.min() >= 0 and tokens.max() < size
    data.check()


@pytest.mark.parametrize("name", LABELLED)
def test_labels_are_below_the_count(name):
    data, count = LABELLED[name]
    batch = data.batch(0, slice(None))
    assert (
        data.label_count == count
        and batch["cond"].min() >= 0
        and batch["cond"].max() < count
    )
    assert data.vocab_size is None and (
        "null_cond" not in batch or set(batch["null_cond"]) == {count}
    )
    data.check()


def test_where_there_are_none():
    assert Mixture(labelled=False, classes=2).label_count is None
    assert Shapes().label_count is None and Shapes().vocab_size is None
    assert (
        Synthetic(
            arrays={"tokens": "constant 1 12", "cond": "constant 3"}
        ).vocab_size
        is None
    )


def test_a_teacher_that_reads_other_tokens():
    data = Blocks(vocab=5, length=8, branch=2)
    assert (
        data.batch(0, slice(None))["teacher_tokens"].max()
        < data.teacher_vocab_size
        == 25
    )
    assert Markov(vocab=6).teacher_vocab_size == 6


def test_files(tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 80)
    for data in (
        Text(path=str(tmp_path / "a.txt"), length=11),
        Folders(path=str(tmp_path), each=Text(length=11), batch_size=4),
    ):
        assert data.vocab_size == 259
        data.check()


def test_a_split_without_samples_is_refused_at_the_start(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(
        "".join(
            json.dumps({"prompt": f"p{i}", "response": f"r{i}"}) + "\n"
            for i in range(9)
        )
    )
    data = PackedJson(path=str(file), length=32)
    assert (
        len(data.samples("train")) == 9
        and np.isfinite(data.spec()["tokens"].shape).all()
    )
    with pytest.raises(
        Refused,
        match=r"a.jsonl: PackedJson has no test samples; data.heldout=0.05 is the share",
    ):
        data.check()
    data.check(test=False)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (
            ImageFolder,
            dict(size=0),
            "data.size=0: expected an integer of at least 1",
        ),
        (
            ParquetImages,
            dict(threads=-1),
            "data.threads=-1: expected an integer of at least 1",
        ),
        (
            PackedJson,
            dict(length=1),
            "data.length=1: expected an integer of at least 2",
        ),
        (
            PaddedJson,
            dict(response_length=-3),
            "data.response_length=-3: expected an integer of at least 1",
        ),
        (
            Rationales,
            dict(label_length=0),
            "data.label_length=0: expected an integer of at least 1",
        ),
    ],
)
def test_sizes_that_hold_nothing(kind, fields, message):
    with pytest.raises(Refused, match=message):
        kind(path="a", **fields)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "path is empty"),
        ("nowhere/at/all", "no such file or folder"),
        ("a" * 300, "too long"),
        ("a\0b", "null"),
        ("~nobody-such/x", "home"),
    ],
)
def test_paths_that_cannot_be(path, message):
    with pytest.raises(Refused, match=message) as refused:
        Text(path=path).check()
    assert "\n" not in str(refused.value) and "\0" not in str(refused.value)
