"""Softmax attention: one function, and the program that fits where it runs.

A Pallas kernel on TPU (splash attention), cuDNN's on NVIDIA, plain XLA elsewhere. None of the
kernels has a forward-mode derivative, which continuous-time objectives (MeanFlow, sCM) are made of;
inside `core.net.forward_mode` attention is plain where the scores are small, and otherwise
`blockwise`: online softmax over blocks of keys (arXiv:1805.02867, 2112.05682), which forward,
reverse and reverse-over-forward differentiation go through without ever holding the T x S scores.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdistill.core.net import in_forward_mode
from jaxdistill.core.sharding import per_shard
from jaxdistill.core.types import Array, Refused

# tokens: up to PLAIN x PLAIN scores a head, plain attention is the quicker of the two that
# differentiate forward
PLAIN = 2048
TINY = 1e-15  # what linear attention adds to the sums that it divides by
TILE = 128  # what a kernel's sequence lengths must divide by; longer ones than PLAIN are padded
INTERPRET = False  # runs the Pallas kernel without a TPU, for tests


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Array | None = None,
    causal: bool = False,
    bias: Array | None = None,
    scale: float | None = None,
    cap: float = 0.0,
) -> Array:
    """q [B T H K], k [B S G K], v [B S G V] with G dividing H, mask bool [B or 1, H or 1, T or 1,
    S] True = attend -> [B T H V].

    Scores are `scale` (None: K^-1/2) times the products, plus `bias` [B or 1, H or 1, T, S]; with
    `cap` they are squashed to -cap..cap by tanh; they and the softmax are float32. A row that may
    attend to nothing is undefined (finite).
    """
    queries = q.shape[1]
    keys = k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if bias is not None or cap:  # whoever has a bias for each score holds all of them anyway
        return plain(q, k, v, mask=mask, causal=causal, bias=bias, scale=scale, cap=cap)
    if in_forward_mode():
        return (plain if queries * keys <= PLAIN**2 else blockwise)(
            q, k, v, mask=mask, causal=causal, scale=scale
        )
    of_keys = mask is None or mask.shape[1:3] == (1, 1)  # the same for every head and query
    if not of_keys or queries != keys or (queries % TILE and queries <= PLAIN):
        return plain(q, k, v, mask=mask, causal=causal, scale=scale)
    half = (
        mask is None
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and q.shape[-1] == v.shape[-1] <= 128
    )
    paths = {"tpu": splash, "default": plain} | (
        {"cuda": cudnn} if half and jax.default_backend() == "gpu" else {}
    )
    how = dict(causal=causal, scale=scale) | ({} if mask is None else {"mask": mask})
    return jax.lax.platform_dependent(
        q, k, v, **{name: functools.partial(path, **how) for name, path in paths.items()}
    )


def plain(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Array | None = None,
    causal: bool = False,
    bias: Array | None = None,
    scale: float | None = None,
    cap: float = 0.0,
) -> Array:
    """XLA's, through all T x S scores; the backward pass makes these anew from q, k and v rather
    than keep them.

    Heads come before tokens within: XLA's CPU programs take a quarter less time than with the
    library's order.
    """
    (batch, queries, heads, size), (keys, groups) = q.shape, k.shape[1:3]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scale = size**-0.5 if scale is None else scale

    def attend(q, k, v, mask, bias):
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        q = q.reshape(batch, groups, -1, queries, size)
        scores = (
            jnp.einsum("bgrtk,bgsk->bgrts", q, k, preferred_element_type=wide).reshape(
                batch, heads, queries, keys
            )
            * scale
        )
        scores = scores if bias is None else scores + bias
        scores = cap * jnp.tanh(scores / cap) if cap else scores
        seen = [jnp.tri(queries, keys, dtype=bool)] * causal + [mask] * (mask is not None)
        scores = (
            jnp.where(functools.reduce(jnp.logical_and, seen), scores, -1e30) if seen else scores
        )
        weights = jax.nn.softmax(scores).astype(v.dtype).reshape(batch, groups, -1, queries, keys)
        return jnp.swapaxes(
            jnp.einsum("bgrts,bgsk->bgrtk", weights, v).reshape(batch, heads, queries, -1), 1, 2
        )

    return jax.checkpoint(attend, prevent_cse=False)(q, k, v, mask, bias)


def linear_attention(q: Array, k: Array, v: Array) -> Array:
    """q [B T H K], k and v [B S H K], q and k at least 0 -> sum_s (q_t k_s) v_s / sum_s (q_t k_s)
    [B T H K], float32, in O((T + S) K^2) by way of sum_s k_s v_s.
    """
    sums = lambda formula, *x: jnp.einsum(formula, *x, precision="highest")
    q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
    return sums("bthk,bhkd->bthd", q, sums("bshk,bshd->bhkd", k, v)) / (
        sums("bthk,bhk->bth", q, k.sum(1))[..., None] + TINY
    )


class Negative(NamedTuple):
    """A negative prompt as cross-attention layers get it."""

    states: Array  # [B L E]
    mask: Array | None  # bool [B 1 1 L], True = attend
    alpha: Array  # [B 1 1 1] or [1 1 1 1]


def negative_prompt(cond: Mapping[str, Array]) -> Negative | None:
    """The negative prompt of a condition: "negative" [B L E], "negative_mask" bool [B L] (optional)
    and "nasa", the strength, a scalar or [B], which may be traced. None where there is none. Raises
    Refused on one without the other.
    """
    given = [key for key in ("negative", "nasa") if key in cond]
    if not given:
        return None
    if len(given) < 2:
        raise Refused(
            f"cond: {given[0]!r} alone, expected 'negative' and 'nasa' (the prompt and its strength) together"
        )
    mask = cond["negative_mask"][:, None, None, :].astype(bool) if "negative_mask" in cond else None
    return Negative(cond["negative"], mask, jnp.reshape(jnp.asarray(cond["nasa"]), (-1, 1, 1, 1)))


def nasa(
    q: Array,
    k: Array,
    v: Array,
    negative_k: Array,
    negative_v: Array,
    alpha: Array,
    *,
    mask: Array | None = None,
    negative_mask: Array | None = None,
    scale: float | None = None,
) -> Array:
    """Z+ - alpha Z-: attention to a prompt less alpha times that of the same queries to a negative
    one, for each head and before the output projection (NASA, arXiv:2412.02687). Shapes as in
    `attention`; the prompts may differ in length.

    alpha broadcasts against [B T H K]. Nothing is normalised: at equal prompts it is (1 - alpha)
    Z+.
    """
    positive = attention(q, k, v, mask=mask, scale=scale)
    return (
        positive - alpha * attention(q, negative_k, negative_v, mask=negative_mask, scale=scale)
    ).astype(q.dtype)


def cudnn(
    q: Array, k: Array, v: Array, *, causal: bool = False, scale: float | None = None
) -> Array:
    """Flash attention of cuDNN: bfloat16 or float16, at most 128 channels a head."""
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=causal, implementation="cudnn"
    )


def splash(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Array | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Array:
    """Splash attention (Pallas, TPU): T = S, mask bool [B or 1, 1, 1, S]. Sharded by batch and
    heads; queries also by sequence.

    Lengths are padded to whole tiles. What is masked or padded is a segment of its own, which sees
    itself alone.
    """
    (batch, length), scale = q.shape[:2], q.shape[-1] ** -0.5 if scale is None else scale
    pad = -length % (TILE if length <= PLAIN else 512)
    segments = ()
    if mask is not None or (pad and not causal):  # causal queries do not see what comes behind them
        kept = (
            jnp.ones((batch, length), jnp.int32)
            if mask is None
            else jnp.broadcast_to(mask[:, 0, 0], (batch, length)).astype(jnp.int32)
        )
        segments = (jnp.pad(kept, ((0, 0), (0, pad)), constant_values=2),) * 2

    def local(q, k, v, *segments):
        from jax.experimental.pallas.ops.tpu import splash_attention as pallas

        shape = (q.shape[1], k.shape[1])
        one = pallas.CausalMask(shape) if causal else pallas.FullMask(shape)
        block = next(b for b in (512, 384, 256, TILE) if shape[0] % b == 0)
        keys = next(b for b in (512, 384, 256, TILE) if shape[1] % b == 0)
        sizes = pallas.BlockSizes(
            block_q=block,
            block_kv=keys,
            block_kv_compute=keys,
            block_q_dkv=block,
            block_kv_dkv=keys,
            block_kv_dkv_compute=keys,
            block_q_dq=block,
            block_kv_dq=keys,
        )
        kernel = pallas.make_splash_mha_single_device(
            pallas.MultiHeadMask([one] * q.shape[2]), block_sizes=sizes, interpret=INTERPRET
        )
        heads_first = lambda x: jnp.swapaxes(x, 1, 2)
        scaled = q * jnp.asarray(scale, q.dtype)
        ids = (pallas.SegmentIds(*segments),) if segments else ()
        return heads_first(jax.vmap(kernel)(*map(heads_first, (scaled, k, v)), *ids))

    rows = None if causal else "seq"
    wide = ("batch", rows, "heads", None)
    whole = ("batch", None, "heads", None)
    arrays = *(jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q, k, v)), *segments
    run = per_shard(
        local,
        (wide, whole, whole, *[("batch", rows), ("batch", None)][: len(segments)]),
        wide,
        arrays,
        tile=TILE,
    )
    return (
        plain(q, k, v, mask=mask, causal=causal, scale=scale)
        if run is None
        else run(*arrays)[:, :length]
    )


def blockwise(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    block: int = 512,
) -> Array:
    """The same by online softmax over blocks of `block` queries and keys: memory grows with T + S,
    not T x S.

    Differentiable in every mode. The running maximum that keeps exponentials finite cancels from
    the result, hence carries no derivative.
    """
    (batch, queries, heads, size), (keys, groups) = q.shape, k.shape[1:3]
    rows = min(block, queries)
    columns = min(block, keys)
    pad = lambda x, axis, to: jnp.pad(
        x, [(0, -x.shape[a] % to if a == axis else 0) for a in range(x.ndim)]
    )
    split = lambda x, axis, to: jnp.moveaxis(
        pad(x, axis, to).reshape(*x.shape[:axis], -1, to, *x.shape[axis + 1 :]), axis, 0
    )
    wide = q.astype(jnp.float32).reshape(batch, queries, groups, heads // groups, size) * (
        size**-0.5 if scale is None else scale
    )
    q_blocks = split(wide, 1, rows)
    k_blocks = split(k, 1, columns)
    v_blocks = split(v, 1, columns)
    numbers = lambda blocks: jnp.arange(blocks.shape[0])
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], mask.shape[2], keys))
        mask = mask.reshape(
            mask.shape[0],
            -1 if mask.shape[1] == 1 else groups,
            1 if mask.shape[1] == 1 else heads // groups,
            *mask.shape[2:],
        )
        tall = mask.shape[3] > 1
        mask = split(mask, 4, columns)  # [columns B G R T K]
        mask = split(mask, 4, rows) if tall else mask[None]  # [rows or 1, columns, B G R T K]

    @jax.checkpoint
    def row(inp):
        i, qi = inp

        @jax.checkpoint
        def column(carry, inp):
            top, norm, total = carry
            j, kj, vj = inp
            scores = jnp.einsum("bqgrk,bsgk->bgrqs", qi, kj.astype(jnp.float32))
            at = j * columns + jnp.arange(columns)
            seen = at < keys
            if causal:
                seen = seen & (at <= (i * rows + jnp.arange(rows))[:, None])
            if mask is not None:
                seen = seen & mask[i if tall else 0, j]
            scores = jnp.where(seen, scores, -jnp.inf)
            new = jnp.maximum(top, jax.lax.stop_gradient(scores.max(-1)))
            safe = jnp.where(new == -jnp.inf, 0.0, new)
            weights = jnp.exp(scores - safe[..., None])
            shrink = jnp.exp(top - safe)
            total = total * shrink[..., None] + jnp.einsum(
                "bgrqs,bsgk->bgrqk", weights, vj.astype(jnp.float32)
            )
            return (new, norm * shrink + weights.sum(-1), total), None

        shape = (batch, groups, heads // groups, rows)
        start = jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, v.shape[-1]))
        (_, norm, total), _ = jax.lax.scan(column, start, (numbers(k_blocks), k_blocks, v_blocks))
        return total / jnp.where(norm == 0, 1.0, norm)[..., None]

    out = jax.lax.map(row, (numbers(q_blocks), q_blocks))  # [n B G R q K]
    out = jnp.moveaxis(out, 0, 3).reshape(batch, groups, heads // groups, -1, v.shape[-1])[
        ..., :queries, :
    ]
    return jnp.moveaxis(out, 3, 1).reshape(batch, queries, heads, v.shape[-1]).astype(q.dtype)
