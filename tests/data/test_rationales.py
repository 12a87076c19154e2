import json
import random
import re
from fractions import Fraction

import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.data.rationales import (
    SVAMP,
    UNPARSED,
    Parsed,
    Rationales,
    Sums,
    arithmetic,
    few_shot,
    parse_choice,
    parse_equation,
    same_value,
    svamp,
)


def test_prompt_ends_where_the_teacher_begins():
    shots = [("How many?", "1 + 2 is 3.", "(1 + 2)"), ("And?", "No more.", "(0)")]
    prompt = few_shot(shots, "Now?", lambda label: f"The answer is {label}.")
    assert (
        prompt == "Q: How many?\nA: 1 + 2 is 3. The answer is (1 + 2).\n\n"
        "Q: And?\nA: No more. The answer is (0).\n\nQ: Now?\nA:"
    )
    reply = prompt.split("A:")[1]
    assert parse_equation(reply) == Parsed(" 1 + 2 is 3.", "(1 + 2)", True)


@pytest.mark.parametrize(
    ("parse", "text", "expected"),
    [
        (parse_choice, "R. So the answer is (b) dog.", Parsed("R.", "dog", True)),
        (
            parse_choice,
            "R. So the answer is (b) dog.\n\nQ: What? So the answer is (c) cat.",
            Parsed("R.", "dog", True),
        ),
        (
            parse_choice,
            "R. So the answer is (b) St. Louis",
            Parsed("R.", "St. Louis", True),
        ),
        (parse_choice, "R. The answer is (b) dog.", UNPARSED),
        (parse_choice, "R. So the answer is dog.", UNPARSED),
        (
            parse_equation,
            "R. The answer is (84 / 2).\n\nQ: There are 120",
            Parsed("R.", "(84 / 2)", True),
        ),
        (
            parse_equation,
            "R. The answer is ((1 + 2) * (3)).",
            Parsed("R.", "((1 + 2) * (3))", True),
        ),
        (parse_equation, "R. The answer is 42.", UNPARSED),
        (
            parse_equation,
            "R. The answer is ) 1 (\n(2) (3) .",
            Parsed("R.", "(2) (3)", True),
        ),
        (parse_equation, "Q: The answer is (1).", UNPARSED),
    ],
)
def test_parsers(parse, text, expected):
    assert parse(text) == expected and expected.valid == (expected.rationale != " ")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("( ( 17.0 + 15.0 ) + 2.0 )", 34),
        ("1 - 2 - 3", -4),
        ("8 / 4 / 2", 1),
        ("2 + 3 * 4", 14),
        ("(2 + 3) * -4", -20),
        (".5*4", 2),
        ("1 / 0", None),
        ("1 +", None),
        ("(1", None),
        ("1 2", None),
        ("__import__('os')", None),
        ("2 ** 3", None),
        ("", None),
        ("(" * 5000 + "1", None),
        ("(" * 5000 + "1" + ")" * 5000, 1),
        ("-" * 5001 + "1", -1),
        ("(1))", None),
        (")", None),
        ("()", None),
        ("1 - -(2 - 5)", -2),
        ("-2 * -3 / -4", Fraction(-3, 2)),
        ("1. / 3", Fraction(1, 3)),
        ("1.2.3", None),
        ("+1", None),
        ("0.1 + 0.2", Fraction(3, 10)),
        ("1 / (1 / 3)", 3),
        ("(1) (2)", None),
        ("negative 1", None),
        ("1 negative", None),
    ],
)
def test_arithmetic(text, value):
    assert arithmetic(text) == value
    assert same_value(text, str(value)) == (value is not None)


def test_arithmetic_is_that_of_python():
    """Random equations against Python's own reader, in fractions."""
    rng = random.Random(0)

    def equation(depth):
        if not depth or rng.random() < 0.2:
            return rng.choice(["1", "2", "-3", "0.5", "7"])
        parts = f"{equation(depth - 1)} {rng.choice('+-*/')} {equation(depth - 1)}"
        return (
            f"({parts})"
            if rng.random() < 0.4
            else f"-({parts})"
            if rng.random() < 0.1
            else parts
        )

    for _ in range(300):
        text = equation(5)
        try:
            value = eval(re.sub(r"[0-9.]+", r"Fraction('\g<0>')", text))
        except ZeroDivisionError:
            value = None
        assert arithmetic(text) == value, text


LONG = 100_000


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("(" * LONG, None),
        ("(" * (LONG // 2) + "1" + ")" * (LONG // 2), 1),
        ("-(" * (LONG // 3) + "1" + ")" * (LONG // 3), -1),
        ("1+" * (LONG // 2) + "1", LONG // 2 + 1),
        ("1/3+" * (LONG // 4) + "1", Fraction(LONG // 4, 3) + 1),
        ("9*" * (LONG // 2) + "0", 0),
        ("1(" * (LONG // 2), None),
        ("1" * LONG, None),  # more digits than Python reads
        (" " * LONG + "5", 5),
    ],
)
def test_long_equations_end(text, value):
    """What takes minutes where time is the square of the length, or all frames of the interpreter
    where it calls itself.
    """
    assert arithmetic(text) == value
    told = parse_equation(f"R. The answer is {text}")
    assert told.valid == ("(" in text and ")" in text)
    parse_choice(f"R. So the answer is {text}")


def test_integers_are_compared_exactly_and_others_nearly():
    ones = "1" * 400
    assert (
        same_value(ones, ones)
        and not same_value(ones, ones[:-1] + "2")
        and not same_value(ones[:-1] + "2", ones)
    )
    assert (
        not same_value("3000001", "3000000")
        and same_value("8 / 3", "2.6666667")
        and same_value("2.0", "2")
    )
    assert not same_value("8 / 3", "2.667")


def write(path, rows):
    path.write_text(
        "".join(
            json.dumps(dict(zip(("input", "label", "rationale"), row))) + "\n"
            for row in rows
        )
    )
    return str(path)


ROWS = [
    ("1+1", "2", "one and one"),
    ("2+2", "4", "two and two, which is four"),
    ("3+3", "6", " "),
]


def test_both_documents_of_a_row_in_one_order(tmp_path):
    data = Rationales(
        path=write(tmp_path / "a.jsonl", ROWS),
        heldout=0.0,
        prompt_length=16,
        label_length=4,
        rationale_length=40,
        batch_size=3,
    )
    arrays = data.arrays("train")
    codec = data.codec
    for r, (question, label, rationale) in enumerate(ROWS):
        for prefix, name, target in (
            ("predict: ", "", label),
            ("explain: ", "explain_", rationale),
        ):
            tokens = arrays[f"{name}tokens"][r]
            mask = arrays[f"{name}mask"][r] > 0
            wanted = [*codec.encode(target), codec.eos] if target.strip() else []
            assert tokens[mask].tolist() == wanted
            assert codec.decode(tokens[:16]) == prefix + question
            assert (arrays[f"{name}segments"][r] > 0).sum() == len(
                prefix + question
            ) + 1 + len(wanted)  # bos
    assert arrays["prompt"].shape == (3, 16) and arrays["explain_tokens"].shape == (
        3,
        56,
    )


def test_prompts_that_are_too_long_are_left_out(tmp_path):
    path = write(tmp_path / "a.jsonl", [*ROWS, ("1" * 30, "x", "y")])
    assert (
        len(
            Rationales(path=path, heldout=0.0, prompt_length=16).arrays("train")[
                "tokens"
            ]
        )
        == 3
    )
    with pytest.raises(Refused, match="all 4 prompts are longer than 4 tokens"):
        Rationales(path=path, heldout=0.0, prompt_length=4).arrays("train")
    with pytest.raises(Refused, match="did you mean 'rationale'"):
        Rationales(path=path, heldout=0.0, rationale_key="rational").arrays("train")


@pytest.mark.parametrize("joined", [False, True])
def test_sums(joined, check_stream):
    data = Sums(size=300, wrong=0.0, joined=joined, batch_size=8)
    arrays = data.arrays("train")
    test = data.evaluation(2000)
    assert data.correct(arrays["tokens"]).all() and len(test["tokens"]) == 1000
    assert not {row.tobytes() for row in arrays["prompt"]} & {
        row.tobytes() for row in test["prompt"]
    }
    for digits, tokens, explain in zip(
        arrays["prompt"][:, 1:5], arrays["tokens"], arrays["explain_tokens"]
    ):
        partial = digits.cumsum()[1:] % 10
        assert explain.tolist() == [11, *digits, 12, *partial, 13]
        assert tokens.tolist() == [
            10,
            *digits,
            12,
            *(partial if joined else ()),
            partial[-1],
            13,
        ]
    # one token and the end
    assert arrays["mask"].sum(1).tolist() == [5.0 if joined else 2.0] * 300
    wrong = Sums(size=9000, wrong=0.03).arrays("train")
    share = np.mean(
        (
            wrong["explain_tokens"]
            != Sums(size=9000, wrong=0.0).arrays("train")["explain_tokens"]
        ).any(1)
    )
    assert abs(share - 0.03) < 5 * np.sqrt(0.03 * 0.97 / 9000)
    bad = arrays["tokens"].copy()
    bad[:, -2] = (bad[:, -2] + 1) % 10
    assert not data.correct(bad).any()
    check_stream(data)


def test_svamp(shared_data):
    """Counts and agreement as checked on the stored files."""
    gold, told = (svamp(shared_data / "svamp", labels) for labels in ("gt", "llm"))
    assert [len(gold[split]) for split in ("train", "test")] == [800 - 13, 200 - 2]
    assert all(row["label"] == row["gold"] for row in gold["train"] + told["test"])
    agree = np.mean(
        [same_value(row["label"], row["gold"]) for row in told["train"]]
    )
    assert 0.70 < agree < 0.80
    assert (
        gold["train"][0]["input"].startswith("Luke scored 84")
        and told["train"][0]["label"] == "(84 / 2)"
    )
    assert all(arithmetic(row["gold"]) is not None for row in gold["train"])


def test_gsm8k_answers_split_at_their_marker(shared_data, tmp_path):
    lines = (shared_data / "gsm8k" / "train.jsonl").read_text().splitlines()[:50]
    rows = [
        (
            json.loads(line)["question"],
            *reversed(json.loads(line)["answer"].split("\n#### ")),
        )
        for line in lines
    ]
    data = Rationales(
        path=write(tmp_path / "gsm.jsonl", rows),
        prompt_length=700,
        label_length=16,
        rationale_length=900,
        heldout=0.2,
    )
    arrays = data.arrays("train")
    assert (
        len(arrays["tokens"]) == 40
        and (arrays["explain_mask"].sum(1) > arrays["mask"].sum(1)).all()
    )


def test_svamp_problems_fit_and_their_own_equations_are_right(
    shared_data, check_stream
):
    """Nothing is left out; answers count by their value, whichever way they are written, and
    problems by what is asked.
    """
    gold, told = (
        SVAMP(path=str(shared_data / "svamp"), labels=labels, batch_size=16)
        for labels in ("gt", "llm")
    )
    assert (
        len(gold.arrays("train")["tokens"])
        == len(told.arrays("train")["tokens"])
        == 787
    )
    held = gold.evaluation(1000)
    assert (
        held["tokens"].shape == (198, 344 + 32)
        and gold.correct(held["tokens"]).all()
        and told.correct(held["tokens"]).all()
    )
    other = held["tokens"].copy()
    other[:, 344:] = np.roll(other[:, 344:], 1, 0)
    right = gold.correct(other)
    rows = {row[0]: row[1] for row in gold.records("test")}
    problems = [
        gold.codec.decode(row[:344]).removeprefix("predict: ")
        for row in held["tokens"]
    ]
    values = [arithmetic(rows[problem]) for problem in problems]
    assert (
        right.tolist()
        == [
            abs(a - b) <= 1e-6 * max(1, abs(b))
            for a, b in zip(np.roll(values, 1), values)
        ]
        and right.mean() < 0.2
    )
    junk = held["tokens"].copy()
    junk[:, 344:] = gold.codec.pad
    assert not gold.correct(junk).any()
    check_stream(gold)


def released(path, rows, texts) -> str:
    """A folder of SVAMP's files, of which each split has `rows` and `texts`."""
    for split in ("train", "test"):
        (path / f"svamp_{split}.json").write_text(json.dumps(rows))
    for name, part in {
        "train_CoT_0": texts[:1],
        "train_CoT_1": texts[1:],
        "test_CoT_0": texts,
    }.items():
        (path / f"palm_{name}.json").write_text(json.dumps(part))
    return str(path)


@pytest.mark.parametrize("pad", ["b", "</s>", "<s>"])
def test_answers_are_judged_whatever_pads(tmp_path, folder, pad):
    """Padding may be the begin or end token, or a letter of the text."""
    tokenizer = folder(bos=True, eos_token="</s>", pad_token=pad)
    problems = {"bbb and b": "(1 + 2)", "b and bb": "(2 + 3)", "and": "(3 + 4)"}
    rows = [
        {"input": problem, "label": label} for problem, label in problems.items()
    ]
    path = released(
        tmp_path,
        rows,
        [f"Sum. The answer is {label}." for label in problems.values()],
    )
    sizes = dict(prompt_length=40, label_length=12, rationale_length=16)
    data = SVAMP(
        path=path,
        tokenizer=str(tokenizer),
        batch_size=2,
        predict_prefix="",
        **sizes,
    )
    rows = data.arrays("test")
    assert data.correct(rows["tokens"]).all()
    assert not data.correct(
        np.concatenate([rows["tokens"][:, :40], rows["tokens"][::-1, 40:]], 1)
    )[[0, 2]].any()


@pytest.mark.parametrize(
    ("rows", "texts", "message"),
    [
        (
            [{"input": "a"}],
            ["x"],
            r"svamp_train.json item 0: key='label': expected input",
        ),
        (
            [{"input": "a", "label": 3}],
            ["x"],
            r"svamp_train.json item 0: expected text under 'label', found '3'",
        ),
        (
            ["a"],
            ["x"],
            r"svamp_train.json item 0: expected a JSON object with 'input'",
        ),
        (
            [{"input": "a", "label": "b"}],
            [3],
            r"palm_train_CoT_0.json item 0: expected text, found '3'",
        ),
    ],
)
def test_damaged_released_files(tmp_path, rows, texts, message):
    with pytest.raises(Refused, match=message):
        SVAMP(path=released(tmp_path, rows, texts)).spec()


def test_a_folder_without_the_released_files_is_refused(tmp_path):
    with pytest.raises(
        Refused, match=rf"data.path={tmp_path}: no svamp_train.json"
    ):
        SVAMP(path=str(tmp_path)).spec()
    (tmp_path / "svamp_train.json").write_text('{"input": "1 + 1", "label": "2"}\n')
    for name in ("palm_train_CoT_0.json", "palm_train_CoT_1.json"):
        (tmp_path / name).write_text('["One and one. The answer is (1 + 1)."]')
    with pytest.raises(Refused, match="2 rationales for 1 rows of train"):
        SVAMP(path=str(tmp_path)).spec()
