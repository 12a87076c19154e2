"""T5 (arXiv:1910.10683), T5 1.1 and UMT5 (2304.09151): an encoder and a decoder of RMS norms and
relative position biases.

Weights are those of transformers' `T5ForConditionalGeneration`, `T5EncoderModel` and
`UMT5EncoderModel`, layers stacked. Scores are not divided by the square root of the head's size;
the initial weights of the queries are, instead.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdistill.core.fields import Depth, Dtype, Remat
from jaxdistill.core.rows import project
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array, Refused
from jaxdistill.models.layers import (
    LECUN,
    attention,
    dense,
    embedding,
    empty_stores,
    lookup,
    remember,
    rms_norm,
    scan_layers,
    scan_stores,
    split_heads,
    stack,
    unstacked,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Encoder:
    """Sizes of an encoder alone, such as a text-to-image model's tower. Defaults are a toy's; T5
    1.1's XXL is vocab 32128, dim 4096, mlp 10240, heads 64, head_dim 64, depth 24, gated.
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
    eos: tuple[int, ...] = (
        1,
    )  # tokens that end a text. With pad not used by the network, but by who samples from it
    pad: int = 0  # filler
    dtype: Dtype = "float32"  # arithmetic; weights are float32
    remat: Remat = "none"

    def __call__(self, rngs: nnx.Rngs) -> T5EncoderModule:
        return T5EncoderModule(self, rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UMT5Encoder(T5Encoder):
    """Every layer has position biases of its own. UMT5-XXL is vocab 256384, dim 4096, mlp 10240,
    heads 64, head_dim 64, depth 24, gated.
    """

    shared_bias: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5(T5Encoder):
    """Encoder and decoder. T5-small is vocab 32128, dim 512, mlp 2048, heads 8, head_dim 64, depth
    6, tied.
    """

    depth_decoder: int = 0  # 0: depth
    # the output head is the embedding table, on states divided by sqrt(dim) (T5); False: a head of
    # its own (1.1)
    tied: bool = True
    start: int = 0  # token that every decoded text begins with

    def __call__(self, rngs: nnx.Rngs) -> T5Module:
        return T5Module(self, rngs)


class Attention(nnx.Module):
    def __init__(self, cfg: T5Encoder, rngs: nnx.Rngs):
        d = cfg.dim
        inner = cfg.heads * cfg.head_dim
        dtype = jnp.dtype(cfg.dtype)
        make = lambda i, o, names, init=LECUN: dense(
            i, o, names, rngs=rngs, bias=False, init=init, dtype=dtype
        )
        self.heads = cfg.heads
        self.norm = rms_norm(d, rngs=rngs, eps=cfg.norm_eps, dtype=dtype)
        self.to_q = make(
            d, inner, ("embed", "heads"), nnx.initializers.normal((d * cfg.head_dim) ** -0.5)
        )
        self.to_k = make(d, inner, ("embed", "heads"))
        self.to_v = make(d, inner, ("embed", "heads"))
        self.to_out = make(inner, d, ("heads", "embed"))

    def keys(self, h: Array) -> tuple[Array, Array]:
        """Keys and values [B S H K] of states [B S D]."""
        return split_heads(self.to_k(h), self.heads), split_heads(self.to_v(h), self.heads)

    def __call__(self, x: Array, attend) -> tuple[Array, object]:
        """x [B T D]; attend(q, h) -> (mixed values [B T H K], extra), h the normed x. Returns (x +
        attention, extra).
        """
        h = self.norm(x)
        mixed, extra = attend(split_heads(self.to_q(h), self.heads), h)
        return constrain(
            x + self.to_out(mixed.reshape(*x.shape[:2], -1)), "batch", "seq", None
        ), extra


class Block(nnx.Module):
    """A layer of the encoder."""

    def __init__(self, cfg: T5Encoder, rngs: nnx.Rngs):
        d = cfg.dim
        dtype = jnp.dtype(cfg.dtype)
        make = lambda i, o, *names: dense(i, o, names, rngs=rngs, bias=False, dtype=dtype)
        self.gated = cfg.gated
        self.attention = Attention(cfg, rngs)
        if not cfg.shared_bias:
            self.position = embedding(cfg.buckets, cfg.heads, rngs=rngs, names=("index", "heads"))
        self.norm_mlp = rms_norm(d, rngs=rngs, eps=cfg.norm_eps, dtype=dtype)
        if cfg.gated:
            self.gate = make(d, cfg.mlp, "embed", "mlp")
        self.up = make(d, cfg.mlp, "embed", "mlp")
        self.down = make(cfg.mlp, d, "mlp", "embed")

    def feed(self, x: Array) -> Array:
        h = self.norm_mlp(x)
        h = (
            nnx.gelu(self.gate(h), approximate=True) * self.up(h)
            if self.gated
            else nnx.relu(self.up(h))
        )
        return constrain(x + self.down(h), "batch", "seq", None)


class DecoderBlock(Block):
    """A layer of the decoder: also attends to the encoder's states."""

    def __init__(self, cfg: T5, rngs: nnx.Rngs):
        super().__init__(cfg, rngs)
        self.cross = Attention(cfg, rngs)


class Stack(nnx.Module):
    """The layers of one side, their table of position biases where they share one, and the norm
    behind them.
    """

    def __init__(self, cfg: T5Encoder, make: type[Block], depth: int, rngs: nnx.Rngs):
        self.blocks = stack(lambda r: make(cfg, r), depth, rngs)
        if cfg.shared_bias:
            self.position = embedding(cfg.buckets, cfg.heads, rngs=rngs, names=("index", "heads"))
        self.norm = rms_norm(cfg.dim, rngs=rngs, eps=cfg.norm_eps, dtype=jnp.dtype(cfg.dtype))


class T5EncoderModule(nnx.Module):
    def __init__(self, cfg: T5Encoder, rngs: nnx.Rngs):
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        self.embed = embedding(cfg.vocab, cfg.dim, rngs=rngs, std=1.0)
        self.encoder = Stack(cfg, Block, cfg.depth, rngs)

    def __call__(self, tokens: Array, *, mask: Array | None = None, taps: tuple[int, ...] = ()):
        """tokens int [B S] -> normed states [B S D].

        mask bool [B S] is False on padding, wherever it stands. With `taps`, (states, states
        after those blocks).
        """
        return self.encode(tokens, mask=mask, taps=taps)

    def encode(self, tokens: Array, *, mask: Array | None = None, taps: tuple[int, ...] = ()):
        """The encoder's states, as `T5EncoderModule.__call__` gives them."""
        cfg = self.cfg
        length = jnp.arange(tokens.shape[1])
        places = bucket(length - length[:, None], cfg.buckets, cfg.distance, both=True)
        seen = None if mask is None else mask[:, None, None, :].astype(bool)
        shared = biases(self.encoder.position, places) if cfg.shared_bias else None

        def layer(x, block):
            bias = biases(block.position, places) if shared is None else shared
            x, _ = block.attention(
                x,
                lambda q, h: (
                    attention(q, *block.attention.keys(h), bias=bias, mask=seen, scale=1.0),
                    None,
                ),
            )
            return block.feed(x), None

        x, _, states = scan_layers(
            layer,
            self._embed(tokens),
            self.encoder.blocks,
            cfg.depth,
            remat=cfg.remat,
            taps=taps,
        )
        x = self.encoder.norm(x)
        return (x, states) if taps else x

    def _embed(self, tokens: Array) -> Array:
        return constrain(lookup(self.embed, tokens).astype(self.dtype), "batch", "seq", None)


class T5Module(T5EncoderModule):
    def __init__(self, cfg: T5, rngs: nnx.Rngs):
        super().__init__(cfg, rngs)
        self.decoder = Stack(cfg, DecoderBlock, self.depth, rngs)
        if not cfg.tied:
            self.unembed = dense(cfg.dim, cfg.vocab, ("embed", "vocab"), rngs=rngs, bias=False)

    @property
    def depth(self) -> int:
        return self.cfg.depth_decoder or self.cfg.depth

    def __call__(
        self,
        source: Array,
        tokens: Array,
        *,
        source_mask: Array | None = None,
        mask: Array | None = None,
        taps: tuple[int, ...] = (),
        hidden_only: bool = False,
    ):
        """source int [B S], tokens int [B T] -> logits float32 [B T V]: position t predicts what
        follows tokens[t].

        `tokens` are the decoder's inputs, which begin with `cfg.start` (`shifted` makes them from
        targets). The masks bool [B S] and [B T] are False on padding; `taps` appends the states [B
        T D] after those blocks of the decoder; `hidden_only` gives the final states [B T D] that
        `head()` projects, in place of logits.
        """
        states = self.encode(source, mask=source_mask)
        seen = jnp.ones(source.shape, bool) if source_mask is None else source_mask.astype(bool)
        return self.decode(
            tokens,
            cache={"source": states, "source_valid": seen},
            mask=mask,
            taps=taps,
            hidden_only=hidden_only,
        )

    def decode(
        self,
        tokens: Array,
        *,
        cache: dict[str, Array],
        mask: Array | None = None,
        taps: tuple[int, ...] = (),
        hidden_only: bool = False,
    ):
        """As `__call__`, on tokens int [B T] that follow those that `cache` (see `init_cache`)
        holds: (logits, cache, ...).

        A cache of source [B S D] and source_valid bool [B S] alone holds no text, and is not handed
        back.
        """
        cfg, (batch, new), growing = self.cfg, tokens.shape, "stores" in cache
        start = cache["length"] if growing else 0
        mask = jnp.ones((batch, new), bool) if mask is None else mask.astype(bool)
        valid = jax.lax.dynamic_update_slice(cache["valid"], mask, (0, start)) if growing else mask
        apart = jnp.arange(valid.shape[1]) - (start + jnp.arange(new))[:, None]
        seen = (apart <= 0) & valid[:, None, None, :]
        source = cache["source_valid"][:, None, None, :]
        bias = biases(self.decoder.position, bucket(apart, cfg.buckets, cfg.distance, both=False))

        def layer(carry, inp):
            (x, store), ((block, memory), i) = carry, inp
            memory = memory if growing else block.cross.keys(cache["source"])

            def own(q, h):
                pair = block.attention.keys(h)
                kept = store
                if growing:
                    kept, pair = remember(store, i, start, pair)
                return attention(q, *pair, bias=bias, mask=seen, scale=1.0), kept

            x, store = block.attention(x, own)
            x, _ = block.cross(
                x, lambda q, h: (attention(q, *memory, mask=source, scale=1.0), None)
            )
            return (block.feed(x), store), None

        stores, layers = (cache["stores"], cache["layers"]) if growing else (((),), ())
        layers = layers or (self.decoder.blocks, cache["source_pairs"] if growing else ())
        x, stores, found = scan_stores(
            layer, self._embed(tokens), layers, stores, self.depth, remat=cfg.remat, taps=taps
        )
        x = self.decoder.norm(x)
        x = x * cfg.dim**-0.5 if cfg.tied else x
        out = x if hidden_only else self._logits(x)
        extras = (
            ({**cache, "stores": stores, "valid": valid, "length": start + new},) if growing else ()
        )
        extras += (found,) if taps else ()
        return (out, *extras) if extras else out

    def init_cache(
        self, states: Array, length: int, *, source_mask: Array | None = None
    ) -> dict[str, Array]:
        """What `decode` needs to write `length` tokens a row about encoded states [B S D]: keys and
        values of the source, a pair of [L B S H K] (where layers are walked: one of [B S H K] with
        each of `layers`), and empty stores of the text [B H length K], valid bool [B length],
        length int32 [].
        """
        cfg = self.cfg
        batch = states.shape[0]
        shape = (batch, cfg.heads, length, cfg.head_dim)
        zeros = lambda *n: constrain(
            jnp.zeros((*n, *shape), self.dtype), *(None for _ in n), "batch", "heads", None, None
        )
        seen = jnp.ones(states.shape[:2], bool) if source_mask is None else source_mask.astype(bool)
        pairs = jax.lax.map(lambda block: block.cross.keys(states), self.decoder.blocks)
        layers = unstacked((self.decoder.blocks, pairs), self.depth)
        return {
            "stores": empty_stores(self.depth, lambda *n: (zeros(*n), zeros(*n))),
            "valid": jnp.zeros((batch, length), bool),
            "length": jnp.zeros((), jnp.int32),
            "source_valid": seen,
            "source_pairs": () if layers else pairs,
            "layers": layers,
        }

    def _logits(self, x: Array) -> Array:
        logits = project(x, self.head(), jnp.float32)
        return constrain(logits, "batch", "seq", "vocab")

    def head(self) -> Array:
        """The unembedding matrix [D V], in the arithmetic's dtype."""
        return (self.embed.embedding[...].T if self.cfg.tied else self.unembed.kernel[...]).astype(
            self.dtype
        )


def shifted(targets: Array, start: int) -> Array:
    """The decoder's inputs int [B T] for targets int [B T]: `start`, then all but the last."""
    return jnp.concatenate([jnp.full_like(targets[:, :1], start), targets[:, :-1]], 1)


def biases(table: nnx.Embed, places: Array) -> Array:
    """Biases float32 [1 H T S] for buckets int [T S]."""
    return jnp.moveaxis(jnp.take(table.embedding[...], places, axis=0), -1, 0)[None].astype(
        jnp.float32
    )


def bucket(apart: Array, buckets: int, distance: int, *, both: bool) -> Array:
    """The bucket int of key position - query position, int of any shape (T5, section 2.1).

    Of the buckets (with `both`, one half for keys ahead; without, keys ahead are in bucket 0), half
    are for distances 0, 1, ..., the others grow geometrically up to `distance`, beyond which all
    are in the last.
    """
    count = buckets // 2 if both else buckets
    exact = count // 2
    if not 0 < exact < distance:
        raise Refused(
            f"model: buckets={buckets}, distance={distance}: expected distance > {exact} > 0"
        )
    far = np.arange(exact, distance + 1, dtype=np.float32)
    steps = np.log(far / exact) / np.float32(np.log(distance / exact)) * (count - exact)
    table = np.concatenate([np.arange(exact), np.minimum(exact + steps.astype(int), count - 1)])
    size = jnp.abs(apart) if both else jnp.maximum(-apart, 0)
    found = jnp.asarray(table, jnp.int32)[jnp.minimum(size, distance)]
    return found + jnp.where(apart > 0, count, 0) if both else found
