import json
import re
from collections import Counter

import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.data import ner
from jaxdistill.data.tokenizers import ByteTokenizer

CODEC = ByteTokenizer()
ANSWERS = {"person": ["Ada", "Bob"], "place": ["Rome"], "date": []}


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ('[["Ada", "person"]]', [("Ada", "person")]),
        ('Here: [{"entity": "Ada", "type": "person"}] done', [("Ada", "person")]),
        ("[]", []),
        ('[["Ada"]]', None),
        ('[["Ada", 3]]', None),
        ('["Ada"]', None),
        ('[["Ada", "person"]', None),
        ("none", None),
    ],
)
def test_replies_of_a_teacher(text, pairs):
    assert ner.parse_entities(text) == pairs


def test_cleaning():
    pairs = [
        ("Ada", "Person"),
        ("Ada", "person"),
        ("Bob", "person"),
        ("Rome", "misc"),
        ("Москва", "city"),
        ("Ada", " "),
        ("Rome ", "city"),
    ]
    assert ner.cleaned("Ada saw Rome and Москва.", pairs) == [
        ("Ada", "person"),
        ("Rome", "city"),
    ]
    rows = ner.labelled(
        {"a": "Ada ran", "b": "Bob ran"},
        [{"id": "a", "text": '[["Ada", "person"]]'}, {"id": "b", "text": "sorry"}],
    )
    assert rows == [{"text": "Ada ran", "entities": [["Ada", "person"]]}]
    assert "Ada ran" in ner.ask("Ada ran")[0]["content"]


def test_negatives_follow_the_frequencies():
    rows = [
        [("a", "x")] * 5,
        [("a", "x"), ("b", "x"), ("c", "y")],
        [("d", "z")],
        [("e", "z")],
        [("f", "z")],
        [("g", "w")],
    ]
    counts = ner.frequencies(rows)
    assert counts == Counter(x=3, z=3, y=1, w=1)  # equal mentions in a passage once
    rng = np.random.default_rng(0)
    n = 20_000
    drawn = Counter(ner.absent(["x"], counts, 1, rng)[0] for _ in range(n))
    for kind, p in (("z", 0.6), ("y", 0.2), ("w", 0.2)):
        assert abs(drawn[kind] / n - p) < 4 * np.sqrt(p * (1 - p) / n)
    uniform = Counter(
        ner.absent(["x"], counts, 1, rng, "uniform")[0] for _ in range(n)
    )
    assert (
        all(
            abs(uniform[kind] / n - 1 / 3) < 4 * np.sqrt(2 / 9 / n)
            for kind in "zyw"
        )
        and "x" not in uniform
    )
    assert sorted(ner.absent(["x"], counts, 10, rng)) == ["w", "y", "z"]
    assert (
        ner.absent(["x"], counts, 5, rng, "none")
        == ner.absent(list("xyzw"), counts, 5, rng)
        == []
    )


def test_questions_are_shuffled_and_stay_with_their_answers():
    plain = ner.conversation("Ada met Bob in Rome", ANSWERS)
    assert plain[0] == ("Text: Ada met Bob in Rome", "I've read this text.")
    orders = set()
    for seed in range(20):
        turns = ner.conversation(
            "Ada met Bob in Rome", ANSWERS, np.random.default_rng(seed)
        )
        assert turns[0] == plain[0] and Counter(turns) == Counter(plain)
        orders.add(tuple(turns))
    assert len(orders) == 6
    assert dict(plain[1:])["What describes date in the text?"] == "[]"
    assert (
        ner.conversation("x", {}, source="wnut")[0][0] == "Text: x\nDataset: wnut"
    )


def test_conversation_round_trip():
    turns = ner.conversation(
        "Ada met Bob in Rome", ANSWERS, np.random.default_rng(0)
    )
    tokens, _ = ner.encode(turns, CODEC)
    text = CODEC.decode(tokens)
    found = re.findall(
        r"USER: What describes (\w+) in the text\? ASSISTANT: (\[.*?\])", text
    )
    assert {kind: json.loads(answer) for kind, answer in found} == ANSWERS
    assert text.startswith(
        ner.SYSTEM
        + " USER: Text: Ada met Bob in Rome ASSISTANT: I've read this text."
    )


def test_all_types_in_one_question():
    first, (question, answer) = ner.together(
        "Ada met Bob in Rome", ANSWERS, np.random.default_rng(0)
    )
    assert (
        first == ner.conversation("Ada met Bob in Rome", ANSWERS)[0]
        and json.loads(answer) == ANSWERS
    )
    assert [question.find(kind) for kind in json.loads(answer)] == sorted(
        question.find(kind) for kind in ANSWERS
    )
    assert (
        "definition" in ner.ask("x", "definition")[0]["content"]
        and "definition" not in ner.ask("x")[0]["content"]
    )


def test_targets_are_the_answers_and_their_ends():
    turns = ner.conversation("Ada met Bob in Rome", ANSWERS)
    tokens, mask = ner.encode(turns, CODEC)
    assert tokens[0] == CODEC.bos and mask.sum() == sum(
        len(CODEC.encode(a)) + 1 for _, a in turns[1:]
    )
    assert CODEC.decode(tokens[mask > 0]) == "".join(a for _, a in turns[1:])
    assert (tokens[mask > 0] == CODEC.eos).sum() == 3 and (
        tokens == CODEC.eos
    ).sum() == 4
    acknowledged = ner.encode(turns, CODEC, train_ack=True)[1]
    assert acknowledged.sum() - mask.sum() == len("I've read this text.") + 1


def test_a_prompt_is_the_beginning_of_what_was_trained():
    turns = ner.conversation("Ada met Bob", {"person": ["Ada", "Bob"]})
    whole, mask = ner.encode(turns, CODEC)
    prompt, _ = ner.encode([turns[0], (turns[1][0], "")], CODEC)
    assert (
        (whole[: len(prompt)] == prompt).all()
        and mask[: len(prompt)].sum() == 0
        and mask[len(prompt) :].all()
    )


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('["Ada", "Bob"]', ["ada", "bob"]),
        (' ["The  Beatles", "beatles!"] and more', ["beatles"]),
        ('[["Ada"], "Bob"]', []),  # ends at the first "]"
        ("[]", []),
        ('So ["Ada"]', []),
        ('["Ada", 3]', []),
        ('["Ada"', []),
        ('["Ada",\n"Bob"]', []),
        ('["an apple a day"]', ["apple day"]),
    ],
)
def test_answers_of_a_student(text, found):
    assert ner.parse_answer(text) == found


def write(path, rows):
    path.write_text(
        "".join(json.dumps({"text": t, "entities": e}) + "\n" for t, e in rows)
    )
    return str(path)


ROWS = [
    ("Ada ran", [["Ada", "person"]]),
    ("Rome is old", [["Rome", "place"]]),
    ("In 1999 Bob", [["1999", "date"], ["Bob", "person"]]),
]


def test_conversations_of_a_file(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    data = ner.Conversations(
        path=path, heldout=0.0, length=600, n_neg=2, batch_size=2
    )
    for (text, pairs), turns in zip(ROWS, data.conversations("train")):
        answers = {user: json.loads(assistant) for user, assistant in turns[1:]}
        kinds = {kind for _, kind in pairs}
        negative = [user for user, found in answers.items() if not found]
        assert len(answers) - len(negative) == len(kinds) and len(negative) == min(
            2, 3 - len(kinds)
        )
        assert text in turns[0][0] and not any(
            f" {kind} " in user for kind in kinds for user in negative
        )
    arrays = data.arrays("train")
    assert (
        arrays["tokens"].shape == (3, 600)
        and (arrays["mask"] <= (arrays["segments"] > 0)).all()
    )
    none = ner.Conversations(path=path, heldout=0.0, negatives="none")
    assert not any(
        answer == "[]"
        for turns in none.conversations("train")
        for _, answer in turns
    )
    # cut ones left out
    assert (
        len(
            ner.Conversations(
                path=path, heldout=0.0, length=220, negatives="none"
            ).arrays("train")["tokens"]
        )
        < 3
    )
    with pytest.raises(
        Refused, match="all 3 conversations are longer than 50 tokens"
    ):
        ner.Conversations(path=path, heldout=0.0, length=50).arrays("train")
    with pytest.raises(Refused, match="negatives='some'"):
        ner.Conversations(path=path, heldout=0.0, negatives="some").arrays("train")
    with pytest.raises(
        Refused, match=r"a\.jsonl:4: expected a list of \[entity, type\]"
    ):
        ner.Conversations(
            path=write(tmp_path / "a.jsonl", [*ROWS, ("x", ["y"])])
        ).arrays("train")


@pytest.mark.parametrize(
    "found", [None, "x", {"a": [["x", "y"]]}, [["x"]], [["x", 3]], [3]]
)
def test_entities_that_are_none(tmp_path, found):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": "a b", "entities": [["a", "b"]]})
        + "\n"
        + json.dumps({"text": "x", "entities": found})
    )
    with pytest.raises(
        Refused,
        match=r"a.jsonl:2: expected a list of \[entity, type\] under 'entities'",
    ):
        ner.Conversations(path=str(tmp_path / "a.jsonl")).check()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_conll_of_any_system(tmp_path, end, mark):
    text = "New\tB-place\nYork\u2028City\tI-place\nis\tO\n\nit\tO\n"
    (tmp_path / "a.conll").write_bytes((mark + text.replace("\n", end)).encode())
    want = [
        ("New York\u2028City is", [("New York\u2028City", "place")]),
        ("it", []),
    ]
    assert ner.conll(tmp_path / "a.conll") == want
    (tmp_path / "b.conll").write_text(text + "x\tC-place\n")
    with pytest.raises(
        Refused, match=r"b.conll:6: tag 'C-place', expected O, B-type or I-type"
    ):
        ner.conll(tmp_path / "b.conll")


@pytest.mark.parametrize("negatives", ["none", "uniform", "frequency"])
def test_slots(negatives, check_stream):
    data = ner.Slots(size=400, noise=0.0, negatives=negatives, batch_size=16)
    arrays = data.arrays("train")
    assert data.correct(arrays["tokens"]).all()
    empty = np.array([not answer for answer in data.answers(arrays["tokens"])])
    assert empty.any() == (negatives != "none")
    test = data.evaluation(120)
    assert (
        len(test["tokens"]) == 120
        and (test["tokens"][:12, data.length + 1] == 3 + np.arange(12)).all()
    )
    wrong = ner.Slots(size=400, noise=0.08, batch_size=16).arrays("train")["tokens"]
    assert 0.75 < data.correct(wrong).mean() < 0.99
    check_stream(data)


def test_wnut(shared_data):
    dev, test = (
        ner.conll(shared_data / "wnut17" / f)
        for f in ("emerging.dev.conll", "emerging.test.annotated")
    )
    assert (len(dev), len(test)) == (1009, 1287)
    assert Counter(kind for _, pairs in test for _, kind in pairs) == Counter(
        {
            "person": 429,
            "group": 165,
            "location": 150,
            "creative-work": 142,
            "product": 127,
            "corporation": 66,
        }
    )
    assert all(entity in text for text, pairs in dev + test for entity, _ in pairs)
    assert ("Redondo Beach Blvd", "location") in dev[1][1]
