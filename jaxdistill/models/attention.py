"""Softmax attention: one function, and the program that fits where it runs.

A Pallas kernel on TPU (splash attention), cuDNN's on NVIDIA, plain XLA elsewhere. None of the
kernels has a forward-mode derivative, which continuous-time objectives (MeanFlow, sCM) need. Inside
`core.net.forward_mode` attention is therefore plain where the scores are few, and `blockwise`
otherwise: online softmax over blocks of keys (arXiv:1805.02867, 2112.05682). Forward, reverse and
reverse-over-forward differentiation go through it without ever holding the T x S scores.

Self-attention takes the kernels at every length that they take without padding, and at all lengths
above PLAIN. Keys that differ in number from the queries, and masks by block, take them from
PLAIN x PLAIN scores a head on, 16 MiB in float32. With fewer, the text of most pictures, the
scores are no larger than the activations beside them, and padding to tiles would cost more than
it saves. What the kernels do not take is then blockwise.

Shapes: B samples, T queries, S keys, H heads, G groups of heads that share keys, K channels of a
query or key, V channels of a value.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Num, Shaped

from jaxdistill.core.needs import Spec
from jaxdistill.core.net import in_forward_mode
from jaxdistill.core.types import Array, Refused
from jaxdistill.models.masks import BlockMask
from jaxdistill.models.softmax import blockwise, plain
from jaxdistill.models.splash import PLAIN, TILE, splash

TINY = 1e-15  # added to the denominator of linear attention


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    mask: Bool[Array, "#B #H #T #S"] | None = None,
    blocks: BlockMask | None = None,
    causal: bool = False,
    bias: Float[Array, "#B #H #T #S"] | None = None,
    scale: float | None = None,
    cap: float = 0.0,
) -> Float[Array, "B T H V"]:
    """Attention of grouped queries, by the path that fits.

    A query that attends to no key gives 0, and passes no gradient; with a mask alone `plain` gives
    the mean of all values.

    Args:
        q: queries, of a multiple of G heads.
        k: keys.
        v: values.
        mask: True where a query attends to a key.
        blocks: which blocks of keys a block of queries attends to, of what `mask` leaves.
        causal: whether query t attends to the keys 0 to t only, whatever T and S are.
        bias: added to the scores.
        scale: of the products of queries and keys; None: K^-1/2.
        cap: where not 0, scores s become cap tanh(s / cap).

    Scores and softmax are float32.

    Raises:
        Refused: on blocks that do not fit the queries and keys.
    """
    batch, queries, heads, size = q.shape
    keys = k.shape[1]
    scale = size**-0.5 if scale is None else scale
    if blocks is not None:
        blocks.check(batch, heads, queries, keys)
    options = dict(mask=mask, blocks=blocks, causal=causal, scale=scale)
    # a bias is as large as the scores that the kernels save
    if bias is not None or cap:
        return plain(q, k, v, bias=bias, cap=cap, **options)
    many = queries * keys > PLAIN**2
    if in_forward_mode():
        path = blockwise if many else plain
        return path(q, k, v, **options)
    square = blocks is None and queries == keys
    by_keys = mask is None or mask.shape[1:3] == (1, 1)
    few = not (_fits_square(queries) if square else many)
    # a mask of all T x S entries takes as much memory as the scores
    if few or (not by_keys and blocks is None):
        return plain(q, k, v, **options)
    if not by_keys:
        return blockwise(q, k, v, **options)
    other = plain if square else blockwise
    paths = {
        "tpu": functools.partial(splash, **options),
        "default": functools.partial(other, **options),
    }
    without_mask = square and mask is None
    of_keys = blocks is None and not square and not causal
    on_gpu = jax.default_backend() == "gpu" and _fits_cudnn(q, v)
    if on_gpu and (without_mask or of_keys):
        paths["cuda"] = functools.partial(
            cudnn, mask=mask, causal=causal, scale=scale
        )
    return jax.lax.platform_dependent(q, k, v, **paths)


def _fits_square(length: int) -> bool:
    """Whether the kernel takes as many queries as keys of this number."""
    return length % TILE == 0 or length > PLAIN


def _fits_cudnn(q: Array, v: Array) -> bool:
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    size = q.shape[-1]
    return half and size == v.shape[-1] <= 128 and size % 8 == 0


def linear_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H V"],
) -> Float[Array, "B T H V"]:
    """sum_s (q_t k_s) v_s / sum_s (q_t k_s) for q, k >= 0, in float32 and O((T + S) K V)."""
    sums = functools.partial(jnp.einsum, precision="highest")
    q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
    numerator = sums("bthk,bhkd->bthd", q, sums("bshk,bshd->bhkd", k, v))
    denominator = sums("bthk,bhk->bth", q, k.sum(1))
    return numerator / (denominator[..., None] + TINY)


class Negative(NamedTuple):
    """A negative prompt as cross-attention layers get it."""

    tokens: Array  # [B L E]
    mask: Array | None  # bool [B 1 1 L], True = attend
    alpha: Array  # [B 1 1 1] or [1 1 1 1]


def negative_needs(text_dim: int) -> dict[str, Any]:
    """The optional entries of a condition that make a negative prompt (core/needs.py)."""
    return {
        "negative": Float[Spec, f"_ M {text_dim}"],
        "negative_mask": Shaped[Spec, "_ M"],
        "nasa": Num[Spec, "*batch"],
    }


def negative_prompt(cond: Mapping[str, Any]) -> Negative | None:
    """The negative prompt of a condition; None where it has none.

    Args:
        cond: may hold "negative" [B L E], "negative_mask" bool [B L] and "nasa", the strength of
          the negative prompt: a scalar or [B], which may be traced. "negative_mask" is optional.

    Raises:
        Refused: on one of "negative" and "nasa" without the other.
    """
    given = [key for key in ("negative", "nasa") if key in cond]
    if not given:
        return None
    if len(given) < 2:
        together = "'negative' and 'nasa' (the prompt and its strength) together"
        raise Refused(f"cond: {given[0]!r} alone, expected {together}")
    mask = None
    if "negative_mask" in cond:
        mask = cond["negative_mask"][:, None, None, :].astype(bool)
    alpha = jnp.reshape(jnp.asarray(cond["nasa"]), (-1, 1, 1, 1))
    return Negative(cond["negative"], mask, alpha)


def nasa(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H V"],
    negative_k: Float[Array, "B L H K"],
    negative_v: Float[Array, "B L H V"],
    alpha: Num[Array, "#B #T #H #V"],
    *,
    mask: Bool[Array, "#B #H #T #S"] | None = None,
    negative_mask: Bool[Array, "#B #H #T #L"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B T H V"]:
    """Z+ - alpha Z-: attention to a prompt less alpha times that to a negative prompt.

    It is taken for each head and before the output projection. Nothing is normalised: at equal
    prompts the result is (1 - alpha) Z+.

    Source: NASA, SNOOPI, arXiv:2412.02687.
    """
    positive = attention(q, k, v, mask=mask, scale=scale)
    negative = attention(q, negative_k, negative_v, mask=negative_mask, scale=scale)
    return (positive - alpha * negative).astype(q.dtype)


def cudnn(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    *,
    mask: Bool[Array, "#B 1 1 S"] | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Array, "B T H K"]:
    """Flash attention of cuDNN: bfloat16 or float16, at most 128 channels a head, a multiple of 8.

    A mask, of keys, goes without `causal`: the keys that count are brought to the front.
    """
    options = dict(scale=scale, is_causal=causal, implementation="cudnn")
    if mask is None:
        return jax.nn.dot_product_attention(q, k, v, **options)
    k, v, counts = kept_first(k, v, mask)
    lengths = jnp.maximum(counts, 1)
    out = jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=lengths, **options
    )
    return jnp.where((counts > 0)[:, None, None, None], out, 0)


def kept_first(
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    mask: Bool[Array, "#B 1 1 S"],
) -> tuple[Float[Array, "B S G K"], Float[Array, "B S G V"], Int[Array, " B"]]:
    """Keys and values with those that `mask` keeps in front, and how many it keeps."""
    kept = jnp.broadcast_to(mask[:, 0, 0], k.shape[:2])
    order = jnp.argsort(~kept, axis=1, stable=True)[..., None, None]
    k, v = (jnp.take_along_axis(x, order, axis=1) for x in (k, v))
    return k, v, kept.sum(1, dtype=jnp.int32)
