"""Text from a language model: one pass over the prompt, then one token at a time through the cache.

A pure function of its arguments, to be called inside jit: on-policy methods run it in their train
step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, Batch, Refused


def generate(
    net: Callable,
    prompt: Array,
    length: int,
    key: Array,
    *,
    prompt_mask: Array | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos: int | Sequence[int] = (),
    pad: int = 0,
    vocab: int = 0,
) -> tuple[Array, Array]:
    """Continues `prompt` int [B P] to (tokens int [B length], mask bool [B length]).

    `net` is a bound language model; `prompt_mask` [B P] is False on padding, which stands on the
    left. The mask is True on prompt and continuation, its `eos` (one token or several) included;
    what follows is `pad` and False. `temperature`, `top_k` and `top_p` are those of `pick`; ids
    from `vocab` on (0: none) are never written. Raises Refused where `length` leaves nothing to
    write.
    """
    batch, start = prompt.shape
    if length <= start:
        raise Refused(f"generate: length={length} counts the prompt, which has {start} tokens")
    mask = jnp.ones(prompt.shape, bool) if prompt_mask is None else prompt_mask.astype(bool)
    stops = jnp.atleast_1d(jnp.asarray(eos, prompt.dtype))

    def choose(logits, numbers, done):
        logits = logits[:, -1, :vocab] if 0 < vocab < logits.shape[-1] else logits[:, -1]
        token = pick(logits, numbers, temperature=temperature, top_k=top_k, top_p=top_p)
        token = jnp.where(done, pad, token).astype(prompt.dtype)
        return token, done | jnp.isin(token, stops)

    def step(carry, numbers):
        token, done, cache = carry
        logits, cache = net(token[:, None], cache=cache)
        token, ended = choose(logits, numbers, done)
        return (token, ended, cache), (token, ~done)

    logits, cache = net(prompt, mask=mask, cache=net(batch, length, method="init_cache"))
    numbers = jax.random.uniform(key, (length - start, 2, batch))
    first, done = choose(logits, numbers[0], jnp.zeros(batch, bool))
    _, (rest, alive) = jax.lax.scan(step, (first, done, cache), numbers[1:])
    tokens = jnp.concatenate([prompt, first[:, None], rest.T], 1)
    return tokens, jnp.concatenate([mask, jnp.ones((batch, 1), bool), alive.T], 1)


def answer(
    net: Callable,
    source: Array,
    length: int,
    key: Array,
    *,
    source_mask: Array | None = None,
    start: int = 0,
    **how,
) -> tuple[Array, Array]:
    """Text about `source` int [B S] from an encoder-decoder (models/language/t5.py): (tokens int [B
    length], mask bool [B length]).

    `net` is the bound network, `source_mask` [B S] is False on padding, `start` the token that each
    text begins with, which is left out of what is returned; `how` are the other arguments of
    `generate`, whose mask this is.
    """
    states = net(source, mask=source_mask, method="encode")

    def decoder(*args, method: str = "decode", **kwargs):
        if method == "init_cache":
            return net(states, args[1], source_mask=source_mask, method=method)
        return net(*args, method=method, **kwargs)

    tokens, mask = generate(
        decoder, jnp.full((len(source), 1), start, source.dtype), length + 1, key, **how
    )
    return tokens[:, 1:], mask[:, 1:]


def pick(
    logits: Array, numbers: Array, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Array:
    """One token int [B] for each row of logits [B V], as two uniform numbers for each [2 B] have
    it.

    temperature 0 is the argmax. `top_k` (0: all) keeps the k likeliest tokens; of these, `top_p`
    keeps the fewest whose mass reaches it (nucleus sampling, arXiv:1904.09751). Of equal logits the
    lower index comes first.
    """
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise Refused(
            f"temperature={temperature}, top_k={top_k}, top_p={top_p}: expected >= 0, >= 0 and in (0, 1]"
        )
    if temperature == 0.0:
        return jnp.argmax(logits, -1)
    logits = logits / temperature
    if top_k == 0 and top_p == 1.0:
        return _invert(jax.nn.softmax(logits), numbers)
    kept, ids = jax.lax.top_k(logits, min(top_k or logits.shape[-1], logits.shape[-1]))
    mass = jax.nn.softmax(kept)
    chosen = _invert(jnp.where(jnp.cumsum(mass, -1) - mass < top_p, mass, 0.0), numbers)
    return jnp.take_along_axis(ids, chosen[:, None], 1)[:, 0]


def _invert(p: Array, numbers: Array) -> Array:
    """Index int [B] drawn from weights [B V] by inversion: first one of about sqrt(V) rows of them,
    then its place in that row.

    A Gumbel number for each of V tokens would cost more than a small network's step.
    """
    batch, size = p.shape
    side = math.isqrt(size - 1) + 1
    rows = jnp.pad(p, ((0, 0), (0, -size % side))).reshape(batch, -1, side)
    row = _first_beyond(rows.sum(-1), numbers[0])
    return row * side + _first_beyond(
        jnp.take_along_axis(rows, row[:, None, None], 1)[:, 0], numbers[1]
    )


def _first_beyond(p: Array, number: Array) -> Array:
    """The first index whose cumulative weight of [B N] exceeds this share [B] of the whole; never
    one of no weight.
    """
    sums = jnp.matmul(p, jnp.triu(jnp.ones((p.shape[1],) * 2, p.dtype)), precision="highest")
    beyond = (sums > (number * sums[:, -1])[:, None]) & (p > 0)
    return jnp.where(beyond.any(1), beyond.argmax(1), p.argmax(1))


def respond(
    net: Callable, batch: Batch, key: Array, *, copies: int = 1, prompt_length: int = 0, **how
) -> Batch:
    """`batch` with what `net` writes after its prompts in the places where it has the responses.

    Each row comes `copies` times, one after the other. tokens int, mask float32 (1 on what was
    written), segments and positions int32 [B T] are new; answer and answer_mask keep the data's own
    tokens and where they are a response, and group int32 [B] is the row's number in `batch`. Data
    without "prompt" opens with `prompt_length` tokens of one; `how` goes to `generate`. Raises
    Refused where there is neither.
    """
    if "prompt" not in batch and not prompt_length:
        raise Refused(
            "method.prompt_length=0: the data has no prompts, so say how many tokens of a row are one"
        )
    rows = {**batch, "group": jnp.arange(batch["tokens"].shape[0], dtype=jnp.int32)}
    rows = {k: jnp.repeat(v, copies, 0) for k, v in rows.items()} if copies > 1 else rows
    prompt = rows["prompt"] if "prompt" in rows else rows["tokens"][:, :prompt_length]
    tokens, valid = generate(
        net, prompt, rows["tokens"].shape[1], key, prompt_mask=rows.get("prompt_mask"), **how
    )
    after = jnp.arange(tokens.shape[1]) >= prompt.shape[1]
    new = {
        "tokens": tokens,
        "mask": (valid & after).astype(jnp.float32),
        "segments": valid.astype(jnp.int32),
    }
    new |= {"positions": jnp.maximum(jnp.cumsum(valid, 1, dtype=jnp.int32) - 1, 0)}
    own = (
        {"answer": rows["tokens"], "answer_mask": rows["mask"] * after}
        if "answer" not in rows
        else {}
    )
    return {**rows, **own, **new}
