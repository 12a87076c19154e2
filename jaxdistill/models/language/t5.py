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

import flax.struct
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
    Inside,
    Stacked,
    attention,
    dense,
    embedding,
    key_mask,
    lookup,
    rms_norm,
    scan_layers,
    split_heads,
    stack,
    with_residual,
)
from jaxdistill.models.stores import (
    append_to_store,
    empty_stores,
    scan_stores,
    unstacked,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Encoder:
    """Sizes of an encoder alone, as text-to-image models have it. Defaults are a toy's.

    T5 1.1's XXL is vocab 32128, dim 4096, mlp 10240, heads 64, head_dim 64, depth 24, gated.
    """

    # one table of position biases for all layers
    shared_bias: ClassVar[bool] = True

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
        self,
        x: Float[Array, "B T D"],
        attend: Callable,
        residual: Callable[[Array], Array] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any, Float[Array, "B T E"]]:
        """(x + attention, extra, attended values with their heads merged).

        attend(q, normed x) -> (attended [B T H K], extra).
        """
        h = self.norm(x)
        attended, extra = attend(split_heads(self.to_q(h), self.heads), h)
        merged = attended.reshape(*x.shape[:2], -1)
        branch = with_residual(self.to_out(merged), h, residual)
        return constrain(x + branch, "batch", "seq", None), extra, merged


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

    def mlp_branch(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T M"]]:
        """x plus the branch of the MLP, and the hidden activations of the MLP."""
        h = self.norm_mlp(x)
        if self.gated:
            h = nnx.gelu(self.gate(h), approximate=True) * self.up(h)
        else:
            h = nnx.relu(self.up(h))
        return constrain(x + self.down(h), "batch", "seq", None), h


class DecoderBlock(Block):
    """A layer of the decoder: it also attends to the encoder's features."""

    def __init__(self, cfg: T5, rngs: nnx.Rngs):
        super().__init__(cfg, rngs)
        self.cross = Attention(cfg, rngs)


class Stack(nnx.Module):
    """The layers of encoder or decoder, the position biases that they share, the last norm."""

    def __init__(
        self, cfg: T5Encoder, make: type[Block], depth: int, rngs: nnx.Rngs
    ):
        self.blocks = stack(lambda r: make(cfg, r), depth, rngs)
        if cfg.shared_bias:
            self.position = embedding(
                cfg.buckets, cfg.heads, rngs=rngs, names=("index", "heads")
            )
        self.norm = rms_norm(
            cfg.dim, rngs=rngs, eps=cfg.norm_eps, dtype=jnp.dtype(cfg.dtype)
        )


@flax.struct.dataclass
class EncoderContext:
    """What the blocks of the encoder read."""

    places: Int[Array, "S S"]  # buckets of relative positions
    seen: Bool[Array, "B 1 1 S"] | None  # mask of keys
    # of all layers; None: each layer has its own
    bias: Float[Array, "1 H S S"] | None


@flax.struct.dataclass
class DecoderContext:
    """What the blocks of the decoder read of a complete text."""

    source: Float[Array, "B S D"]  # the encoder's output
    source_seen: Bool[Array, "B 1 1 S"]  # mask of its keys
    seen: Bool[Array, "B 1 T T"]  # mask of the text: causal, no padding
    bias: Float[Array, "1 H T T"]


class T5EncoderModule(Stacked):
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
        **through: Any,
    ) -> Float[Array, "B S D"] | tuple[Float[Array, "B S D"], tuple]:
        """The normed output; with `taps`, (this, features [B S D] of those blocks, not normed).

        `mask` is False on padding, wherever it stands. `through` are options of
        `Stacked.apply_blocks`.
        """
        return self.through(
            *self.embed_inputs(tokens, mask=mask), taps=taps, **through
        )

    @property
    def layers(self) -> Any:
        return self.encoder.blocks

    def embed_inputs(
        self,
        tokens: Integer[Array, "B S"],
        *,
        mask: Shaped[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B S D"], EncoderContext]:
        return self._embed(tokens), self._encoder_context(tokens.shape[1], mask)

    def _encoder_context(self, length: int, mask: Array | None) -> EncoderContext:
        cfg = self.cfg
        indices = jnp.arange(length)
        places = bucket(
            indices - indices[:, None], cfg.buckets, cfg.distance, both=True
        )
        shared = biases(self.encoder.position, places) if cfg.shared_bias else None
        return EncoderContext(places, key_mask(mask), shared)

    def apply_block(self, block, state, context, residual=None):
        return _encoder_layer(block, state, context, residual)

    def head(
        self, state: Float[Array, "B S D"], context: Any = None
    ) -> Float[Array, "B S D"]:
        return self.encoder.norm(state)

    def _embed(self, tokens: Array) -> Array:
        return constrain(
            lookup(self.embed, tokens).astype(self.dtype), "batch", "seq", None
        )


def _encoder_layer(
    block: Block,
    x: Float[Array, "B S D"],
    context: EncoderContext,
    residual: Callable[[Array], Array] | None = None,
) -> tuple[Float[Array, "B S D"], Inside]:
    bias = context.bias
    if bias is None:
        bias = biases(block.position, context.places)

    def attend(q, h):
        k, v = block.attention.keys_values(h)
        return attention(q, k, v, bias=bias, mask=context.seen, scale=1.0), None

    x, _, attended = block.attention(x, attend, residual)
    x, neurons = block.mlp_branch(x)
    return x, Inside(attended, neurons)


class T5Module(T5EncoderModule):
    """Its layers as a `Stacked` network are those of the decoder."""

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

    @property
    def layers(self) -> Any:
        return self.decoder.blocks

    def __call__(
        self,
        source: Integer[Array, "B S"],
        tokens: Integer[Array, "B T"],
        *,
        source_mask: Shaped[Array, "B S"] | None = None,
        mask: Shaped[Array, "B T"] | None = None,
        taps: tuple[int, ...] = (),
        hidden_only: bool = False,
        **through: Any,
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
            hidden_only: gives the final activations [B T D] that `unembedding()` projects, in place
              of logits.
            through: options of `Stacked.apply_blocks`.
        """
        state, context = self.embed_inputs(
            source, tokens, source_mask=source_mask, mask=mask
        )
        applied = self.apply_blocks(state, context, taps=taps, **through)
        finish = self.final if hidden_only else self.head
        out = finish(applied.state)
        return (out, applied.features) if taps else out

    def encode(
        self,
        source: Integer[Array, "B S"],
        *,
        mask: Shaped[Array, "B S"] | None = None,
    ) -> Float[Array, "B S D"]:
        """The output of the encoder; `mask` is False on padding, wherever it stands."""
        context = self._encoder_context(source.shape[1], mask)

        def layer(x, block):
            return _encoder_layer(block, x, context)[0], None

        blocks = self.encoder.blocks
        cfg = self.cfg
        x = self._embed(source)
        x, *_ = scan_layers(layer, x, blocks, cfg.depth, remat=cfg.remat)
        return self.encoder.norm(x)

    def embed_inputs(
        self,
        source: Integer[Array, "B S"],
        tokens: Integer[Array, "B T"],
        *,
        source_mask: Shaped[Array, "B S"] | None = None,
        mask: Shaped[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], DecoderContext]:
        encoded = self.encode(source, mask=source_mask)
        source_seen = key_mask(valid_tokens(source, source_mask))
        seen, bias = self._text_masks(
            valid_tokens(tokens, mask), 0, tokens.shape[1]
        )
        context = DecoderContext(encoded, source_seen, seen, bias)
        return self._embed(tokens), context

    def apply_block(self, block, state, context, residual=None):
        def attend_text(q, h):
            k, v = block.attention.keys_values(h)
            seen = context.seen
            return attention(q, k, v, bias=context.bias, mask=seen, scale=1.0), None

        def attend_source(q, h):
            k, v = block.cross.keys_values(context.source)
            return attention(q, k, v, mask=context.source_seen, scale=1.0), None

        x, _, attended = block.attention(state, attend_text, residual)
        x, *_ = block.cross(x, attend_source)
        x, neurons = block.mlp_branch(x)
        return x, Inside(attended, neurons)

    def head(
        self, state: Float[Array, "B T D"], context: Any = None
    ) -> Float[Array, "B T V"]:
        logits = project(self.final(state), self.unembedding(), jnp.float32)
        return constrain(logits, "batch", "seq", "vocab")

    def final(self, state: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The activations that `unembedding()` projects."""
        x = self.decoder.norm(state)
        return x * self.cfg.dim**-0.5 if self.cfg.tied else x

    def decode(
        self,
        tokens: Integer[Array, "B T"],
        *,
        cache: dict[str, Any],
        mask: Shaped[Array, "B T"] | None = None,
        taps: tuple[int, ...] = (),
        hidden_only: bool = False,
    ) -> tuple:
        """As `__call__`, on tokens that follow those of a cache: (logits, cache, ...).

        `cache` is that of `init_cache`, or of an earlier call.
        """
        new = tokens.shape[1]
        start = cache["length"]
        written = valid_tokens(tokens, mask)
        valid = jax.lax.dynamic_update_slice(cache["valid"], written, (0, start))
        layers = cache["layers"] or (self.decoder.blocks, cache["source_pairs"])
        layer = self._decoder_layer(cache, valid, start, new)
        x = self._embed(tokens)
        x, stores, features = scan_stores(
            layer,
            x,
            layers,
            cache["stores"],
            self.depth,
            remat=self.cfg.remat,
            taps=taps,
        )
        out = self.final(x) if hidden_only else self.head(x)
        cache = {**cache, "stores": stores, "valid": valid, "length": start + new}
        return (out, cache, features) if taps else (out, cache)

    def _text_masks(
        self, valid: Array, start: Array | int, new: int
    ) -> tuple[Array, Array]:
        """(mask [B 1 new T], bias [1 H new T]) of the text's attention to itself.

        `valid` bool [B T] says which tokens are not padding; the `new` ones begin at `start`.
        """
        cfg = self.cfg
        apart = jnp.arange(valid.shape[1]) - (start + jnp.arange(new))[:, None]
        seen = (apart <= 0) & valid[:, None, None, :]
        places = bucket(apart, cfg.buckets, cfg.distance, both=False)
        return seen, biases(self.decoder.position, places)

    def _decoder_layer(
        self, cache: dict[str, Any], valid: Array, start: Array, new: int
    ) -> Callable:
        """A layer of the decoder for `scan_stores`, on `new` tokens from position `start` on.

        `valid` bool [B T] says which tokens so far are not padding.
        """
        seen, bias = self._text_masks(valid, start, new)
        source_seen = key_mask(cache["source_valid"])

        def layer(carry, inputs):
            x, store = carry
            (block, source_pair), i = inputs

            def attend_text(q, h):
                pair = block.attention.keys_values(h)
                kept, pair = append_to_store(store, i, start, pair)
                return attention(q, *pair, bias=bias, mask=seen, scale=1.0), kept

            def attend_source(q, h):
                return attention(q, *source_pair, mask=source_seen, scale=1.0), None

            x, kept, _ = block.attention(x, attend_text)
            x, *_ = block.cross(x, attend_source)
            x, _ = block.mlp_branch(x)
            return (x, kept), None

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

    def unembedding(self) -> Float[Array, "D V"]:
        """The matrix that makes logits of final activations, in the arithmetic's dtype."""
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
