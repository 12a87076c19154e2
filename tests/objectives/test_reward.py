import os
import sys
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
    return {
        "tokens": jnp.array(tokens),
        "mask": jnp.array(mask, jnp.float32),
        "answer": ANSWER,
        "answer_mask": ANSWER_MASK,
    }


@pytest.mark.parametrize(
    ("row", "mask", "exact", "share"),
    [
        ([9, 9, 1, 2, 3, 0], [0, 0, 1, 1, 1, 0], 1, 1),
        (
            [9, 9, 1, 2, 3, 7],
            [0, 0, 1, 1, 1, 0],
            1,
            1,
        ),  # what follows the end is padding
        ([9, 9, 1, 2, 3, 7], [0, 0, 1, 1, 1, 1], 0, 1),  # one token too many
        ([9, 9, 1, 8, 3, 0], [0, 0, 1, 1, 1, 0], 0, 2 / 3),
        ([9, 9, 1, 2, 0, 0], [0, 0, 1, 1, 0, 0], 0, 2 / 3),  # one too few
        ([7, 9, 8, 8, 8, 8], [0, 0, 1, 1, 1, 1], 0, 0),
    ],
)
def test_exact_and_share(row, mask, exact, share):
    other = [9, 9, 4, 5, 3, 0], [0, 0, 1, 1, 1, 0]
    both = batch([row, other[0]], [mask, other[1]])
    for reward, value in (
        (Exact(), exact),
        (Share(), share),
        (AtLeast(least=0.6), share >= 0.6),
    ):
        score, failed = reward(both)
        np.testing.assert_allclose(score, [value, 1], rtol=1e-6)
        assert not failed.any()


def moody(prompt, response, answer):
    """Does what the response says."""
    time.sleep(30) if response == "hang" else None
    os._exit(1) if response == "die" else None
    if response == "big":
        raise ValueError("two\nlines " * 1000)
    return {
        "text": "0.5",
        "none": None,
        "one": 1,
        "half": 0.5,
        "nan": float("nan"),
        "bool": response == "bool",
        "prompt": prompt == "?",
    }[response]


def texts(*responses, width=8):
    """Rows "?" response answer of bytes, the prompt padded on the left."""
    codec = ByteTokenizer()
    rows = {
        name: np.zeros((len(responses), 2 * width), np.int32)
        for name in ("tokens", "mask", "segments", "answer", "answer_mask")
    }
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
        rewards.append(
            Verified(function="test_reward:moody", tokenizer="byte", **fields)
        )
        return rewards[-1]

    yield make
    for reward in rewards:
        reward.pool.close()


@pytest.mark.full
def test_a_verifier_that_raises_hangs_or_dies_fails_its_sample_only(
    here, monkeypatch
):
    lines = []
    monkeypatch.setattr(
        logging, "warning", lambda message, *args: lines.append(message % args)
    )
    reward = here(timeout=3.0, workers=1)
    score = jax.jit(reward)
    for _ in range(2):  # the processes that took their places answer too
        value, failed = score(
            texts("one", "hang", "die", "half", "unknown", "nan", "bool", "prompt")
        )
        np.testing.assert_array_equal(value, [1, 0, 0, 0.5, 0, 0, 1, 1])
        np.testing.assert_array_equal(failed, [0, 1, 1, 0, 1, 1, 0, 0])
    assert (
        len(lines) == 2
        and "test_reward:moody failed on 4 of 8 samples; the first: no answer in 3 s"
        in lines[0]
    )


def test_what_is_no_number_is_said_in_one_line(here, monkeypatch):
    lines = []
    monkeypatch.setattr(
        logging, "warning", lambda message, *args: lines.append(message % args)
    )
    reward = here(timeout=60.0, workers=1)
    for response, says in {
        "text": "returned '0.5', no number",
        "none": "returned None, no number",
        "nan": "returned nan",
        "big": "ValueError: two lines two lines",
        "die": "its process died",
    }.items():
        np.testing.assert_array_equal(
            reward(texts("one", response)), [[1, 0], [0, 1]]
        )
        assert lines[-1].startswith(
            f"test_reward:moody failed on 1 of 2 samples; the first: {says}"
        )
        assert "\n" not in lines[-1] and len(lines[-1]) < 300


def test_numbers_through_the_callback():
    # a hang is not what is tested here
    reward = Verified(tokenizer="byte", workers=1, timeout=60.0)
    value, failed = jax.jit(reward)(texts("it's 5", "5 or 6", "five"))
    np.testing.assert_array_equal(value, [1, 0, 0])
    assert not failed.any()
    reward.pool.close()


def count(prompt, response, answer):
    return (len(prompt) + 10 * len(response) + 100 * len(answer)) / 1000


def test_rows_that_are_spread_over_devices():
    reward = Verified(
        function="objectives.verifiers:exact_text",
        tokenizer="byte",
        workers=1,
        timeout=60.0,
    )
    mesh = jax.sharding.Mesh(np.array(jax.devices()), "data")
    rows = jax.device_put(
        texts(*("5555x5x5")),
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")),
    )
    value, _ = jax.jit(reward)(rows)
    np.testing.assert_array_equal(value, [1, 1, 1, 1, 0, 1, 0, 1])
    reward.pool.close()


def test_without_a_tokenizer_the_function_gets_ids(here):
    reward = Verified(
        function="test_reward:count", tokenizer="", workers=1, timeout=60.0
    )
    np.testing.assert_allclose(reward(texts("abc"))[0], [0.131])
    reward.pool.close()


def test_refusals():
    with pytest.raises(
        Refused,
        match=r"reward.function='nowhere:f': no module 'nowhere'; expected 'package.file:function'",
    ):
        Verified(function="nowhere:f")
    with pytest.raises(Refused, match="has no function 'last_numer'"):
        Verified(function="objectives.verifiers:last_numer")
    for field in (
        {"timeout": 0},
        {"timeout": float("nan")},
        {"workers": 0},
        {"start": 0.0},
    ):
        with pytest.raises(
            Refused, match="expected seconds above 0 and at least 1 worker"
        ):
            Verified(**field)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import time\ntime.sleep(60)", "its import takes longer than 1 s"),
        ("import os\nos._exit(0)", "its import ends the process"),
        ("raise SystemExit(3)", "its import raises SystemExit: 3"),
        (
            "import no_such_module",
            "its import raises ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("def f(:", "its import raises SyntaxError"),
        (
            "def judged(prompt, response, answer): pass",
            "has no function 'judge'; did you mean 'judged'",
        ),
        ("judge = 3", "has no function 'judge'"),
    ],
)
def test_a_file_that_cannot_be_imported_is_refused_at_the_start(
    text, says, tmp_path, monkeypatch
):
    """Nothing of it runs in this process, which would hang or end with it."""
    name = f"verifier_{abs(hash(text))}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        Refused, match=f"reward.function='{name}:judge': .*{says}"
    ) as caught:
        Verified(function=f"{name}:judge", start=1.0 if "sleep" in text else 60.0)
    assert "\n" not in str(caught.value) and name not in sys.modules


def test_an_import_that_hangs_later_costs_its_time_once(tmp_path, monkeypatch):
    (tmp_path / "at_times.py").write_text(
        "import pathlib, time\ntime.sleep(60 * pathlib.Path(__file__).with_name('hang').exists())\n"
        "def judge(*_): return 1"
    )
    monkeypatch.syspath_prepend(tmp_path)
    started = []
    monkeypatch.setattr(
        verifiers,
        "_Child",
        lambda *a, made=verifiers._Child: started.append(a) or made(*a),
    )
    reward = Verified(function="at_times:judge", workers=1, timeout=60.0)
    (tmp_path / "hang").touch()
    pool = verifiers.Pool("at_times:judge", 60.0, 1, start=1.0)
    # one of them the check's
    assert (
        pool.score([("", "", "")] * 5) == ["its import takes longer than 1 s"] * 5
        and len(started) == 2
    )
    (tmp_path / "hang").unlink()
    pool.start = 60.0
    assert pool.score([("", "", "")] * 5) == [1.0] * 5 and len(started) == 3
    Verified(function="at_times:judge", workers=2)
    assert len(started) == 3  # what has been imported is not tried again
    pool.close()
    reward.pool.close()
