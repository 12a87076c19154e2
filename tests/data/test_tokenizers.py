import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.data.tokenizers import ByteTokenizer, load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level BPE tokenizer as `transformers` stores it; `bos` true: it begins every text with <s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    def make(bos: bool, **special):
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        inner.train_from_iterator(["the cat and the dog and the end"] * 9, trainer)
        if bos:
            inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        path = tmp_path_factory.mktemp("tokenizer")
        PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", **special).save_pretrained(path)
        return path

    return make


@pytest.mark.parametrize("text", ["", "plain", "Zürich, 東京 🙂", "\x00\x7f\n"])
def test_bytes_round_trip(text):
    codec = load_tokenizer("byte")
    tokens = codec.encode(text)
    assert tokens.dtype == np.int32 and tokens.tolist() == list(text.encode())
    assert codec.decode(tokens) == text
    assert codec.decode([codec.bos, *tokens, codec.eos, codec.pad, codec.pad, -1, 10**6]) == text


def test_bytes_decode_anything():
    codec = ByteTokenizer()
    for seed in range(20):
        assert isinstance(codec.decode(np.random.default_rng(seed).integers(-5, 300, 50)), str)
    assert codec.decode("é".encode()[:1]) == "�"
    assert len({codec.pad, codec.bos, codec.eos}) == 3 and {codec.pad, codec.bos, codec.eos} == set(range(256, codec.vocab))


def test_stored_tokenizer(folder):
    path = folder(bos=True, eos_token="</s>")
    codec = load_tokenizer(str(path))
    tokens = codec.encode("the cat 🙂")
    assert tokens.dtype == np.int32 and len(tokens) < len("the cat 🙂".encode()) and tokens.max() < codec.vocab
    assert codec.decode([codec.bos, *tokens, codec.eos, codec.vocab + 5, -1]) == "the cat 🙂"
    assert (codec.bos, codec.eos, codec.pad) == (0, 1, 1)  # eos pads where there is no pad token
    assert not {codec.bos, codec.eos} & set(tokens.tolist())


def test_bos_only_where_the_tokenizer_puts_it(folder):
    assert load_tokenizer(str(folder(bos=False, eos_token="</s>"))).bos is None


def test_refused(folder, tmp_path):
    with pytest.raises(Refused, match="tokenizer='bite': expected 'byte' or a folder"):
        load_tokenizer("bite")
    with pytest.raises(Refused, match="not a tokenizer folder"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(Refused, match="has no end-of-text token"):
        load_tokenizer(str(folder(bos=True)))
