"""What every loader promises, as checks that the tests of each data set call."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest


def take(loader, n: int) -> list[dict]:
    return [next(loader) for _ in range(n)]


def identities(batch: dict) -> list[bytes]:
    """Each sample of a batch as bytes, all keys together."""
    size = len(next(iter(batch.values())))
    return [
        b"|".join(
            np.ascontiguousarray(batch[k][i]).tobytes() for k in sorted(batch)
        )
        for i in range(size)
    ]


def gathered(data, processes: int, start, n: int) -> tuple[list[list[bytes]], dict]:
    """The next `n` global batches after state `start`, each put together from all processes' rows,
    and the new state.
    """
    loaders = [data.loader((p, processes)) for p in range(processes)]
    for loader in loaders:
        if start is not None:
            loader.set_state(json.loads(json.dumps(start)))
    parts = zip(*(take(loader, n) for loader in loaders))
    batches = [list(itertools.chain(*map(identities, batch))) for batch in parts]
    states = [loader.get_state() for loader in loaders]
    assert all(state == states[0] for state in states)
    return batches, states[0]


@pytest.fixture
def check_stream():
    """Deterministic, resumable in the middle, the same global batches for 1, 2 and 4 processes."""

    def check(data, n: int = 4):
        expected, end = gathered(data, 1, None, n)
        assert len(set(map(tuple, map(sorted, expected)))) == n, "batches repeat"
        again, _ = gathered(data, 1, None, n)
        assert again == expected
        for processes in (2, 4):
            batches, state = gathered(data, processes, None, n)
            assert (
                list(map(sorted, batches)) == list(map(sorted, expected))
                and state == end
            )
        _, middle = gathered(data, 1, None, n // 2)
        resumed, state = gathered(data, 1, middle, n - n // 2)
        assert resumed == expected[n // 2 :] and state == end

    return check


@pytest.fixture
def check_epochs():
    """Each of `size` different samples exactly once per epoch, in a new order, also where the
    processes change.
    """

    def check(data, size: int, shuffled: bool = True):
        n = -(-3 * size // data.batch_size)
        whole, _ = gathered(data, 1, None, n)
        stream = list(itertools.chain(*whole))
        epochs = [stream[e * size : (e + 1) * size] for e in range(3)]
        for epoch in epochs:
            assert len(set(epoch)) == size
            assert set(epoch) == set(epochs[0])
        assert (epochs[0] != epochs[1]) == shuffled
        mixed = []
        state = None
        for processes, share in zip(
            itertools.cycle((1, 4, 2)), np.diff(np.linspace(0, n, 6).astype(int))
        ):
            batches, state = gathered(data, processes, state, int(share))
            mixed += batches
        assert Counter(itertools.chain(*mixed)) == Counter(stream)

    return check


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level BPE tokenizer as `transformers` stores it; `bos` true: it begins every text with
    <s>.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    def make(bos: bool, **special):
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = BpeTrainer(
            vocab_size=300,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        inner.train_from_iterator(["the cat and the dog and the end"] * 9, trainer)
        if bos:
            inner.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 0)]
            )
        path = tmp_path_factory.mktemp("tokenizer")
        PreTrainedTokenizerFast(
            tokenizer_object=inner, bos_token="<s>", **special
        ).save_pretrained(path)
        return path

    return make
