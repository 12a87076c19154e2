import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from jaxdistill.core.types import Refused
from jaxdistill.data.tokenizers import ByteTokenizer
from jaxdistill.objectives import verifiers
from jaxdistill.objectives.reward import AtLeast, Exact, Share, Verified

ANSWER = jnp.array([[9, 9, 1, 2, 3, 0], [9, 9, 4, 5, 3, 0]])
ANSWER_MASK = jnp.array([[0, 0, 1, 1, 1, 0]] * 2, jnp.float32)


def batch(tokens, mask):
    return {"tokens": jnp.array(tokens), "mask": jnp.array(mask, jnp.float32), "answer": ANSWER, "answer_mask": ANSWER_MASK}


@pytest.mark.parametrize(
    ("row", "mask", "exact", "share"),
    [
        ([9, 9, 1, 2, 3, 0], [0, 0, 1, 1, 1, 0], 1, 1),
        ([9, 9, 1, 2, 3, 7], [0, 0, 1, 1, 1, 0], 1, 1),  # what follows the end is padding
        ([9, 9, 1, 2, 3, 7], [0, 0, 1, 1, 1, 1], 0, 1),  # one token too many
        ([9, 9, 1, 8, 3, 0], [0, 0, 1, 1, 1, 0], 0, 2 / 3),
        ([9, 9, 1, 2, 0, 0], [0, 0, 1, 1, 0, 0], 0, 2 / 3),  # one too few
        ([7, 9, 8, 8, 8, 8], [0, 0, 1, 1, 1, 1], 0, 0),
    ],
)
def test_exact_and_share(row, mask, exact, share):
    other = [9, 9, 4, 5, 3, 0], [0, 0, 1, 1, 1, 0]
    both = batch([row, other[0]], [mask, other[1]])
    for reward, value in ((Exact(), exact), (Share(), share), (AtLeast(least=0.6), share >= 0.6)):
        score, failed = reward(both)
        np.testing.assert_allclose(score, [value, 1], rtol=1e-6)
        assert not failed.any()


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("so it is 42.", "#### 42", 1),
        ("7 then 1,234.50 dollars", "1234.5", 1),
        ("42 is not 43", "42", 0),
        ("minus -3", "-3", 1),
        ("none", "0", 0),
    ],
)
def test_last_number(response, answer, right):
    assert verifiers.last_number("2 + 2", response, answer) == right


def test_exact_text():
    assert verifiers.exact_text("", " a  b\n", "a b") == 1 and verifiers.exact_text("", "ab", "a b") == 0


def moody(prompt, response, answer):
    """Does what the response says."""
    time.sleep(30) if response == "hang" else None
    os._exit(1) if response == "die" else None
    return {"one": 1, "half": 0.5, "nan": float("nan"), "bool": response == "bool", "prompt": prompt == "?"}[response]


def texts(*responses, width=8):
    """Rows "?" response answer of bytes, the prompt padded on the left."""
    codec = ByteTokenizer()
    rows = {name: np.zeros((len(responses), 2 * width), np.int32) for name in ("tokens", "mask", "segments", "answer", "answer_mask")}
    for i, text in enumerate(responses):
        ids = codec.encode(text)
        rows["tokens"][i, width - 1] = ord("?")
        rows["tokens"][i, width : width + len(ids)] = ids
        rows["mask"][i, width : width + len(ids)] = 1
        rows["segments"][i, width - 1 : width + len(ids)] = 1
        rows["answer"][i, width] = ord("5")
        rows["answer_mask"][i, width] = 1
    return {k: jnp.asarray(v) for k, v in rows.items()}


@pytest.fixture
def here(monkeypatch):
    """This file's folder on the path, also that of the verifiers' processes."""
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    rewards = []

    def make(**fields):
        rewards.append(Verified(function="test_reward:moody", tokenizer="byte", **fields))
        return rewards[-1]

    yield make
    for reward in rewards:
        reward.pool.close()


def test_a_verifier_that_raises_hangs_or_dies_fails_its_sample_only(here, monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda message, *args: lines.append(message % args))
    reward = here(timeout=3.0, workers=1)
    score = jax.jit(reward)
    for _ in range(2):  # the processes that took their places answer too
        value, failed = score(texts("one", "hang", "die", "half", "unknown", "nan", "bool", "prompt"))
        np.testing.assert_array_equal(value, [1, 0, 0, 0.5, 0, 0, 1, 1])
        np.testing.assert_array_equal(failed, [0, 1, 1, 0, 1, 1, 0, 0])
    assert len(lines) == 2 and "test_reward:moody failed on 4 of 8 samples; the first: no answer in 3 s" in lines[0]


def test_numbers_through_the_callback():
    reward = Verified(tokenizer="byte", workers=1, timeout=60.0)  # a hang is not what is tested here
    value, failed = jax.jit(reward)(texts("it's 5", "5 or 6", "five"))
    np.testing.assert_array_equal(value, [1, 0, 0])
    assert not failed.any()
    reward.pool.close()


def count(prompt, response, answer):
    return (len(prompt) + 10 * len(response) + 100 * len(answer)) / 1000


def test_rows_that_are_spread_over_devices():
    reward = Verified(function="objectives.verifiers:exact_text", tokenizer="byte", workers=1, timeout=60.0)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), "data")
    rows = jax.device_put(texts(*("5555x5x5")), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    value, _ = jax.jit(reward)(rows)
    np.testing.assert_array_equal(value, [1, 1, 1, 1, 0, 1, 0, 1])
    reward.pool.close()


def test_without_a_tokenizer_the_function_gets_ids(here):
    reward = Verified(function="test_reward:count", tokenizer="", workers=1, timeout=60.0)
    np.testing.assert_allclose(reward(texts("abc"))[0], [0.131])
    reward.pool.close()


def test_refusals():
    with pytest.raises(Refused, match=r"reward.function='nowhere:f': no module 'nowhere'; expected 'package.file:function'"):
        Verified(function="nowhere:f")
    with pytest.raises(Refused, match="has no function 'last_numer'"):
        Verified(function="objectives.verifiers:last_numer")
    with pytest.raises(Refused, match="timeout=0"):
        Verified(timeout=0)
