import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.net import make_net
from jaxdistill.core.types import Refused
from jaxdistill.models.language.lm import LM
from jaxdistill.samplers.text import generate, pick, respond

CFG = LM(vocab=29, dim=16, mlp=24, heads=4, kv_heads=2, depth=2)


@pytest.fixture(scope="module")
def lm():
    net = make_net(CFG)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: jnp.asarray(0.5 * rng.standard_normal(s.shape), s.dtype),
        net.shapes,
    )
    return functools.partial(net.apply, params), jnp.asarray(
        rng.integers(0, CFG.vocab, (3, 5)), jnp.int32
    )


def counter(tokens, *_, mask=None, cache=None, method="__call__"):
    """A model that is sure that token n + 1 follows n, of 8."""
    return (
        {}
        if method == "init_cache"
        else (20.0 * jax.nn.one_hot((tokens + 1) % 8, 8), cache)
    )


def test_greedy_writes_the_argmax_of_the_full_pass(lm):
    net, prompt = lm
    tokens, mask = jax.jit(
        lambda prompt: generate(net, prompt, 12, jax.random.key(0), temperature=0.0)
    )(prompt)
    assert tokens.shape == (3, 12) and tokens.dtype == prompt.dtype and mask.all()
    np.testing.assert_array_equal(tokens[:, :5], prompt)
    np.testing.assert_array_equal(
        tokens[:, 5:], jnp.argmax(net(tokens), -1)[:, 4:-1]
    )
    assert len(set(np.asarray(tokens[:, 5:]).ravel())) > 3


def test_padded_prompts_continue_like_bare_ones(lm):
    net, prompt = lm
    pads = [0, 2, 2]
    mask = jnp.arange(5) >= jnp.array(pads)[:, None]
    write = jax.jit(
        lambda prompt, mask: generate(
            net,
            prompt,
            5 + prompt.shape[1],
            jax.random.key(0),
            prompt_mask=mask,
            temperature=0.0,
        )
    )
    tokens, valid = write(jnp.where(mask, prompt, 9), mask)
    np.testing.assert_array_equal(valid[:, :5], mask)
    for row, pad in enumerate(pads):
        alone, _ = write(prompt[row : row + 1, pad:], mask[row : row + 1, pad:])
        np.testing.assert_array_equal(tokens[row, pad:], alone[0])


def test_same_key_same_text(lm):
    net, prompt = lm
    write = jax.jit(lambda key: generate(net, prompt, 12, key)[0])
    np.testing.assert_array_equal(
        write(jax.random.key(3)), write(jax.random.key(3))
    )
    assert (write(jax.random.key(3)) != write(jax.random.key(4))).any()


@pytest.mark.parametrize("eos", [5, (5, 7), np.array([5])])
def test_nothing_follows_eos(eos):
    prompt = jnp.array([[0, 1], [3, 4], [5, 6]])
    tokens, mask = generate(
        counter, prompt, 8, jax.random.key(0), temperature=0.0, eos=eos, pad=9
    )
    second = (
        [5, 6, 7, 9, 9, 9, 9, 9]
        if isinstance(eos, tuple)
        else [5, 6, 7, 0, 1, 2, 3, 4]
    )
    np.testing.assert_array_equal(
        tokens, [[0, 1, 2, 3, 4, 5, 9, 9], [3, 4, 5, 9, 9, 9, 9, 9], second]
    )
    np.testing.assert_array_equal(mask, tokens != 9)


def test_without_eos_every_token_counts():
    tokens, mask = generate(
        counter, jnp.array([[0]]), 9, jax.random.key(0), temperature=0.0
    )
    np.testing.assert_array_equal(tokens[0], np.arange(9) % 8)
    assert mask.all()


def draw(logits, key, **how):
    return pick(logits, jax.random.uniform(key, (2, len(logits))), **how)


LOGITS = jnp.log(jnp.array([0.1, 0.4, 0.05, 0.25, 0.2]))
N = 20_000


def frequencies(**kwargs):
    drawn = jax.jit(
        lambda key: draw(jnp.broadcast_to(LOGITS, (N, 5)), key, **kwargs)
    )(jax.random.key(0))
    return np.bincount(np.asarray(drawn), minlength=5) / N


@pytest.mark.parametrize(
    ("kwargs", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.3}, [1]),
        ({"top_p": 0.6}, [1, 3]),
        ({"top_p": 0.7}, [1, 3, 4]),
        (
            {"top_k": 2, "top_p": 0.6},
            [1],
        ),  # of the two kept, 0.4 / 0.65 = 0.615 reaches it alone
        ({"top_k": 2, "top_p": 0.62}, [1, 3]),
    ],
)
def test_support_and_law_of_truncated_draws(kwargs, kept):
    law = np.zeros(5)
    law[kept] = np.exp(np.asarray(LOGITS))[kept]
    law /= law.sum()
    found = frequencies(**kwargs)
    assert set(np.flatnonzero(found)) == set(kept)
    assert (np.abs(found - law) <= 5 * np.sqrt(law * (1 - law) / N)).all()


@pytest.mark.full
@pytest.mark.parametrize("size", [1, 2, 17, 512, 1000])
def test_every_law_is_drawn_from(size):
    """Chi-squared over the tokens that may come, and none of those that may not, wherever they
    stand.
    """
    logits = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    logits[np.arange(size) % 3 == 1] = -np.inf
    law = np.exp(logits) / np.exp(logits).sum()
    some = jax.jit(
        lambda key: draw(jnp.broadcast_to(jnp.asarray(logits), (N, size)), key)
    )
    drawn = np.concatenate([some(jax.random.key(i)) for i in range(40)])
    rows = 40 * N
    counts = np.bincount(np.asarray(drawn), minlength=size)
    assert counts.sum() == rows and not counts[law == 0].any()
    expected = rows * law[law > 0]
    chi = ((counts[law > 0] - expected) ** 2 / expected).sum()
    freedom = (law > 0).sum() - 1
    assert chi < freedom + 5 * np.sqrt(2 * freedom) + 1e-6


@pytest.mark.parametrize("number", [0.0, 1.0 - 2.0**-23])
def test_extreme_numbers_stay_inside(number):
    logits = jnp.array([[-jnp.inf, 0.0, -jnp.inf, 0.0, -jnp.inf, -jnp.inf]])
    assert int(pick(logits, jnp.full((2, 1), number, jnp.float32))[0]) == (
        1 if number == 0 else 3
    )


def test_temperature_sharpens():
    law = np.exp(2 * np.asarray(LOGITS))
    law /= law.sum()
    assert (
        np.abs(frequencies(temperature=0.5) - law)
        <= 5 * np.sqrt(law * (1 - law) / N)
    ).all()
    assert frequencies(temperature=0.0)[1] == 1.0


def test_ties_keep_the_lower_index():
    drawn = draw(jnp.zeros((2000, 4)), jax.random.key(0), top_k=2)
    assert set(np.asarray(drawn)) == {0, 1}


def test_refusals():
    with pytest.raises(Refused, match="length=2 counts the prompt"):
        generate(counter, jnp.zeros((1, 2), int), 2, jax.random.key(0))
    for bad in (
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
    ):
        with pytest.raises(Refused, match="top_p"):
            draw(jnp.zeros((1, 4)), jax.random.key(0), **bad)


def test_responses_take_the_places_of_the_datas():
    batch = {
        "tokens": jnp.array([[0, 1, 2, 2, 2], [3, 4, 6, 6, 6]]),
        "mask": jnp.array([[0.0, 1, 1, 1, 0], [0, 1, 1, 1, 1]]),
    }
    out = respond(
        counter,
        batch,
        jax.random.key(0),
        copies=2,
        prompt_length=2,
        temperature=0.0,
        eos=5,
        pad=9,
    )
    np.testing.assert_array_equal(
        out["tokens"], [[0, 1, 2, 3, 4]] * 2 + [[3, 4, 5, 9, 9]] * 2
    )
    np.testing.assert_array_equal(
        out["mask"], [[0, 0, 1, 1, 1]] * 2 + [[0, 0, 1, 0, 0]] * 2
    )
    np.testing.assert_array_equal(
        out["segments"], [[1, 1, 1, 1, 1]] * 2 + [[1, 1, 1, 0, 0]] * 2
    )
    np.testing.assert_array_equal(out["group"], [0, 0, 1, 1])
    np.testing.assert_array_equal(out["answer"], jnp.repeat(batch["tokens"], 2, 0))
    np.testing.assert_array_equal(
        out["answer_mask"], [[0, 0, 1, 1, 0]] * 2 + [[0, 0, 1, 1, 1]] * 2
    )
    again = respond(
        counter, out, jax.random.key(0), prompt_length=2, temperature=0.0
    )
    # the data's own, not the last response
    np.testing.assert_array_equal(again["answer"], out["answer"])
    with pytest.raises(
        Refused, match=r"method.prompt_length=0: the data has no prompts"
    ):
        respond(counter, batch, jax.random.key(0))
