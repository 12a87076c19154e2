import json
import os

import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.data.text import PackedJson, PaddedJson, Text, pack
from jaxdistill.data.tokenizers import ByteTokenizer

CODEC = ByteTokenizer()


def lines(n: int, seed: int = 0) -> list[dict]:
    """Prompts and responses of random letters; their first characters number them."""
    rng = np.random.default_rng(seed)
    word = lambda: "".join(map(chr, rng.integers(97, 123, rng.integers(1, 12))))
    return [
        {"prompt": f"{i:02}{word()}", "response": word(), "other": i}
        for i in range(n)
    ]


@pytest.fixture
def letters(tmp_path):
    """A text file of 1,000 random letters."""
    file = tmp_path / "letters.txt"
    file.write_bytes(
        bytes(np.random.default_rng(0).integers(97, 123, 1000, np.uint8))
    )
    return file


@pytest.fixture
def jsonl(tmp_path):
    file = tmp_path / "all.jsonl"
    file.write_text("\n".join(map(json.dumps, lines(20))) + "\n\n")
    return file


def documents(batch: dict) -> list[tuple[str, str]]:
    """(what is context, what is target) of every document in a packed batch."""
    found = []
    for r in range(len(batch["tokens"])):
        for segment in range(1, batch["segments"][r].max() + 1):
            here = batch["segments"][r] == segment
            tokens = batch["tokens"][r][here]
            mask = batch["mask"][r][here]
            assert batch["positions"][r][here].tolist() == list(range(here.sum()))
            assert (
                tokens[0] == CODEC.bos and tokens[-1] == CODEC.eos and mask[-1] == 1
            )
            assert (np.diff(mask) >= 0).all()
            found.append(
                (CODEC.decode(tokens[mask == 0]), CODEC.decode(tokens[mask == 1]))
            )
    return found


def test_text_windows_make_every_token_a_target_once(letters):
    text = letters.read_bytes()
    train = Text(path=str(letters), length=12, heldout=0.1).arrays("train")
    assert train["tokens"].dtype == np.int32 and train["mask"].dtype == np.float32
    targets = train["tokens"][train["mask"] == 1]
    assert bytes(targets.astype(np.uint8)) == text[1 : 1 + len(targets)]
    assert 900 - 1 - len(targets) < 11  # what is left fills no window
    assert (train["mask"].sum(1) == 11).all() and (train["mask"][:, 0] == 0).all()


def test_text_holds_the_end_out(letters):
    text = letters.read_bytes()
    data = Text(path=str(letters), length=12, heldout=0.1)
    test = data.evaluation(100)["tokens"]
    assert bytes(test[0].astype(np.uint8)) == text[900:912] and len(test) == 9
    assert data.arrays("train")["tokens"].max() < 256


def test_text_stream(letters, check_stream, check_epochs):
    data = Text(path=str(letters), length=20, batch_size=8)
    check_stream(data)
    check_epochs(data, 47)  # (900 - 1) // 19


@pytest.mark.parametrize("kind", [PackedJson, PaddedJson])
def test_json_stream(jsonl, kind, check_stream, check_epochs):
    sizes = (
        {"length": 40}
        if kind is PackedJson
        else {"prompt_length": 20, "response_length": 16}
    )
    data = kind(path=str(jsonl), batch_size=4, **sizes)
    check_stream(data, 2)
    check_epochs(data, len(data.arrays("train")["tokens"]))


def test_packed_rows_hold_every_document_once_and_whole(jsonl):
    data = PackedJson(path=str(jsonl), length=50, heldout=0.2)
    found = {split: documents(data.arrays(split)) for split in ("train", "test")}
    assert (len(found["train"]), len(found["test"])) == (16, 4)
    want = [(item["prompt"] + "\n", item["response"]) for item in lines(20)]
    assert sorted(found["train"] + found["test"]) == sorted(want)
    train = data.arrays("train")
    empty = train["segments"] == 0
    assert (train["tokens"][empty] == CODEC.pad).all() and (
        train["mask"][empty] == 0
    ).all()
    assert len(train["tokens"]) < 16, "nothing was packed"


def test_long_responses_lose_their_end_and_long_prompts_are_left_out(tmp_path):
    file = tmp_path / "a.jsonl"
    items = [("a" * 3, "b" * 30), ("c" * 18, "d"), ("e" * 17, "f"), ("g" * 19, "h")]
    file.write_text(
        "\n".join(json.dumps({"prompt": p, "response": r}) for p, r in items)
    )
    packed = PackedJson(path=str(file), length=20, heldout=0, between="").arrays(
        "train"
    )
    rows = sorted(CODEC.decode(row) for row in packed["tokens"])
    # bos takes a place
    assert rows == [
        "aaa" + "b" * 16,
        "c" * 18 + "d",
        "e" * 17 + "f",
    ]
    # none where a response was cut
    assert sorted((packed["tokens"] == CODEC.eos).sum(1)) == [
        0,
        0,
        1,
    ]
    padded = PaddedJson(
        path=str(file), prompt_length=18, response_length=2, heldout=0, between=""
    ).arrays("train")
    assert sorted(CODEC.decode(row) for row in padded["tokens"]) == [
        "aaabb",
        "e" * 17 + "f",
    ]


def test_padded_rows(jsonl):
    out = PaddedJson(
        path=str(jsonl), prompt_length=20, response_length=14, heldout=0.2
    ).arrays("train")
    assert out["tokens"].shape == (16, 34) and out["prompt"].shape == out[
        "prompt_mask"
    ].shape == (
        16,
        20,
    )
    assert out["prompt_mask"].dtype == bool and out["mask"].dtype == np.float32
    want = {item["prompt"]: item["response"] for item in lines(20)}
    for r in range(16):
        pads = 20 - out["prompt_mask"][r].sum()
        assert (
            not out["prompt_mask"][r, :pads].any()
            and (out["prompt"][r, :pads] == CODEC.pad).all()
        )
        assert (
            out["prompt"][r, pads] == CODEC.bos
            and (out["prompt"][r] == out["tokens"][r, :20]).all()
        )
        response = out["tokens"][r, 20:][out["mask"][r, 20:] == 1]
        assert response[-1] == CODEC.eos and out["mask"][r, :20].sum() == 0
        assert want[CODEC.decode(out["prompt"][r])[:-1]] == CODEC.decode(response)
        real = out["segments"][r] == 1
        assert (
            out["positions"][r][real].tolist() == list(range(real.sum()))
            and (out["tokens"][r][~real] == CODEC.pad).all()
        )


def test_json_list_and_folder(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps(lines(6), indent=2))
    (tmp_path / "test.jsonl").write_text(
        "\n".join(map(json.dumps, lines(3, seed=1)))
    )
    data = PackedJson(path=str(tmp_path), length=60)
    assert data.samples("train") == [(i["prompt"], i["response"]) for i in lines(6)]
    assert data.samples("test") == [
        (i["prompt"], i["response"]) for i in lines(3, seed=1)
    ]
    (tmp_path / "test.jsonl").unlink()
    halves = PackedJson(path=str(tmp_path), length=60, heldout=0.5)
    assert sorted(halves.samples("train") + halves.samples("test")) == sorted(
        data.samples("train") + data.samples("test")
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"prompt": "a", "response": "b"}\n{"prompt": "a"',
            r"a.jsonl:2: expected JSON \(.* at column",
        ),
        (
            '{"prompt": "a", "response": "b"}\n\n["prompt"]',
            r"a.jsonl:3: expected a JSON object with 'prompt', found",
        ),
        (
            '{"prompt": "a", "respones": "b"}',
            r"a.jsonl:1: key='response': did you mean 'respones'\?",
        ),
        (
            '{"prompt": "a", "response": 3}',
            r"a.jsonl:1: expected text under 'response', found '3'",
        ),
        (
            '[\n{"prompt": "a", "response": "b"},\n{"prompt": }]',
            r"a.jsonl:3: expected JSON",
        ),
        (
            '[{"prompt": "a", "response": "b"}, {"promt": "a"}]',
            r"a.jsonl item 1: key='prompt': did you mean 'promt'\?",
        ),
        (
            '{"prompt": "a", "response": "b", "n": ' + "1" * 5000 + "}",
            r"a.jsonl:1: JSON that cannot be read \(Exceeds the limit",
        ),
        (
            '{"prompt": "a", "response": ' + "[" * 100_000,
            r"a.jsonl:1: JSON that cannot be read \(maximum recursion depth",
        ),
        (
            '["a", "b"]',
            r"a.jsonl item 0: expected a JSON object with 'prompt', found 'a'",
        ),
        (
            '{"prompt": "aaaaaaaaaaaa", "response": "b"}',
            r"all 1 prompts are longer than 9 tokens",
        ),
        ("\n", "PackedJson has no train samples"),
    ],
)
def test_json_refused(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(Refused, match=message) as refused:
        PackedJson(path=str(tmp_path / "a.jsonl"), length=10, heldout=0).spec()
    assert "\n" not in str(refused.value)


ROWS = [
    {"prompt": "p\u2028q", "response": "r\x85s"},
    {"prompt": "b", "response": "c"},
]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "bom"])
@pytest.mark.parametrize(
    "end", ["\n", "\r\n", "\r", "\n \n\t\n"], ids=["lf", "crlf", "cr", "blank"]
)
@pytest.mark.parametrize("kind", ["lines", "list", "indented"])
def test_the_same_samples_however_lines_end(tmp_path, kind, end, mark):
    text = (
        LINES
        if kind == "lines"
        else json.dumps(
            ROWS, ensure_ascii=False, indent=2 if kind == "indented" else None
        )
    )
    (tmp_path / "a.jsonl").write_bytes(
        mark + text.replace("\n", end).encode() + end.encode()
    )
    data = PackedJson(path=str(tmp_path / "a.jsonl"), length=32, heldout=0)
    assert data.samples("train") == [
        (row["prompt"], row["response"]) for row in ROWS
    ]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "bom"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
def test_running_text_has_one_kind_of_line_end(tmp_path, end, mark):
    text = "one\n\ntwo\u2028three\x85\n" * 9
    (tmp_path / "a.txt").write_bytes(mark + text.replace("\n", end).encode())
    assert CODEC.decode(Text(path=str(tmp_path / "a.txt")).tokens) == text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            "ab".encode("utf-16"),
            "a.txt: begins with the mark of UTF-16, expected UTF-8",
        ),
        (b"\xfe\xff\0a", "a.txt: begins with the mark of UTF-16"),
        ("ab".encode("utf-16-le"), "a.txt: byte 1 is 0, expected text in UTF-8"),
        ("ab".encode("utf-32-be"), "a.txt: byte 0 is 0"),
        (b"a\xed\xa0\xbdb", "a.txt: byte 1 is not UTF-8"),
    ],
)
def test_other_encodings_are_refused(tmp_path, data, message):
    (tmp_path / "a.txt").write_bytes(data)
    for kind in (Text, PackedJson):
        with pytest.raises(Refused, match=message):
            kind(path=str(tmp_path / "a.txt")).check()


@pytest.mark.parametrize("path", ["/dev/zero", "pipe"])
def test_text_without_end_is_refused(tmp_path, path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Refused, match="not a regular file"):
        Text(path=str(tmp_path / path)).check()


@pytest.mark.parametrize(
    ("line", "where"),
    [
        (
            '{"prompt": "a \\ud83d b", "response": "c"}',
            r"a.jsonl:2: \\ud83d is half",
        ),
        (
            '{"prompt": "a", "response": "c \\uDE00\\ud83d"}',
            r"a.jsonl:2: \\ude00 is half",
        ),
        (
            '{"prompt": "a", "response": "c", "\\udfff": 1}',
            r"a.jsonl:2: \\udfff is half",
        ),
    ],
)
def test_half_a_surrogate_pair_is_refused(tmp_path, line, where):
    """In lines and in a list, and wherever in the object it stands."""
    first = '{"prompt": "a \\ud83d\\ude00 b", "response": "c"}'
    (tmp_path / "a.jsonl").write_text(f"{first}\n{line}\n")
    with pytest.raises(Refused, match=where):
        PackedJson(path=str(tmp_path / "a.jsonl")).samples("train")
    (tmp_path / "a.jsonl").write_text(f"[{first}, {line}]")
    with pytest.raises(Refused, match=where.replace(":2", " item 1")):
        PackedJson(path=str(tmp_path / "a.jsonl")).samples("train")
    (tmp_path / "a.jsonl").write_text(first)
    assert PackedJson(path=str(tmp_path / "a.jsonl"), heldout=0).samples(
        "train"
    ) == [("a \U0001f600 b", "c")]


def test_text_refused(tmp_path, letters):
    with pytest.raises(
        Refused,
        match=r"data.length=901: expected 2 to 900, the tokens of .* kept for train",
    ):
        Text(path=str(letters), length=901).spec()
    with pytest.raises(Refused, match=r"data.length=12: expected 2 to 0"):
        Text(path=str(letters), length=12, heldout=0).evaluation(1)
    with pytest.raises(Refused, match=r"data.heldout=2"):
        Text(path=str(letters), heldout=2).spec()
    with pytest.raises(Refused, match="a folder, expected a text file"):
        Text(path=str(tmp_path)).spec()
    (tmp_path / "latin").write_bytes("Zürich".encode("latin-1"))
    with pytest.raises(Refused, match="latin: byte 1 is not UTF-8"):
        Text(path=str(tmp_path / "latin")).spec()
    with pytest.raises(Refused, match=r"no train.jsonl or train.json"):
        PackedJson(path=str(tmp_path)).spec()


@pytest.mark.parametrize("seed", range(5))
def test_packing(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 65, 200).tolist()
    rows = pack(sizes, 64)
    assert sorted(i for row in rows for i in row) == list(range(200))
    fill = [sum(sizes[i] for i in row) for row in rows]
    assert max(fill) <= 64
    assert sum(sorted(fill)[:2]) > 64  # no two rows fit into one
    assert pack([], 8) == [] and pack([8, 8], 8) == [[0], [1]]


@pytest.mark.shared_data
def test_shakespeare(shared_data):
    data = Text(
        path=str(shared_data / "tinyshakespeare" / "input.txt"), batch_size=8
    )
    assert CODEC.decode(data.arrays("train")["tokens"][0]).startswith(
        "First Citizen:\nBefore we proceed"
    )
    assert (
        data.codec.decode(data.tokens)
        == (shared_data / "tinyshakespeare" / "input.txt").read_text()
    )


@pytest.mark.shared_data
def test_gsm8k(shared_data):
    data = PackedJson(
        path=str(shared_data / "gsm8k"),
        prompt_key="question",
        response_key="answer",
        length=2048,
    )
    assert (len(data.samples("train")), len(data.samples("test"))) == (7473, 1319)
    test = data.arrays("test")
    assert (test["segments"] > 0).mean() > 0.9
    answers = [target for _, target in documents(test)]
    assert len(answers) == 1319 and all("\n#### " in answer for answer in answers)


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "size"), [("svamp_train.json", 800), ("svamp_test.json", 200)]
)
def test_svamp(shared_data, name, size):
    data = PaddedJson(
        path=str(shared_data / "svamp" / name),
        prompt_key="input",
        response_key="label",
        heldout=0,
        prompt_length=400,
    )
    assert len(data.arrays("train")["tokens"]) == size
