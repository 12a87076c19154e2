"""Softmax attention: one function, and the program that fits where it runs.

A Pallas kernel on TPU (splash attention), cuDNN's on NVIDIA, plain XLA elsewhere. None of the
kernels has a forward-mode derivative, which continuous-time objectives (MeanFlow, sCM) need. Inside
`core.net.forward_mode` attention is therefore plain where the scores are few, and `blockwise`
otherwise: online softmax over blocks of keys (arXiv:1805.02867, 2112.05682). Forward, reverse and
reverse-over-forward differentiation go through it without ever holding the T x S scores.

Shapes: B samples, T queries, S keys, H heads, G groups of heads that share keys, K channels of a
query or key, V channels of a value.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Num, Shaped

from jaxdistill.core.needs import Spec
from jaxdistill.core.net import in_forward_mode
from jaxdistill.core.sharding import per_shard
from jaxdistill.core.types import Array, Refused

# tokens: up to PLAIN x PLAIN scores a head, plain attention is the quicker of the two paths that
# have a forward-mode derivative
PLAIN = 2048
TINY = 1e-15  # added to the denominator of linear attention
TILE = 128  # sequence lengths of a kernel are multiples of it; those above PLAIN are padded
LONG_TILE = 512  # the multiple that lengths above PLAIN are padded to
INTERPRET = False  # runs the Pallas kernel without a TPU, for tests


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    mask: Bool[Array, "#B #H #T #S"] | None = None,
    causal: bool = False,
    bias: Float[Array, "#B #H #T #S"] | None = None,
    scale: float | None = None,
    cap: float = 0.0,
) -> Float[Array, "B T H V"]:
    """Attention of grouped queries; a query that may attend to nothing gives a finite result.

    Args:
        q: queries, of a multiple of G heads.
        k: keys.
        v: values.
        mask: True where a query attends to a key.
        causal: whether query t attends to the keys 0 to t only.
        bias: added to the scores.
        scale: of the products of queries and keys; None: K^-1/2.
        cap: where not 0, scores s become cap tanh(s / cap).

    Scores and softmax are float32.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if (
        bias is not None or cap
    ):  # a bias is as large as the scores that the kernels save
        return plain(
            q, k, v, mask=mask, causal=causal, bias=bias, scale=scale, cap=cap
        )
    if in_forward_mode():
        few = q.shape[1] * k.shape[1] <= PLAIN**2
        path = plain if few else blockwise
        return path(q, k, v, mask=mask, causal=causal, scale=scale)
    if not _fits_splash(q.shape[1], k.shape[1], mask):
        return plain(q, k, v, mask=mask, causal=causal, scale=scale)
    paths = {"tpu": splash, "default": plain}
    if mask is None and _fits_cudnn(q, v) and jax.default_backend() == "gpu":
        paths["cuda"] = cudnn
    options = dict(causal=causal, scale=scale)
    if mask is not None:
        options["mask"] = mask
    bound = {name: functools.partial(path, **options) for name, path in paths.items()}
    return jax.lax.platform_dependent(q, k, v, **bound)


def _fits_splash(queries: int, keys: int, mask: Array | None) -> bool:
    """Whether the kernel takes these lengths, and a mask that is the same for all queries."""
    of_keys = mask is None or mask.shape[1:3] == (1, 1)
    tiled = queries % TILE == 0 or queries > PLAIN
    return of_keys and queries == keys and tiled


def _fits_cudnn(q: Array, v: Array) -> bool:
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return half and q.shape[-1] == v.shape[-1] <= 128


def plain(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    mask: Bool[Array, "#B #H #T #S"] | None = None,
    causal: bool = False,
    bias: Float[Array, "#B #H #T #S"] | None = None,
    scale: float | None = None,
    cap: float = 0.0,
) -> Float[Array, "B T H V"]:
    """Attention by XLA through all T x S scores.

    The backward pass computes the scores again from q, k and v rather than keep them. Inside, heads
    come before tokens: XLA's programs for the CPU take a quarter less time than with the library's
    order.
    """
    batch, queries, heads, size = q.shape
    keys, groups = k.shape[1:3]
    score_dtype = jnp.promote_types(q.dtype, jnp.float32)
    scale = size**-0.5 if scale is None else scale

    def attend(q, k, v, mask, bias):
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        q = q.reshape(batch, groups, -1, queries, size)
        scores = jnp.einsum(
            "bgrtk,bgsk->bgrts", q, k, preferred_element_type=score_dtype
        )
        scores = scores.reshape(batch, heads, queries, keys) * scale
        if bias is not None:
            scores = scores + bias
        if cap:
            scores = cap * jnp.tanh(scores / cap)
        masks = [jnp.tri(queries, keys, dtype=bool)] if causal else []
        if mask is not None:
            masks.append(mask)
        if masks:
            scores = jnp.where(
                functools.reduce(jnp.logical_and, masks), scores, -1e30
            )
        weights = jax.nn.softmax(scores).astype(v.dtype)
        weights = weights.reshape(batch, groups, -1, queries, keys)
        out = jnp.einsum("bgrts,bgsk->bgrtk", weights, v)
        return jnp.swapaxes(out.reshape(batch, heads, queries, -1), 1, 2)

    return jax.checkpoint(attend, prevent_cse=False)(q, k, v, mask, bias)


def linear_attention(
    q: Float[Array, "B T H K"], k: Float[Array, "B S H K"], v: Float[Array, "B S H V"]
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
    causal: bool = False,
    scale: float | None = None,
) -> Float[Array, "B T H K"]:
    """Flash attention of cuDNN: bfloat16 or float16, at most 128 channels a head."""
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=causal, implementation="cudnn"
    )


def splash(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    mask: Bool[Array, "#B 1 1 T"] | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Array, "B T H V"]:
    """Splash attention (Pallas, TPU), sharded by samples and heads, and queries by sequence too.

    Lengths are padded to full tiles. Masked and padded tokens are segments of their own, which see
    themselves alone.
    """
    batch, length = q.shape[:2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    pad = -length % (TILE if length <= PLAIN else LONG_TILE)
    segments = ()
    if mask is not None or (
        pad and not causal
    ):  # causal queries do not see the padding behind
        # of queries and of keys
        segments = (_segments(mask, batch, length, pad),) * 2

    def local(q, k, v, *segments):
        kernel, ids = _splash_kernel(
            q.shape[1], k.shape[1], q.shape[2], causal, segments
        )
        scaled = q * jnp.asarray(scale, q.dtype)
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (scaled, k, v))
        return jnp.swapaxes(jax.vmap(kernel)(q, k, v, *ids), 1, 2)

    query_axis = None if causal else "seq"
    of_queries = ("batch", query_axis, "heads", None)
    of_keys = ("batch", None, "heads", None)
    of_segments = [("batch", query_axis), ("batch", None)][: len(segments)]
    pads = ((0, 0), (0, pad), (0, 0), (0, 0))
    padded = [jnp.pad(x, pads) for x in (q, k, v)]
    arrays = (*padded, *segments)
    names = (of_queries, of_keys, of_keys, *of_segments)
    run = per_shard(local, names, of_queries, arrays, tile=TILE)
    if run is None:
        return plain(q, k, v, mask=mask, causal=causal, scale=scale)
    return run(*arrays)[:, :length]


def _segments(mask: Array | None, batch: int, length: int, pad: int) -> Array:
    """int32 [B T + pad]: 1 for tokens that are attended to, 0 for masked ones, 2 for padding."""
    if mask is None:
        kept = jnp.ones((batch, length), jnp.int32)
    else:
        kept = jnp.broadcast_to(mask[:, 0, 0], (batch, length)).astype(jnp.int32)
    return jnp.pad(kept, ((0, 0), (0, pad)), constant_values=2)


def _splash_kernel(
    queries: int, keys: int, heads: int, causal: bool, segments: tuple[Array, ...]
) -> tuple[Callable, tuple]:
    """(the kernel of one sample, its arguments besides q, k and v)."""
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    shape = (queries, keys)
    head = pallas.CausalMask(shape) if causal else pallas.FullMask(shape)
    query_block = _largest_block(queries)
    key_block = _largest_block(keys)
    sizes = pallas.BlockSizes(
        block_q=query_block,
        block_kv=key_block,
        block_kv_compute=key_block,
        block_q_dkv=query_block,
        block_kv_dkv=key_block,
        block_kv_dkv_compute=key_block,
        block_q_dq=query_block,
        block_kv_dq=key_block,
    )
    mask = pallas.MultiHeadMask([head] * heads)
    kernel = pallas.make_splash_mha_single_device(
        mask, block_sizes=sizes, interpret=INTERPRET
    )
    ids = (pallas.SegmentIds(*segments),) if segments else ()
    return kernel, ids


def _largest_block(length: int) -> int:
    """The largest block of the kernel that divides a length, which is a multiple of TILE."""
    return next(size for size in (512, 384, 256, TILE) if length % size == 0)


def blockwise(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    mask: Bool[Array, "#B #H #T #S"] | None = None,
    causal: bool = False,
    scale: float | None = None,
    block: int = 512,
) -> Float[Array, "B T H V"]:
    """Attention by online softmax over blocks of `block` queries and keys.

    Memory grows with T + S, not T x S. It is differentiable in every mode. The running maximum that
    keeps the exponentials finite cancels from the result, so it carries no derivative.

    Source: arXiv:1805.02867, 2112.05682.
    """
    batch, queries, heads, size = q.shape
    keys, groups = k.shape[1:3]
    repeats = heads // groups
    scale = size**-0.5 if scale is None else scale
    rows = min(block, queries)
    columns = min(block, keys)
    grouped = (
        q.astype(jnp.float32).reshape(batch, queries, groups, repeats, size) * scale
    )
    q_blocks = _blocks(grouped, 1, rows)
    k_blocks = _blocks(k, 1, columns)
    v_blocks = _blocks(v, 1, columns)
    mask_blocks = (
        None
        if mask is None
        else _mask_blocks(mask, keys, groups, repeats, rows, columns)
    )

    visible = functools.partial(_visible, mask_blocks, causal, keys, rows, columns)

    @jax.checkpoint
    def query_block(inputs):
        i, q_block = inputs

        @jax.checkpoint
        def key_block(softmax, inputs):
            j, k_block, v_block = inputs
            scores = jnp.einsum(
                "bqgrk,bsgk->bgrqs", q_block, k_block.astype(jnp.float32)
            )
            scores = jnp.where(visible(i, j), scores, -jnp.inf)
            return softmax.with_block(scores, v_block), None

        start = OnlineSoftmax.empty((batch, groups, repeats, rows), v.shape[-1])
        blocks = (jnp.arange(len(k_blocks)), k_blocks, v_blocks)
        softmax, _ = jax.lax.scan(key_block, start, blocks)
        return softmax.mean()

    # [blocks B G R rows V]
    out = jax.lax.map(query_block, (jnp.arange(len(q_blocks)), q_blocks))
    channels = v.shape[-1]
    out = jnp.moveaxis(out, 0, 3)
    out = out.reshape(batch, groups, repeats, -1, channels)
    out = jnp.moveaxis(out[..., :queries, :], 3, 1)
    return out.reshape(batch, queries, heads, channels).astype(q.dtype)


class OnlineSoftmax(NamedTuple):
    """Values weighted by the softmax of the scores so far, in float32 (arXiv:1805.02867)."""

    maximum: Array  # [B G R T], of the scores so far; -inf: all of them masked
    norm: Array  # [B G R T]: the sum of exp(score - maximum)
    total: Array  # [B G R T V]: the sum of exp(score - maximum) times the key's value

    @classmethod
    def empty(cls, shape: tuple[int, ...], channels: int) -> OnlineSoftmax:
        total = jnp.zeros((*shape, channels))
        return cls(jnp.full(shape, -jnp.inf), jnp.zeros(shape), total)

    def with_block(
        self, scores: Float[Array, "B G R T S"], values: Float[Array, "B S G V"]
    ) -> OnlineSoftmax:
        """After one more block of keys."""
        maximum = jnp.maximum(self.maximum, jax.lax.stop_gradient(scores.max(-1)))
        finite = jnp.where(maximum == -jnp.inf, 0.0, maximum)
        weights = jnp.exp(scores - finite[..., None])
        shrink = jnp.exp(self.maximum - finite)
        added = jnp.einsum("bgrqs,bsgk->bgrqk", weights, values.astype(jnp.float32))
        total = self.total * shrink[..., None] + added
        return OnlineSoftmax(maximum, self.norm * shrink + weights.sum(-1), total)

    def mean(self) -> Float[Array, "B G R T V"]:
        """The attended values; 0 where every key is masked."""
        norm = jnp.where(self.norm == 0, 1.0, self.norm)
        return self.total / norm[..., None]


def _blocks(x: Array, axis: int, size: int) -> Array:
    """`x` padded with zeros and cut along `axis` into blocks of `size`, a new first axis."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, -x.shape[axis] % size)
    before = x.shape[:axis]
    behind = x.shape[axis + 1 :]
    cut = jnp.pad(x, pads).reshape(*before, -1, size, *behind)
    return jnp.moveaxis(cut, axis, 0)


def _visible(
    mask_blocks: Array | None,
    causal: bool,
    keys: int,
    rows: int,
    columns: int,
    i: Array,
    j: Array,
) -> Array:
    """Which keys of block j the queries of block i attend to: bool [.. rows or 1, columns]."""
    key_indices = j * columns + jnp.arange(columns)
    visible = key_indices < keys  # the rest is padding
    if causal:
        query_indices = i * rows + jnp.arange(rows)
        visible = visible & (key_indices <= query_indices[:, None])
    if mask_blocks is not None:
        visible = visible & mask_blocks[i if mask_blocks.shape[0] > 1 else 0, j]
    return visible


def _mask_blocks(
    mask: Array, keys: int, groups: int, repeats: int, rows: int, columns: int
) -> Array:
    """A mask [B H T S] (1 where it is the same for all) in blocks.

    Returns bool [query blocks, key blocks, B, G, R, rows, columns]; for a mask that is the same for
    all queries the first and the sixth axis are 1.
    """
    batch, heads, queries = mask.shape[:3]
    mask = jnp.broadcast_to(mask, (batch, heads, queries, keys))
    grouped = (1, 1) if heads == 1 else (groups, repeats)
    mask = mask.reshape(batch, *grouped, queries, keys)
    mask = _blocks(mask, 4, columns)
    return mask[None] if queries == 1 else _blocks(mask, 4, rows)
