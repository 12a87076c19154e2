"""The Llama family (arXiv:2302.13971, 2407.21783): a decoder of RMS norms, rotary positions,
grouped queries and SwiGLU.

Weights are those of transformers' `LlamaForCausalLM`, layers stacked. Rotary positions act through
their differences only, so that padding on the left and packing of several documents need a mask,
not positions of their own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdistill.core.fields import Depth, Dtype, Remat
from jaxdistill.core.rows import project
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array, Batch, Nets, Refused
from jaxdistill.models.layers import (
    attention,
    dense,
    embedding,
    empty_stores,
    lookup,
    remember,
    rms_norm,
    rotate,
    scan_layers,
    scan_stores,
    split_heads,
    stack,
    unstacked,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LM:
    """Sizes. Defaults are a toy's; Llama-3.2-1B is vocab 128256, dim 2048, mlp 8192, heads 32,
    kv_heads 8, depth 16, rope_theta 5e5, rope_factor 32, norm_eps 1e-5, tied.
    """

    vocab: int = 64
    dim: int = 64
    mlp: int = 128
    heads: int = 4
    kv_heads: int = 0  # keys and values; divides heads; 0: as many as heads
    head_dim: int = 0  # 0: dim // heads
    depth: Depth = 4
    rope_theta: float = 10000.0  # longest wavelength / 2 pi, in tokens
    rope_factor: float = 1.0  # Llama 3.1's stretch of long wavelengths; 1: none
    rope_low: float = 1.0  # wavelengths above rope_original / rope_low are stretched in full
    rope_high: float = 4.0  # those below rope_original / rope_high are left alone
    rope_original: int = 8192  # the context before stretching, tokens
    norm_eps: float = 1e-6
    tied: bool = False  # the output head is the embedding table
    max_length: int = 2048  # tokens
    # token that begins a text; -1: none. With eos and pad not used by the network, but by who
    # samples from it
    bos: int = -1
    eos: tuple[int, ...] = ()  # tokens that end a text
    pad: int = -1  # filler; -1: none
    dtype: Dtype = "float32"  # arithmetic; weights are float32
    remat: Remat = "none"

    cap = 0.0  # what attention's scores are squashed to; 0: not. Of variants

    @property
    def head_size(self) -> int:
        """Channels of an attention head."""
        return self.head_dim or self.dim // self.heads

    @property
    def rotary(self) -> int:
        """Channels of a head that turn with the position."""
        return self.head_size

    def block(self, rngs: nnx.Rngs) -> Block:
        """One layer: what variants replace."""
        return Block(self, rngs)

    def __call__(self, rngs: nnx.Rngs) -> LMModule:
        return LMModule(self, rngs)


@functools.partial(jax.checkpoint, prevent_cse=False)
def gated(gate: Array, up: Array) -> Array:
    """SwiGLU's product; its backward pass keeps the two operands alone."""
    return nnx.silu(gate) * up


class Block(nnx.Module):
    def __init__(self, cfg: LM, rngs: nnx.Rngs):
        d = cfg.dim
        size = cfg.head_size
        dtype = jnp.dtype(cfg.dtype)
        make = functools.partial(dense, rngs=rngs, bias=False, dtype=dtype)
        self.heads = cfg.heads
        self.kv_heads = cfg.kv_heads or cfg.heads
        self.norm_attention = rms_norm(d, rngs=rngs, eps=cfg.norm_eps, dtype=dtype)
        self.to_q = make(d, self.heads * size, ("embed", "heads"))
        self.to_k = make(d, self.kv_heads * size, ("embed", "heads"))
        self.to_v = make(d, self.kv_heads * size, ("embed", "heads"))
        self.to_out = make(self.heads * size, d, ("heads", "embed"))
        self.norm_mlp = rms_norm(d, rngs=rngs, eps=cfg.norm_eps, dtype=dtype)
        self.gate = make(d, cfg.mlp, ("embed", "mlp"))
        self.up = make(d, cfg.mlp, ("embed", "mlp"))
        self.down = make(cfg.mlp, d, ("mlp", "embed"))

    def project(self, h: Array) -> tuple[Array, Array, Array]:
        """Queries [B T H K], keys and values [B T G K] of the normed states, before rotation."""
        return (
            split_heads(self.to_q(h), self.heads),
            split_heads(self.to_k(h), self.kv_heads),
            split_heads(self.to_v(h), self.kv_heads),
        )

    def mix(self, x: Array, rotary: tuple[Array, Array], attend):
        """Attention: x [B T D]; attend(q, k, v) -> (mixed values [B T H K], extra). Returns (x,
        extra).
        """
        q, k, v = self.project(self.norm_attention(x))
        mixed, extra = attend(rotate(q, rotary), rotate(k, rotary), v)
        return self.branch(x, mixed.reshape(*x.shape[:2], -1)), extra

    def branch(self, x: Array, mixed: Array) -> Array:
        """The states [B T D] with attention's mixed values [B T H * K] on them."""
        return constrain(x + self.to_out(mixed), "batch", "seq", None)

    def neurons(self, x: Array) -> Array:
        """SwiGLU's hidden activations [B T mlp], x [B T D] from `mix`."""
        h = self.norm_mlp(x)
        return gated(self.gate(h), self.up(h))

    def feed(self, x: Array, neurons: Array) -> Array:
        """The block's output [B T D]."""
        return constrain(x + self.down(neurons), "batch", "seq", None)

    def run(self, x: Array, rotary: tuple[Array, Array], attend):
        """Returns (the block's output [B T D], extra of `attend`, the MLP's activations [B T mlp])."""
        x, extra = self.mix(x, rotary, attend)
        neurons = self.neurons(x)
        return self.feed(x, neurons), extra, neurons

    def __call__(self, x: Array, rotary: tuple[Array, Array], attend):
        """Returns (x, extra) as `run` does."""
        return self.run(x, rotary, attend)[:2]


class LMModule(nnx.Module):
    def __init__(self, cfg: LM, rngs: nnx.Rngs):
        kv_heads = cfg.kv_heads or cfg.heads
        if cfg.heads % kv_heads or (not cfg.head_dim and cfg.dim % cfg.heads):
            raise Refused(
                f"model: heads={cfg.heads} must be a multiple of kv_heads={kv_heads} and divide dim={cfg.dim}"
            )
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        self.embed = embedding(cfg.vocab, cfg.dim, rngs=rngs)
        self.blocks = stack(cfg.block, cfg.depth, rngs)
        self.norm = rms_norm(cfg.dim, rngs=rngs, eps=cfg.norm_eps, dtype=self.dtype)
        if not cfg.tied:
            self.unembed = dense(cfg.dim, cfg.vocab, ("embed", "vocab"), rngs=rngs, bias=False)

    def __call__(
        self,
        tokens: Array,
        *,
        positions: Array | None = None,
        segments: Array | None = None,
        mask: Array | None = None,
        cache: dict[str, Array] | None = None,
        taps: tuple[int, ...] = (),
        hidden_only: bool = False,
    ):
        """tokens int [B T] -> logits float32 [B T V]: position t predicts token t + 1.

        mask bool [B T] is False on padding, segments int [B T] differs between packed documents,
        positions int [T] or [B T] defaults to 0, 1, ... With `cache` (see `init_cache`) the tokens
        follow those it holds, and the result is (logits, cache); `taps` appends the states [B T D]
        after those blocks. `hidden_only` gives the final normed states [B T D] in place of logits,
        for losses that project onto `head()` in chunks.
        """
        x, rotary = self._enter(tokens, positions, cache)
        if cache is None:
            attend = _full(mask, segments, self.cfg.cap)
            layer = lambda x, block: block(x, rotary, attend)
            x, _, features = scan_layers(
                layer, x, self.blocks, self.cfg.depth, remat=self.cfg.remat, taps=taps
            )
        else:
            if segments is not None:
                raise Refused("segments: a cache holds one document a row")
            x, cache, features = self._continue(x, rotary, mask, cache, taps)
        x = self.norm(x)
        out = x if hidden_only else self._logits(x)
        extras = (() if cache is None else (cache,)) + ((features,) if taps else ())
        return (out, *extras) if extras else out

    def probe(
        self,
        read,
        tokens: Array,
        *,
        positions: Array | None = None,
        segments: Array | None = None,
        mask: Array | None = None,
    ):
        """What `read(before, neurons, after)` makes of every block, stacked over layers, for
        surgery and analysis.

        `before` and `after` are the states [B T D] around a block, `neurons` its MLP's activations
        [B T mlp].
        """
        x, rotary = self._enter(tokens, positions, None)
        attend = _full(mask, segments, self.cfg.cap)

        def layer(x, block):
            after, _, neurons = block.run(x, rotary, attend)
            return after, read(x, neurons, after)

        return scan_layers(layer, x, self.blocks, self.cfg.depth)[1]

    def _enter(self, tokens: Array, positions: Array | None, cache: dict[str, Array] | None):
        """Embedded tokens [B T D] and the (cosines, sines) of their positions."""
        length = tokens.shape[1] if cache is None else cache["valid"].shape[1]
        if length > self.cfg.max_length:
            raise Refused(f"tokens: {length} in a sequence, max_length={self.cfg.max_length}")
        start = 0 if cache is None else cache["length"]
        positions = start + jnp.arange(tokens.shape[1]) if positions is None else positions
        angles = positions[..., None].astype(jnp.float32) * frequencies(self.cfg)
        x = constrain(lookup(self.embed, tokens).astype(self.dtype), "batch", "seq", None)
        return x, (jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :])

    def _continue(self, x, rotary, mask, cache, taps):
        """The layers over new tokens, whose keys and values are written into the cache in place."""
        batch, new, slots, start = *x.shape[:2], cache["valid"].shape[1], cache["length"]
        mask = jnp.ones((batch, new), bool) if mask is None else mask.astype(bool)
        valid = jax.lax.dynamic_update_slice(cache["valid"], mask, (0, start))
        seen = (jnp.arange(slots) <= start + jnp.arange(new)[:, None]) & valid[:, None, None, :]

        def layer(carry, inp):
            (x, store), (block, i) = carry, inp

            def attend(q, k, v):
                kept, (k, v) = remember(store, i, start, (k, v))
                return attention(q, k, v, mask=seen, cap=self.cfg.cap), kept

            return block(x, rotary, attend), None

        how = dict(remat=self.cfg.remat, taps=taps)
        x, stores, states = scan_stores(
            layer, x, cache["layers"] or self.blocks, cache["stores"], self.cfg.depth, **how
        )
        return x, {**cache, "stores": stores, "valid": valid, "length": start + new}, states

    def _logits(self, x: Array) -> Array:
        logits = project(x, self._unembedding(), jnp.float32)
        return constrain(logits, "batch", "seq", "vocab")

    def head(self) -> Array:
        """The unembedding matrix [D V], in the arithmetic's dtype."""
        return self._unembedding()

    def _unembedding(self) -> Array:
        return (self.embed.embedding[...].T if self.cfg.tied else self.unembed.kernel[...]).astype(
            self.dtype
        )

    def init_cache(self, batch: int, length: int) -> dict[str, Array]:
        """An empty cache for `length` tokens a row: stores of keys and values [B G S K], valid bool
        [B S], length int32 [], and the layers as decoding reads them (`unstacked`).

        Writing past its end is not checked: `length` is known to the running program only.
        """
        cfg = self.cfg
        shape = (batch, cfg.kv_heads or cfg.heads, length, cfg.head_size)
        zeros = lambda *n: constrain(
            jnp.zeros((*n, *shape), self.dtype), *(None for _ in n), "batch", "heads", None, None
        )
        stores = empty_stores(cfg.depth, lambda *n: (zeros(*n), zeros(*n)))
        return {
            "stores": stores,
            "valid": jnp.zeros((batch, length), bool),
            "length": jnp.zeros((), jnp.int32),
            "layers": unstacked(self.blocks, cfg.depth),
        }


def context(batch: Batch) -> dict[str, Array]:
    """The arguments of a language model's call that a batch of data holds, beside its tokens."""
    return {name: batch[name] for name in ("segments", "positions") if name in batch}


def following(x: Array, fill: int = 0) -> Array:
    """What comes after each token: x [B T] moved one to the left, `fill` at the end.

    Losses compare logits [B T V] to labels of the same length. To cut the last position off the
    logits would copy them, and leave a length that no tile divides.
    """
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)), constant_values=fill)


def targets(batch: Batch) -> tuple[Array, Array]:
    """(the token after each, int [B T]; whether it is a target, bool [B T], never at the end of a
    row).
    """
    return following(batch["tokens"]), following(batch["mask"]) > 0


PADDING = 1024  # rows of padding are fewer than this, and than the tokens
MULTIPLE = 8  # that a table's length is padded to, at least


def same_vocabulary(method: Any, nets: Mapping[str, Any]) -> None:
    """For methods that compare models token by token: raises Refused where a network's tokenizer
    cannot be the student's.

    `nets` are networks (core.net.Net) by role; those whose vocabulary is not known are left out.
    Tables of one tokenizer may be padded to different lengths (Qwen2.5: 152,064 and 151,936): what
    is compared, and written, are the ids that all have (`objectives.divergence.common`,
    `common_vocabulary`).
    """
    sizes = {role: net.config.vocab for role, net in nets.items() if hasattr(net.config, "vocab")}
    for role, size in sizes.items():
        low, high = sorted((size, own := sizes.get("student", size)))
        if high > low and (high % MULTIPLE or high - low >= min(low, PADDING)):
            raise Refused(
                f"config.roles.{role}: a vocabulary of {size} tokens, the student's has {own}; {type(method).__name__} compares tokens, "
                "expected one tokenizer, its tables padded or not (methods.language.cross_tokenizer_kd does without)"
            )


def common_vocabulary(nets: Nets | Mapping[str, Any]) -> int:
    """How many ids every language model has among these networks, bound or not; 0 where no
    vocabulary is known.
    """
    configs = [
        getattr(net, "config", None)
        for net in (nets if isinstance(nets, Mapping) else vars(nets)).values()
    ]
    return min((config.vocab for config in configs if hasattr(config, "vocab")), default=0)


def _full(mask: Array | None, segments: Array | None, cap: float):
    """Attention of a whole sequence to itself, for `Block`."""
    seen = visible(mask, segments)
    return lambda q, k, v: (attention(q, k, v, mask=seen, causal=True, cap=cap), None)


def visible(mask: Array | None, segments: Array | None) -> Array | None:
    """Attention mask [B 1 T T or 1] beside the causal one: no padding, nothing of other documents.
    None: all visible.
    """
    keys = None if mask is None else mask[:, None, None, :].astype(bool)
    if segments is None:
        return keys
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same if keys is None else same & keys


def frequencies(cfg: LM) -> np.ndarray:
    """Radians a token [K / 2], float32, of the K rotary channels: theta^(-2i / K), long wavelengths
    stretched as in Llama 3.1.
    """
    freqs = cfg.rope_theta ** (-np.arange(0, cfg.rotary, 2) / cfg.rotary)
    turns = cfg.rope_original * freqs / (2 * np.pi)  # within the original context
    kept = np.clip((turns - cfg.rope_low) / (cfg.rope_high - cfg.rope_low), 0, 1)
    return np.float32(freqs * (kept + (1 - kept) / cfg.rope_factor))
