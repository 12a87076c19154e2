"""T5 (arXiv:1910.10683), T5 1.1 and UMT5 (2304.09151): encoder and decoder of RMS norms.

Positions are biases of the scores that depend on the distance. Weights are those of transformers'
`T5ForConditionalGeneration`, `T5EncoderModel` and `UMT5EncoderModel`, layers stacked. Scores are
not divided by the square root of the head's size; instead the initial weights of the queries are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int, Integer, Shaped

from jaxdistill.core.fields import Depth, Dtype, Remat
from jaxdistill.core.rows import project
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array, Refused
from jaxdistill.models.language.lm import zero_store
from jaxdistill.models.layers import (
    LECUN,
    append_to_store,
    attention,
    dense,
    embedding,
    empty_stores,
    key_mask,
    lookup,
    rms_norm,
    scan_layers,
    scan_stores,
    split_heads,
    stack,
    unstacked,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Encoder:
    """Sizes of an encoder alone, as text-to-image models have it. Defaults are a toy's.

    T5 1.1's XXL is vocab 32128, dim 4096, mlp 10240, heads 64, head_dim 64, depth 24, gated.
    """

    shared_bias: ClassVar[bool] = True  # one table of position biases for all layers

    vocab: int = 64
    dim: int = 64
    mlp: int = 128
    heads: int = 4
    head_dim: int = 16
    depth: Depth = 4
    gated: bool = False  # the MLP is GELU times linear (T5 1.1, UMT5); False: ReLU
    buckets: int = 32  # of relative positions
    distance: int = 128  # tokens from which on all are in the last bucket
    norm_eps: float = 1e-6
    # The network does not use the special tokens; sampling and data pipelines do.
    eos: tuple[int, ...] = (1,)  # tokens that end a text
    pad: int = 0  # padding token
    dtype: Dtype = "float32"  # arithmetic; weights are float32
    remat: Remat = "none"

    def __call__(self, rngs: nnx.Rngs) -> T5EncoderModule:
        return T5EncoderModule(self, rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UMT5Encoder(T5Encoder):
    """Every layer has position biases of its own.

    UMT5-XXL is vocab 256384, dim 4096, mlp 10240, heads 64, head_dim 64, depth 24, gated.
    """

    shared_bias: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5(T5Encoder):
    """Encoder and decoder.

    T5-small is vocab 32128, dim 512, mlp 2048, heads 8, head_dim 64, depth 6, tied.
    """

    depth_decoder: int = 0  # 0: depth
    # the output head is the embedding table, on features divided by sqrt(dim) (T5); False: a head
    # of its own (1.1)
    tied: bool = True
    start: int = 0  # token that every decoded text begins with

    def __call__(self, rngs: nnx.Rngs) -> T5Module:
        return T5Module(self, rngs)


class Attention(nnx.Module):
    """The maps of an attention and the norm before it. `attend` computes the attention."""

    def __init__(self, cfg: T5Encoder, rngs: nnx.Rngs):
        d = cfg.dim
        inner = cfg.heads * cfg.head_dim
        dtype = jnp.dtype(cfg.dtype)
        make = functools.partial(
            dense, rngs=rngs, bias=False, init=LECUN, dtype=dtype
        )
        query_init = nnx.initializers.normal((d * cfg.head_dim) ** -0.5)
        self.heads = cfg.heads
        self.norm = rms_norm(d, rngs=rngs, eps=cfg.norm_eps, dtype=dtype)
        self.to_q = make(d, inner, ("embed", "heads"), init=query_init)
        self.to_k = make(d, inner, ("embed", "heads"))
        self.to_v = make(d, inner, ("embed", "heads"))
        self.to_out = make(inner, d, ("heads", "embed"))

    def keys_values(
        self, h: Float[Array, "B S D"]
    ) -> tuple[Float[Array, "B S H K"], Float[Array, "B S H K"]]:
        """Keys and values of features, which are normed already."""
        return split_heads(self.to_k(h), self.heads), split_heads(
            self.to_v(h), self.heads
        )

    def __call__(
        self, x: Float[Array, "B T D"], attend: Callable
    ) -> tuple[Float[Array, "B T D"], Any]:
        """(x + attention, extra), where attend(q, normed x) -> (attended [B T H K], extra)."""
        h = self.norm(x)
        attended, extra = attend(split_heads(self.to_q(h), self.heads), h)
        branch = self.to_out(attended.reshape(*x.shape[:2], -1))
        return constrain(x + branch, "batch", "seq", None), extra


class Block(nnx.Module):
    """A layer of the encoder."""

    def __init__(self, cfg: T5Encoder, rngs: nnx.Rngs):
        d = cfg.dim
        dtype = jnp.dtype(cfg.dtype)
        make = functools.partial(dense, rngs=rngs, bias=False, dtype=dtype)
        self.gated = cfg.gated
        self.attention = Attention(cfg, rngs)
        if not cfg.shared_bias:
            self.position = embedding(
                cfg.buckets, cfg.heads, rngs=rngs, names=("index", "heads")
            )
        self.norm_mlp = rms_norm(d, rngs=rngs, eps=cfg.norm_eps, dtype=dtype)
        if cfg.gated:
            self.gate = make(d, cfg.mlp, ("embed", "mlp"))
        self.up = make(d, cfg.mlp, ("embed", "mlp"))
        self.down = make(cfg.mlp, d, ("mlp", "embed"))

    def mlp_branch(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """x plus the branch of the MLP."""
        h = self.norm_mlp(x)
        if self.gated:
            h = nnx.gelu(self.gate(h), approximate=True) * self.up(h)
        else:
            h = nnx.relu(self.up(h))
        return constrain(x + self.down(h), "batch", "seq", None)


class DecoderBlock(Block):
    """A layer of the decoder: it also attends to the encoder's features."""

    def __init__(self, cfg: T5, rngs: nnx.Rngs):
        super().__init__(cfg, rngs)
        self.cross = Attention(cfg, rngs)


class Stack(nnx.Module):
    """The layers of encoder or decoder, the position biases that they share, the last norm."""

    def __init__(self, cfg: T5Encoder, make: type[Block], depth: int, rngs: nnx.Rngs):
        self.blocks = stack(lambda r: make(cfg, r), depth, rngs)
        if cfg.shared_bias:
            self.position = embedding(
                cfg.buckets, cfg.heads, rngs=rngs, names=("index", "heads")
            )
        self.norm = rms_norm(
            cfg.dim, rngs=rngs, eps=cfg.norm_eps, dtype=jnp.dtype(cfg.dtype)
        )


class T5EncoderModule(nnx.Module):
    def __init__(self, cfg: T5Encoder, rngs: nnx.Rngs):
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        self.embed = embedding(cfg.vocab, cfg.dim, rngs=rngs, std=1.0)
        self.encoder = Stack(cfg, Block, cfg.depth, rngs)

    def __call__(
        self,
        tokens: Integer[Array, "B S"],
        *,
        mask: Shaped[Array, "B S"] | None = None,
        taps: tuple[int, ...] = (),
    ) -> Float[Array, "B S D"] | tuple[Float[Array, "B S D"], tuple]:
        """The normed output; with `taps`, (this, features [B S D] of those blocks, not normed).

        `mask` is False on padding, wherever it stands.
        """
        return self.encode(tokens, mask=mask, taps=taps)

    def encode(
        self,
        tokens: Integer[Array, "B S"],
        *,
        mask: Shaped[Array, "B S"] | None = None,
        taps: tuple[int, ...] = (),
    ) -> Float[Array, "B S D"] | tuple[Float[Array, "B S D"], tuple]:
        """The output of the encoder, as `T5EncoderModule.__call__` gives it."""
        cfg = self.cfg
        indices = jnp.arange(tokens.shape[1])
        places = bucket(
            indices - indices[:, None], cfg.buckets, cfg.distance, both=True
        )
        seen = key_mask(mask)
        shared = biases(self.encoder.position, places) if cfg.shared_bias else None

        def layer(x, block):
            bias = biases(block.position, places) if shared is None else shared

            def attend(q, h):
                k, v = block.attention.keys_values(h)
                return attention(q, k, v, bias=bias, mask=seen, scale=1.0), None

            x, _ = block.attention(x, attend)
            return block.mlp_branch(x), None

        x = self._embed(tokens)
        blocks = self.encoder.blocks
        x, _, features = scan_layers(
            layer, x, blocks, cfg.depth, remat=cfg.remat, taps=taps
        )
        x = self.encoder.norm(x)
        return (x, features) if taps else x

    def _embed(self, tokens: Array) -> Array:
        return constrain(
            lookup(self.embed, tokens).astype(self.dtype), "batch", "seq", None
        )


class T5Module(T5EncoderModule):
    def __init__(self, cfg: T5, rngs: nnx.Rngs):
        super().__init__(cfg, rngs)
        self.decoder = Stack(cfg, DecoderBlock, self.depth, rngs)
        if not cfg.tied:
            self.unembed = dense(
                cfg.dim, cfg.vocab, ("embed", "vocab"), rngs=rngs, bias=False
            )

    @property
    def depth(self) -> int:
        return self.cfg.depth_decoder or self.cfg.depth

    def __call__(
        self,
        source: Integer[Array, "B S"],
        tokens: Integer[Array, "B T"],
        *,
        source_mask: Shaped[Array, "B S"] | None = None,
        mask: Shaped[Array, "B T"] | None = None,
        taps: tuple[int, ...] = (),
        hidden_only: bool = False,
    ) -> Float[Array, "B T _"] | tuple[Float[Array, "B T _"], tuple]:
        """Logits [B T V] in float32: position t predicts what follows tokens[t].

        Args:
            source: tokens of the encoder.
            tokens: inputs of the decoder, which begin with `cfg.start` (`shifted` makes them from
              targets).
            source_mask: False on padding.
            mask: False on padding.
            taps: indices of blocks of the decoder; with them the result is (logits, features [B T
              D] of those blocks).
            hidden_only: gives the final activations [B T D] that `head()` projects, in place of
              logits.
        """
        encoded = self.encode(source, mask=source_mask)
        cache = {"source": encoded, "source_valid": valid_tokens(source, source_mask)}
        return self.decode(
            tokens, cache=cache, mask=mask, taps=taps, hidden_only=hidden_only
        )

    def decode(
        self,
        tokens: Integer[Array, "B T"],
        *,
        cache: dict[str, Any],
        mask: Shaped[Array, "B T"] | None = None,
        taps: tuple[int, ...] = (),
        hidden_only: bool = False,
    ) -> Float[Array, "B T _"] | tuple:
        """As `__call__`, on tokens that follow those that `cache` holds: (logits, cache, ...).

        A cache (see `init_cache`) of "source" [B S D] and "source_valid" bool [B S] alone holds no
        text, and is not part of the result.
        """
        cfg = self.cfg
        batch, new = tokens.shape
        growing = "stores" in cache
        start = cache["length"] if growing else 0
        mask = jnp.ones((batch, new), bool) if mask is None else mask.astype(bool)
        valid = mask
        stores = ((),)
        layers = (self.decoder.blocks, ())
        if growing:
            valid = jax.lax.dynamic_update_slice(cache["valid"], mask, (0, start))
            stores = cache["stores"]
            layers = cache["layers"] or (self.decoder.blocks, cache["source_pairs"])
        layer = self._decoder_layer(cache, valid, start, new)
        x = self._embed(tokens)
        x, stores, features = scan_stores(
            layer, x, layers, stores, self.depth, remat=cfg.remat, taps=taps
        )
        x = self.decoder.norm(x)
        if cfg.tied:
            x = x * cfg.dim**-0.5
        out = x if hidden_only else self._logits(x)
        extras = ()
        if growing:
            extras = (
                {**cache, "stores": stores, "valid": valid, "length": start + new},
            )
        if taps:
            extras = (*extras, features)
        return (out, *extras) if extras else out

    def _decoder_layer(
        self, cache: dict[str, Any], valid: Array, start: Array | int, new: int
    ) -> Callable:
        """A layer of the decoder for `scan_stores`, on `new` tokens from position `start` on.

        `valid` bool [B T] says which tokens so far are not padding.
        """
        cfg = self.cfg
        growing = "stores" in cache
        apart = jnp.arange(valid.shape[1]) - (start + jnp.arange(new))[:, None]
        seen = (apart <= 0) & valid[:, None, None, :]
        source_seen = key_mask(cache["source_valid"])
        bias = biases(
            self.decoder.position,
            bucket(apart, cfg.buckets, cfg.distance, both=False),
        )

        def layer(carry, inputs):
            x, store = carry
            (block, source_pair), i = inputs

            def attend_text(q, h):
                pair = block.attention.keys_values(h)
                kept = store
                if growing:
                    kept, pair = append_to_store(store, i, start, pair)
                return attention(q, *pair, bias=bias, mask=seen, scale=1.0), kept

            def attend_source(q, h):
                pair = (
                    source_pair
                    if growing
                    else block.cross.keys_values(cache["source"])
                )
                return attention(q, *pair, mask=source_seen, scale=1.0), None

            x, store = block.attention(x, attend_text)
            x, _ = block.cross(x, attend_source)
            return (block.mlp_branch(x), store), None

        return layer

    def init_cache(
        self,
        encoded: Float[Array, "B S D"],
        length: int,
        *,
        source_mask: Shaped[Array, "B S"] | None = None,
    ) -> dict[str, Any]:
        """An empty cache of `decode` for `length` tokens a sequence about encoded sources.

        Returns:
            "source_pairs": keys and values of the sources, a pair of [layers B S H K]; where each
            layer has a store, they are a pair of [B S H K] with each of "layers". "source_valid"
            bool [B S]; "stores" of the text [B H length K]; "valid" bool [B length]; "length" int32
            [].
        """
        cfg = self.cfg
        batch = encoded.shape[0]
        shape = (batch, cfg.heads, length, cfg.head_dim)
        source_pair = lambda block: block.cross.keys_values(encoded)
        pairs = jax.lax.map(source_pair, self.decoder.blocks)
        layers = unstacked((self.decoder.blocks, pairs), self.depth)
        return {
            "stores": empty_stores(
                self.depth, functools.partial(zero_store, shape, self.dtype)
            ),
            "valid": jnp.zeros((batch, length), bool),
            "length": jnp.zeros((), jnp.int32),
            "source_valid": valid_tokens(encoded[..., 0], source_mask),
            "source_pairs": () if layers else pairs,
            "layers": layers,
        }

    def _logits(self, x: Array) -> Array:
        logits = project(x, self.head(), jnp.float32)
        return constrain(logits, "batch", "seq", "vocab")

    def head(self) -> Float[Array, "D V"]:
        """The unembedding matrix, in the arithmetic's dtype."""
        if self.cfg.tied:
            return self.embed.embedding[...].T.astype(self.dtype)
        return self.unembed.kernel[...].astype(self.dtype)


def valid_tokens(
    source: Shaped[Array, "B S"], mask: Shaped[Array, "B S"] | None
) -> Bool[Array, "B S"]:
    """The mask of a source; None: all of it."""
    return jnp.ones(source.shape, bool) if mask is None else mask.astype(bool)


def shifted(targets: Integer[Array, "B T"], start: int) -> Integer[Array, "B T"]:
    """The decoder's inputs for targets: `start`, then all targets but the last."""
    first = jnp.full_like(targets[:, :1], start)
    return jnp.concatenate([first, targets[:, :-1]], 1)


def biases(table: nnx.Embed, places: Int[Array, "T S"]) -> Float[Array, "1 H T S"]:
    """Biases of the scores for buckets of relative positions, in float32."""
    by_head = jnp.moveaxis(jnp.take(table.embedding[...], places, axis=0), -1, 0)
    return by_head[None].astype(jnp.float32)


def bucket(
    apart: Int[Array, "*B"], buckets: int, distance: int, *, both: bool
) -> Int[Array, "*B"]:
    """The bucket of a relative position (T5, section 2.1).

    Half of the buckets are for the distances 0, 1, ...; the others grow geometrically up to
    `distance`, beyond which all distances are in the last.

    Args:
        apart: key position less query position.
        buckets: their number.
        distance: from which on all are in the last bucket.
        both: whether keys ahead have one half of the buckets; if not, they are in bucket 0.
    """
    count = buckets // 2 if both else buckets
    exact = count // 2
    if not 0 < exact < distance:
        raise Refused(
            f"model: buckets={buckets}, distance={distance}: expected distance > {exact} > 0"
        )
    far = np.arange(exact, distance + 1, dtype=np.float32)
    share = np.log(far / exact) / np.float32(np.log(distance / exact))
    steps = share * (count - exact)
    growing = np.minimum(exact + steps.astype(int), count - 1)
    table = np.concatenate([np.arange(exact), growing])
    size = jnp.abs(apart) if both else jnp.maximum(-apart, 0)
    found = jnp.asarray(table, jnp.int32)[jnp.minimum(size, distance)]
    return found + jnp.where(apart > 0, count, 0) if both else found
