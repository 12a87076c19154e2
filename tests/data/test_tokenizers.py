import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.data.tokenizers import ByteTokenizer, load_tokenizer


@pytest.mark.parametrize("text", ["", "plain", "Zürich, 東京 🙂", "\x00\x7f\n"])
def test_bytes_round_trip(text):
    codec = load_tokenizer("byte")
    tokens = codec.encode(text)
    assert tokens.dtype == np.int32 and tokens.tolist() == list(text.encode())
    assert codec.decode(tokens) == text
    assert (
        codec.decode(
            [codec.bos, *tokens, codec.eos, codec.pad, codec.pad, -1, 10**6]
        )
        == text
    )


def test_bytes_decode_anything():
    codec = ByteTokenizer()
    for seed in range(20):
        assert isinstance(
            codec.decode(np.random.default_rng(seed).integers(-5, 300, 50)), str
        )
    assert codec.decode("é".encode()[:1]) == "�"
    assert len({codec.pad, codec.bos, codec.eos}) == 3 and {
        codec.pad,
        codec.bos,
        codec.eos,
    } == set(range(256, codec.vocab))


def test_stored_tokenizer(folder):
    path = folder(bos=True, eos_token="</s>")
    codec = load_tokenizer(str(path))
    tokens = codec.encode("the cat 🙂")
    assert (
        tokens.dtype == np.int32
        and len(tokens) < len("the cat 🙂".encode())
        and tokens.max() < codec.vocab
    )
    assert (
        codec.decode([codec.bos, *tokens, codec.eos, codec.vocab + 5, -1])
        == "the cat 🙂"
    )
    # eos pads where there is no pad token
    assert (codec.bos, codec.eos, codec.pad) == (
        0,
        1,
        1,
    )
    assert not {codec.bos, codec.eos} & set(tokens.tolist())


@pytest.mark.parametrize(
    "text", ["the cat and the dog", "Zürich, 東京 🙂", " \n\t the  end", ""]
)
def test_lengths_are_the_bytes_of_the_text(folder, text):
    for codec in (
        ByteTokenizer(),
        load_tokenizer(str(folder(bos=True, eos_token="</s>"))),
    ):
        tokens = codec.encode(text)
        lengths = codec.lengths(tokens)
        assert (
            lengths.dtype == np.int32
            and lengths.sum() == len(text.encode())
            and (lengths > 0).all()
        )
        assert codec.lengths(
            np.array([codec.bos, codec.eos, codec.pad])
        ).tolist() == [
            0,
            0,
            0,
        ]
        ends = np.cumsum(lengths)
        for i, end in enumerate(
            ends
        ):  # wherever a prefix is whole characters, it decodes to these bytes
            if codec.decode(tokens[: i + 1]) in text:
                assert codec.decode(tokens[: i + 1]).encode() == text.encode()[:end]


def test_lengths_of_sentencepiece(tmp_path):
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = [
        "<unk>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "\u2581",
        "a",
        "b",
        "é",
        "\u2581a",
        "ab",
    ]
    inner = Tokenizer(
        models.BPE(
            {p: i for i, p in enumerate(pieces)},
            [("\u2581", "a"), ("a", "b")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    codec = load_tokenizer(str(tmp_path))
    # "_a" "b" "_" "é" and three bytes
    assert codec.lengths(codec.encode("ab é東")).tolist() == [
        2,
        1,
        1,
        2,
        1,
        1,
        1,
    ]


def test_bos_only_where_the_tokenizer_puts_it(folder):
    assert load_tokenizer(str(folder(bos=False, eos_token="</s>"))).bos is None


def test_refused(folder, tmp_path):
    with pytest.raises(
        Refused, match="tokenizer='bite': expected 'byte' or a folder"
    ):
        load_tokenizer("bite")
    with pytest.raises(Refused, match="not a tokenizer folder"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(Refused, match="has no end-of-text token"):
        load_tokenizer(str(folder(bos=True)))


def stored(path, model, split=True, begins=False, **special):
    """The codec of a small tokenizer folder; `begins`: "<e>" stands before every text."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(model)
    if split:
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begins:
        inner.post_processor = processors.TemplateProcessing(
            single="<e> $A", special_tokens=[("<e>", model.token_to_id("<e>"))]
        )
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(path)
    return load_tokenizer(str(path))


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("words", ["1 2 +", "a b", "b <u>"])
def test_small_vocabularies(tmp_path, words, begins):
    """Whether texts begin with bos is seen without the letter "a", and where unknown words and bos
    are one token.
    """
    from tokenizers import models

    vocab = {word: i for i, word in enumerate([*words.split(), "<e>"])}
    unknown = "<u>" if "<u>" in vocab else None
    codec = stored(
        tmp_path,
        models.WordLevel(vocab, **({"unk_token": unknown} if unknown else {})),
        begins=begins,
        bos_token="<e>",
        eos_token="<e>",
    )
    assert (
        codec.bos == (vocab["<e>"] if begins else None)
        and codec.eos == codec.pad == vocab["<e>"]
    )
    first = words.split()[0]
    assert codec.encode(f"{first} {first}").tolist() == [0, 0]
    if unknown:
        assert codec.encode("what").tolist() == [vocab["<u>"]]
    else:
        with pytest.raises(
            Refused, match=rf"tokenizer={tmp_path}: cannot encode 'what' \(.*UNK"
        ):
            codec.encode("what")


def test_characters_do_not_vanish(tmp_path):
    from tokenizers import models

    codec = stored(
        tmp_path,
        models.BPE({"a": 0, "b": 1, "ab": 2, "</s>": 3}, [("a", "b")]),
        eos_token="</s>",
    )
    assert codec.encode("ab ba").tolist() == [2, 1, 0]
    with pytest.raises(
        Refused, match="no token, not even an unknown one, for a part of 'ab cab'"
    ):
        codec.encode("ab cab")


def test_ids_with_gaps(tmp_path):
    from tokenizers import models

    codec = stored(
        tmp_path, models.WordLevel({"a": 0, "b": 7, "</s>": 9}), eos_token="</s>"
    )
    assert codec.vocab == 10 and codec.encode("b a").tolist() == [7, 0]
    assert codec.lengths(np.int32([0, 7, 9])).tolist() == [1, 1, 0]


def test_marks_of_words_are_no_text(tmp_path):
    from tokenizers import models

    words = stored(
        tmp_path / "a",
        models.WordPiece(
            {"a": 0, "##b": 1, "##é": 2, "</s>": 3, "?": 4}, unk_token="?"
        ),
        eos_token="</s>",
    )
    assert words.lengths(words.encode("abé")).tolist() == [1, 1, 2]
    assert words.texts()[:4] == ["a", "b", "é", None]
    vocab = {"a": 0, "b": 1, "b</w>": 2, "ab</w>": 3, "</s>": 4}
    pairs = stored(
        tmp_path / "b",
        models.BPE(vocab, [("a", "b</w>")], end_of_word_suffix="</w>"),
        eos_token="</s>",
    )
    assert pairs.lengths(pairs.encode("ab bb")).tolist() == [2, 1, 1]
    assert pairs.texts() == ["a", "b", "b", "ab", None]


def test_the_same_text_has_the_same_tokens(tmp_path):
    from tokenizers import models

    codec = stored(
        tmp_path,
        models.BPE({"a": 0, "b": 1, "ab": 2, "</s>": 3}, [("a", "b")], dropout=0.9),
        eos_token="</s>",
    )
    for _ in range(5):
        assert codec.encode("ab" * 20).tolist() == [2] * 20


@pytest.mark.parametrize(
    ("template", "begin"),
    [
        ("$A <e>", None),
        ("<e> $A", 2),
        ("<b> $A <e>", 3),
        ("<e> <b> $A <e>", "begins every text with 2 tokens (<e> <b>)"),
    ],
)
def test_what_texts_begin_with(tmp_path, template, begin):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<e>": 2, "<b>": 3}))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<e>", 2), ("<b>", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<e>"
    ).save_pretrained(tmp_path)
    if isinstance(begin, str):
        with pytest.raises(Refused) as refused:
            load_tokenizer(str(tmp_path))
        assert begin in str(refused.value)
        return
    codec = load_tokenizer(str(tmp_path))
    assert codec.bos == begin and codec.encode("a b").tolist() == [0, 1]
    if begin is not None:
        assert (
            codec.lengths(np.int32([begin])).tolist() == [0]
            and codec.texts()[begin] is None
        )
