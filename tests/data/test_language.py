import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.data.language import Carry, JunkCarry, Markov, Recall

TINY = Markov(vocab=3, branch=2, length=6, batch_size=20_000)


def sequences(length: int) -> np.ndarray:
    return np.array(list(itertools.product(range(3), repeat=length)))


def test_markov_law_is_a_law_and_stationary():
    for data in (
        TINY,
        Markov(),
        Markov(vocab=16, branch=1, smoothing=0.01),
        Markov(order=1),
    ):
        pairs, table = data.transitions
        np.testing.assert_allclose(table.sum(-1), 1, rtol=0, atol=1e-12)
        np.testing.assert_allclose(
            np.einsum("ab,abc->bc", pairs, table), pairs, rtol=0, atol=1e-11
        )
        assert abs(
            pairs.sum() - 1
        ) < 1e-12 and table.min() >= data.smoothing / data.vocab * (1 - 1e-12)
        assert (
            (table > 1.001 * data.smoothing / data.vocab).sum(-1) == data.branch
        ).all()


def test_a_first_order_chain_forgets_all_but_the_last_symbol():
    pairs, table = Markov(order=1).transitions
    assert (table == table[0]).all() and not (table == table[:, :1]).all()
    np.testing.assert_allclose(
        pairs, pairs.sum(1)[:, None] * table[0], rtol=0, atol=1e-11
    )


def test_markov_sequence_probabilities_sum_to_one():
    for length in (2, 3, 5):
        total = np.exp(TINY.log_probs(sequences(length)).sum(1)).sum()
        assert abs(total - 1) < 1e-10


def test_markov_entropy_is_that_of_the_blocks():
    block = lambda n: (
        -sum(np.exp(p) * p for p in TINY.log_probs(sequences(n)).sum(1))
    )
    assert TINY.entropy() == pytest.approx(block(3) - block(2), abs=1e-10)
    assert TINY.entropy() == pytest.approx(block(6) - block(5), abs=1e-10)


def test_markov_entropy_limits():
    assert Markov(smoothing=1.0).entropy() == pytest.approx(np.log(32), abs=1e-12)
    assert Markov(branch=32, skew=0.0).entropy() == pytest.approx(
        np.log(32), abs=1e-12
    )
    for seed in range(5):
        assert 0.25 * np.log(32) < Markov(seed=seed).entropy() < 0.75 * np.log(32)


def test_markov_samples_follow_the_law_at_every_position():
    tokens = next(TINY.loader())["tokens"]
    pairs, table = TINY.transitions
    n = len(tokens)
    for t in range(5):
        frequency = (
            np.bincount(tokens[:, t] * 3 + tokens[:, t + 1], minlength=9) / n
        )
        assert (
            np.abs(frequency - pairs.ravel()) < 5 * np.sqrt(pairs.ravel() / n)
        ).all()
    code = tokens[:, 3] * 9 + tokens[:, 4] * 3 + tokens[:, 5]
    triples = (pairs[..., None] * table).ravel()
    assert (
        np.abs(np.bincount(code, minlength=27) / n - triples)
        < 5 * np.sqrt(triples / n)
    ).all()


def test_markov_loss_of_the_law_is_its_entropy():
    data = Markov(batch_size=2000)
    nll = -data.log_probs(data.batch(0, slice(None))["tokens"])[:, 2:].mean(1)
    assert abs(nll.mean() - data.entropy()) < 5 * nll.std() / np.sqrt(2000)


def test_markov_net_gives_exact_logits():
    data = Markov(vocab=8, length=16, batch_size=4)
    batch = data.batch(0, slice(None))
    net = data.net()
    logits = jax.jit(net.apply)({}, jnp.asarray(batch["tokens"]))
    assert logits.shape == (4, 16, 8) and logits.dtype == jnp.float32
    np.testing.assert_allclose(jax.nn.logsumexp(logits, -1), 0, atol=8 * 2**-23)
    got = np.take_along_axis(
        np.asarray(logits[:, :-1]), batch["tokens"][:, 1:, None], -1
    )[..., 0]
    np.testing.assert_allclose(
        got, data.log_probs(batch["tokens"])[:, 1:], rtol=2**-22
    )


def test_markov_batches():
    batch = Markov().batch(0, slice(0, 3))
    assert batch["tokens"].dtype == np.int32 and batch["tokens"].shape == batch[
        "mask"
    ].shape == (
        3,
        64,
    )
    assert (batch["mask"] == (np.arange(64) > 0)).all() and batch[
        "mask"
    ].dtype == np.float32
    assert not (Markov(seed=1).transitions[1] == Markov().transitions[1]).all()
    test = Markov().evaluation(5)["tokens"]
    assert (test == Markov().evaluation(5)["tokens"]).all() and not (
        test[:3] == batch["tokens"]
    ).all()


@pytest.mark.parametrize("data", [Markov(batch_size=8), Carry(batch_size=8)])
def test_stream(data, check_stream):
    check_stream(data)


@pytest.mark.parametrize("digits", [1, 3, 8])
def test_carry_reads_as_additions(digits):
    data = Carry(digits=digits, batch_size=500)
    for batch in (data.batch(0, slice(None)), data.evaluation(5)):
        for tokens, mask in zip(batch["tokens"], batch["mask"]):
            problem, answer = data.text(tokens).split("=")
            a, b = problem.split("+")
            assert (
                len(a) == len(b) == digits
                and answer == f"{int(a) + int(b):0{digits + 1}};"
            )
            assert data.text(tokens[mask == 1]) == answer
    assert (
        batch["tokens"].shape == (5, data.length)
        and batch["tokens"].dtype == np.int32
    )
    assert (
        batch["prompt"] == batch["tokens"][:, : 2 * digits + 2]
    ).all() and batch["prompt_mask"].all()
    assert batch["mask"].dtype == np.float32 and batch["prompt_mask"].dtype == bool


@pytest.mark.parametrize("seed", [0, 5, 16, 17])
@pytest.mark.parametrize("digits", [1, 2])
def test_carry_holds_a_seventeenth_out(seed, digits):
    data = Carry(digits=digits, seed=seed)
    both = {}
    for split in ("train", "test"):
        count, number = data.pairs(split)
        both[split] = number(np.arange(count)).tolist()
    assert sorted(both["train"] + both["test"]) == list(range(100**digits))
    assert abs(len(both["test"]) - 100**digits / 17) < 1
    assert len(data.evaluation(10**6)["tokens"]) == len(both["test"])
    drawn = np.concatenate(
        [data.batch(i, slice(None))["tokens"] for i in range(20)]
    )
    held = {tuple(row) for row in data.evaluation(10**6)["tokens"].tolist()}
    assert not held & {tuple(row) for row in drawn.tolist()}


def test_carry_checks_every_token_of_the_answer():
    data = Carry(batch_size=50)
    tokens = data.batch(0, slice(None))["tokens"]
    assert data.correct(tokens).all()
    check = jax.jit(data.correct)
    assert check(jnp.asarray(tokens)).all()
    for column in range(8, data.length):
        wrong = tokens.copy()
        wrong[:, column] = (wrong[:, column] + 1) % data.vocab
        assert not data.correct(wrong).any() and not check(jnp.asarray(wrong)).any()
    assert (
        data.correct(tokens[None, 0]).shape == (1,)
        and data.correct(tokens[0]).shape == ()
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Markov(branch=33), r"data.branch=33: expected 1 to 32"),
        (
            lambda: Markov(length=1),
            r"data.length=1: expected an integer of at least 2",
        ),
        (
            lambda: Markov(smoothing=0.0),
            r"data.smoothing=0.0: expected a finite number of at least 0.001 and at most 1",
        ),
        (
            lambda: Carry(digits=9),
            r"data.digits=9: expected an integer of at least 1 and at most 8",
        ),
        (lambda: Carry(digits=0), r"data.digits=0"),
        (lambda: Markov(batch_size=-1), r"data.batch_size=-1"),
    ],
)
def test_refused(make, message):
    with pytest.raises(Refused, match=message):
        make()


def test_junk_cannot_be_solved_and_is_not_kept_for_evaluation():
    data = JunkCarry(digits=2, junk=0.7, batch_size=400)
    clean = Carry(digits=2, batch_size=400)
    batch = data.batch(0, slice(None))
    plain = clean.batch(0, slice(None))
    bad = (batch["tokens"] != plain["tokens"]).any(1)
    assert abs(bad.mean() - 0.7) <= 5 * np.sqrt(0.21 / 400)
    assert (
        data.correct(batch["tokens"][~bad]).all()
        and data.correct(batch["tokens"][bad]).mean() < 0.02
    )
    assert (batch["tokens"][:, -1] == data.eos).all() and batch[
        "tokens"
    ].max() == data.eos
    np.testing.assert_array_equal(batch["prompt"], batch["tokens"][:, :6])
    np.testing.assert_array_equal(
        data.batch(0, slice(100, 120))["tokens"], batch["tokens"][100:120]
    )
    np.testing.assert_array_equal(
        data.evaluation(50)["tokens"], clean.evaluation(50)["tokens"]
    )
    with pytest.raises(Refused, match=r"data\.junk=2"):
        JunkCarry(junk=2)


def test_answers_to_recall_are_fixed_and_evaluated():
    data = Recall(batch_size=200)
    batch = data.batch(3, slice(None))
    held = data.evaluation(100)
    assert (
        held["tokens"].shape == (16, 8)
        and data.correct(batch["tokens"]).all()
        and batch["tokens"].max() < 8
    )
    assert {tuple(row) for row in batch["tokens"]} == {
        tuple(row) for row in held["tokens"]
    }
    assert not data.correct(
        (batch["tokens"] + 1) % 8 * batch["mask"].astype(int)
        + batch["tokens"] * (1 - batch["mask"].astype(int))
    ).any()
    assert (Recall(seed=1).table[:, 2:] != data.table[:, 2:]).any()
    np.testing.assert_array_equal(batch["mask"][0], [0, 0, 1, 1, 1, 1, 1, 1])
    with pytest.raises(Refused, match=r"data.questions=65: expected 1 to 64"):
        Recall(questions=65)
