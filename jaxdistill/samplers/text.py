"""Text from a language model: one pass over the prompt, then one token at a time through the cache.

All functions are pure, to be called inside jit: on-policy methods call them in their train step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Key, Shaped

from jaxdistill.core.types import Array, Batch, Refused


def generate(
    net: Callable,
    prompt: Int[Array, "B P"],
    length: int,
    key: Key[Array, ""],
    *,
    prompt_mask: Shaped[Array, "B P"] | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos: int | Sequence[int] | Array = (),
    pad: int = 0,
    vocab: int = 0,
) -> tuple[Int[Array, "B {length}"], Bool[Array, "B {length}"]]:
    """Prompts with their continuations up to `length` tokens: tokens, and their padding mask.

    Args:
      net: a bound language model.
      prompt_mask: False on padding, which is on the left.
      temperature, top_k, top_p: as in `pick`.
      eos: the token or tokens that end a text. The mask holds for them; what follows is `pad`.
      vocab: tokens from this one on are never generated; 0: all are.

    Raises:
      Refused: where `length` leaves nothing to generate.
    """
    batch, start = prompt.shape
    if length <= start:
        raise Refused(
            f"generate: length={length} counts the prompt, which has {start} tokens"
        )
    if prompt_mask is None:
        mask = jnp.ones(prompt.shape, bool)
    else:
        mask = prompt_mask.astype(bool)
    stops = jnp.atleast_1d(jnp.asarray(eos, prompt.dtype))

    def choose(logits: Array, numbers: Array, done: Array) -> tuple[Array, Array]:
        logits = logits[:, -1]
        if 0 < vocab < logits.shape[-1]:
            logits = logits[:, :vocab]
        token = pick(
            logits, numbers, temperature=temperature, top_k=top_k, top_p=top_p
        )
        token = jnp.where(done, pad, token).astype(prompt.dtype)
        return token, done | jnp.isin(token, stops)

    def step(
        carry: tuple[Array, Array, Any], numbers: Array
    ) -> tuple[Any, tuple[Array, Array]]:
        token, done, cache = carry
        logits, cache = net(token[:, None], cache=cache)
        token, ended = choose(logits, numbers, done)
        return (token, ended, cache), (token, ~done)

    logits, cache = net(
        prompt, mask=mask, cache=net(batch, length, method="init_cache")
    )
    numbers = jax.random.uniform(key, (length - start, 2, batch))
    first, done = choose(logits, numbers[0], jnp.zeros(batch, bool))
    _, (rest, alive) = jax.lax.scan(step, (first, done, cache), numbers[1:])
    tokens = jnp.concatenate([prompt, first[:, None], rest.T], 1)
    return tokens, jnp.concatenate([mask, jnp.ones((batch, 1), bool), alive.T], 1)


def answer(
    net: Callable,
    source: Int[Array, "B S"],
    length: int,
    key: Key[Array, ""],
    *,
    source_mask: Shaped[Array, "B S"] | None = None,
    start: int = 0,
    **options: Any,
) -> tuple[Int[Array, "B {length}"], Bool[Array, "B {length}"]]:
    """Texts that an encoder-decoder (models/language/t5.py) generates from `source`, and their
    padding mask.

    Args:
      net: the bound network.
      source_mask: False on padding.
      start: the token that each text starts with, which is not part of the result.
      options: the other arguments of `generate`.
    """
    states = net(source, mask=source_mask, method="encode")

    def decoder(*args: Any, method: str = "decode", **kwargs: Any) -> Any:
        if method == "init_cache":
            return net(states, args[1], source_mask=source_mask, method=method)
        return net(*args, method=method, **kwargs)

    prompt = jnp.full((len(source), 1), start, source.dtype)
    tokens, mask = generate(decoder, prompt, length + 1, key, **options)
    return tokens[:, 1:], mask[:, 1:]


def pick(
    logits: Float[Array, "B V"],
    numbers: Float[Array, "2 B"],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Int[Array, " B"]:
    """One token for each sample, a function of the logits and two uniform numbers.

    Args:
      temperature: 0 is the argmax. Of equal logits the lower index comes first.
      top_k: only the k likeliest tokens; 0: all.
      top_p: of these, the fewest whose probabilities sum to at least this (nucleus sampling,
        arXiv:1904.09751).

    Raises:
      Refused: on values out of their range.
    """
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        given = f"temperature={temperature}, top_k={top_k}, top_p={top_p}"
        raise Refused(f"{given}: expected >= 0, >= 0 and in (0, 1]")
    if temperature == 0.0:
        return jnp.argmax(logits, -1)
    logits = logits / temperature
    if top_k == 0 and top_p == 1.0:
        return _inverted(jax.nn.softmax(logits), numbers)
    size = logits.shape[-1]
    kept, ids = jax.lax.top_k(logits, min(top_k or size, size))
    p = jax.nn.softmax(kept)
    nucleus = jnp.cumsum(p, -1) - p < top_p
    chosen = _inverted(jnp.where(nucleus, p, 0.0), numbers)
    return jnp.take_along_axis(ids, chosen[:, None], 1)[:, 0]


def _inverted(p: Array, numbers: Array) -> Array:
    """Indices int [B] drawn from weights [B V] by inversion.

    The weights are arranged in about sqrt(V) rows; the first number chooses the row, the second the
    place in it. Gumbel noise for each of V tokens would cost more than a step of a small network.
    """
    batch, size = p.shape
    side = math.isqrt(size - 1) + 1
    rows = jnp.pad(p, ((0, 0), (0, -size % side))).reshape(batch, -1, side)
    row = _first_beyond(rows.sum(-1), numbers[0])
    weights = jnp.take_along_axis(rows, row[:, None, None], 1)[:, 0]
    return row * side + _first_beyond(weights, numbers[1])


def _first_beyond(p: Array, number: Array) -> Array:
    """The first index whose cumulative weight of [B N] exceeds the share `number` [B] of the total,
    among those of positive weight.
    """
    upper = jnp.triu(jnp.ones((p.shape[1], p.shape[1]), p.dtype))
    sums = jnp.matmul(p, upper, precision="highest")
    beyond = (sums > (number * sums[:, -1])[:, None]) & (p > 0)
    return jnp.where(beyond.any(1), beyond.argmax(1), p.argmax(1))


def respond(
    net: Callable,
    batch: Batch,
    key: Key[Array, ""],
    *,
    copies: int = 1,
    prompt_length: int = 0,
    **options: Any,
) -> Batch:
    """`batch` with the responses that `net` generates to its prompts in place of the data's.

    Returns:
      The batch with these changes. tokens int, mask float32 (1 on the responses), segments and
      positions int32 [B T] are new; answer and answer_mask are the data's own tokens and where they
      are a response; group int32 [B] is the index of the sample in `batch`.

    Args:
      copies: responses to each prompt, one after another.
      prompt_length: tokens that stand for the prompt where the data has no "prompt".
      options: the other arguments of `generate`.

    Raises:
      Refused: where the data has no "prompt" and there is no `prompt_length`.
    """
    if "prompt" not in batch and not prompt_length:
        needed = "so say how many tokens of a sample are one"
        raise Refused(f"method.prompt_length=0: the data has no prompts, {needed}")
    samples = {
        **batch,
        "group": jnp.arange(batch["tokens"].shape[0], dtype=jnp.int32),
    }
    if copies > 1:
        samples = {k: jnp.repeat(v, copies, 0) for k, v in samples.items()}
    prompt = samples.get("prompt")
    if prompt is None:
        prompt = samples["tokens"][:, :prompt_length]
    length = samples["tokens"].shape[1]
    prompt_mask = samples.get("prompt_mask")
    tokens, valid = generate(
        net, prompt, length, key, prompt_mask=prompt_mask, **options
    )
    after = jnp.arange(length) >= prompt.shape[1]
    positions = jnp.cumsum(valid, 1, dtype=jnp.int32) - 1
    new = {
        "tokens": tokens,
        "mask": (valid & after).astype(jnp.float32),
        "segments": valid.astype(jnp.int32),
        "positions": jnp.maximum(positions, 0),
    }
    if "answer" not in samples:
        new["answer"] = samples["tokens"]
        new["answer_mask"] = samples["mask"] * after
    return {**samples, **new}
