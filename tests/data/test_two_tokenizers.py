import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.data.language import Markov
from jaxdistill.data.text import PaddedJson
from jaxdistill.data.tokenizers import load_tokenizer
from jaxdistill.data.two_tokenizers import AlignedJson, Blocks

TEXTS = [
    ("Ask:", "the cat and the dog"),
    ("Zürich?", "東京 🙂 the end"),
    ("x" * 99, "no"),
]
ROWS = [{"prompt": prompt, "response": response} for prompt, response in TEXTS]


@pytest.fixture(scope="module")
def data(folder, tmp_path_factory):
    where = tmp_path_factory.mktemp("rows")
    for split in ("train", "test"):
        (where / f"{split}.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    merged = str(folder(bos=True, eos_token="</s>"))
    return AlignedJson(
        path=str(where),
        teacher_tokenizer=merged,
        prompt_length=14,
        response_length=32,
        batch_size=2,
    )


def test_both_sides_of_every_span_are_the_same_text(data):
    rows = data.arrays("train")
    assert len(rows["tokens"]) == 2  # the third prompt is too long
    teacher = load_tokenizer(data.teacher_tokenizer)
    for r, row in enumerate(ROWS[:2]):
        texts = []
        for codec, prefix in ((data.codec, ""), (teacher, "teacher_")):
            tokens, span, mask = (
                rows[f"{prefix}{k}"][r] for k in ("tokens", "span", "mask")
            )
            assert (span >= 0).sum() == mask.sum() and (
                (span >= 0) == (mask > 0)
            ).all()
            texts.append(
                [tokens[span == number] for number in range(span.max() + 1)]
            )
            # the end is a span of its own
            assert texts[-1][-1].tolist() == [codec.eos]
            whole = codec.decode(tokens[rows[f"{prefix}segments"][r] > 0])
            assert whole == row["prompt"] + "\n" + row["response"]
        assert len(texts[0]) == len(texts[1])
        for ours, theirs in zip(*texts):
            assert data.codec.lengths(ours).sum() == teacher.lengths(theirs).sum()
            if "�" not in teacher.decode(theirs):
                assert data.codec.decode(ours) == teacher.decode(theirs)


def test_the_students_side_is_padded_json(data):
    plain = PaddedJson(path=data.path, prompt_length=14, response_length=32).arrays(
        "train"
    )
    ours = data.arrays("train")
    for name in plain:
        np.testing.assert_array_equal(ours[name], plain[name])


def test_cut_responses_have_no_half_spans(data):
    rows = dataclasses.replace(
        data, response_length=9, teacher_response_length=3
    ).arrays("train")
    for r in range(2):
        ours = rows["span"][r]
        theirs = rows["teacher_span"][r]
        assert (
            set(ours) == set(theirs)
            and rows["teacher_mask"][r].sum() == 3
            and (ours >= 0).sum() <= 9
        )
    words = dataclasses.replace(data, ends="words").arrays("train")
    assert words["span"].max(1).tolist() == [5, 4]  # the words and the end


def test_spans_end_where_the_sides_differ_little(data):
    """The finest spans with any bias, and fewer with less; both sides keep the same spans."""
    finest = data.arrays("train")
    for bias, same in ((1.0, True), (0.0, False)):
        rows = dataclasses.replace(data, ends="unbiased", bias=bias).arrays("train")
        assert np.array_equal(rows["span"], finest["span"]) == same
        assert (rows["span"].max(1) == rows["teacher_span"].max(1)).all()
        for r in range(2):
            inside = rows["span"][r] >= 0
            pairs = set(
                zip(
                    rows["span"][r][inside].tolist(),
                    finest["span"][r][inside].tolist(),
                )
            )
            # pieces are merged, none is cut
            assert len(pairs) == len({fine for _, fine in pairs})
    with pytest.raises(
        Refused,
        match=r"data\.bias=2: expected a finite number of at least 0 and at most 1",
    ):
        dataclasses.replace(data, bias=2)


def test_tokens_that_begin_with_white_space_travel_with_the_rows(data):
    rows = dataclasses.replace(data, space=True).arrays("train")
    assert "space" not in data.arrays("train")
    ours = np.unpackbits(rows["space"], 1)[:, : data.codec.vocab]
    assert (
        (ours == ours[0]).all()
        and set(np.flatnonzero(ours[0]).tolist()) >= {32, 10, 256, 257, 258}
        and not ours[0, ord("a")]
    )
    teacher = load_tokenizer(data.teacher_tokenizer)
    theirs = np.unpackbits(rows["teacher_space"], 1)[0, : teacher.vocab]
    for i, text in enumerate(teacher.texts()):
        assert theirs[i] == (
            text[:1].isspace() if text else teacher.lengths(np.array([i]))[0] == 0
        )


def test_refusals(data, tmp_path):
    with pytest.raises(Refused, match=r"data.ends='word'"):
        AlignedJson(ends="word")
    with pytest.raises(
        Refused, match="no prompt fits, of 2 tokens and the teacher's 14"
    ):
        dataclasses.replace(data, prompt_length=2, teacher_prompt_length=14).arrays(
            "train"
        )
    with pytest.raises(Refused, match="expected an even number"):
        Blocks(length=7)


def test_stream(check_stream):
    check_stream(Blocks(vocab=5, branch=2, length=8, batch_size=8))
    check_stream(Blocks(vocab=5, branch=2, length=8, batch_size=8, size=20))


def test_few_rows_come_again():
    data = Blocks(vocab=5, branch=2, length=8, batch_size=50, size=6)
    assert (
        len(
            {
                row.tobytes()
                for i in range(3)
                for row in data.batch(i, slice(None))["tokens"]
            }
        )
        == 6
    )


def test_blocks_are_the_symbols_and_their_law_is_exact():
    """log p of a block = sum of its symbols' exact log-probabilities."""
    data = Blocks(vocab=5, branch=2, length=12, batch_size=16, seed=3)
    batch = data.batch(0, slice(None))
    plain = Markov(vocab=5, branch=2, length=12, batch_size=16, seed=3)
    np.testing.assert_array_equal(
        batch["tokens"], plain.batch(0, slice(None))["tokens"]
    )
    a, b = np.divmod(batch["teacher_tokens"], 5)
    np.testing.assert_array_equal(
        np.stack([a, b], -1).reshape(16, 12), batch["tokens"]
    )
    law = jax.nn.log_softmax(data.net().apply({}, batch["teacher_tokens"]))
    blocks = np.take_along_axis(
        np.asarray(law)[:, :-1], batch["teacher_tokens"][:, 1:, None], -1
    )[..., 0]
    np.testing.assert_allclose(
        blocks,
        plain.log_probs(batch["tokens"]).reshape(16, 6, 2).sum(-1)[:, 1:],
        rtol=1e-4,
    )
    assert batch["span"][0].tolist() == [
        -1,
        -1,
        1,
        1,
        2,
        2,
        3,
        3,
        4,
        4,
        5,
        5,
    ] and batch["teacher_span"][0].tolist() == [-1, 1, 2, 3, 4, 5]
