"""The Llama family (arXiv:2302.13971, 2407.21783), and what losses read of a batch of tokens.

A decoder of RMS norms, rotary positions, grouped queries and SwiGLU. Weights are those of
transformers' `LlamaForCausalLM`, layers stacked. Rotary positions act through their differences
only, so padding on the left and packing of several documents need a mask, but no positions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Integer, Key, Num, Shaped

from jaxdistill.core.fields import Depth, Dropout, Dtype, Remat
from jaxdistill.core.rows import project
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array, Batch, Nets, Refused
from jaxdistill.models.layers import (
    Inside,
    Rotary,
    Stacked,
    attention,
    attention_scores,
    dense,
    drop,
    embedding,
    key_mask,
    lookup,
    part_keys,
    rms_norm,
    rotate,
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
class LM:
    """Sizes. Defaults are a toy's.

    Llama-3.2-1B is vocab 128256, dim 2048, mlp 8192, heads 32, kv_heads 8, depth 16, rope_theta
    5e5, rope_factor 32, norm_eps 1e-5, tied.
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
    # wavelengths above rope_original / rope_low are stretched in full
    rope_low: float = 1.0
    # those below rope_original / rope_high are not stretched
    rope_high: float = 4.0
    rope_original: int = 8192  # the context before stretching, tokens
    norm_eps: float = 1e-6
    tied: bool = False  # the output head is the embedding table
    max_length: int = 2048  # tokens
    # The network does not use the special tokens; sampling and data pipelines do.
    bos: int = -1  # token that begins a text; -1: none
    eos: tuple[int, ...] = ()  # tokens that end a text
    pad: int = -1  # padding token; -1: none
    # rate of dropout behind attention and MLP; only losses that pass a key drop
    dropout: Dropout = 0.0
    dtype: Dtype = "float32"  # arithmetic; weights are float32
    remat: Remat = "none"

    cap = 0.0  # bound of attention's scores, by tanh; 0: none. Variants set it

    @property
    def head_size(self) -> int:
        """Channels of an attention head."""
        return self.head_dim or self.dim // self.heads

    @property
    def rotary(self) -> int:
        """Channels of a head that turn with the position."""
        return self.head_size

    def block(self, rngs: nnx.Rngs) -> Block:
        """One layer; variants replace it."""
        return Block(self, rngs)

    def __call__(self, rngs: nnx.Rngs) -> LMModule:
        return LMModule(self, rngs)


@functools.partial(jax.checkpoint, prevent_cse=False)
def gated(
    gate: Float[Array, "*B M"], up: Float[Array, "*B M"]
) -> Float[Array, "*B M"]:
    """SwiGLU's product; the backward pass keeps its two operands only."""
    return nnx.silu(gate) * up


# (q [B T H K], k and v [B T G K] with their positions) -> (values [B T H K], extra)
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]


class Block(nnx.Module):
    """Attention, then an MLP, each a normed residual branch. `attend` computes the attention."""

    def __init__(self, cfg: LM, rngs: nnx.Rngs):
        d = cfg.dim
        size = cfg.head_size
        dtype = jnp.dtype(cfg.dtype)
        make = functools.partial(dense, rngs=rngs, bias=False, dtype=dtype)
        self.heads = cfg.heads
        self.kv_heads = cfg.kv_heads or cfg.heads
        self.cap = cfg.cap
        self.dropout = cfg.dropout
        self.norm_attention = rms_norm(d, rngs=rngs, eps=cfg.norm_eps, dtype=dtype)
        self.to_q = make(d, self.heads * size, ("embed", "heads"))
        self.to_k = make(d, self.kv_heads * size, ("embed", "heads"))
        self.to_v = make(d, self.kv_heads * size, ("embed", "heads"))
        self.to_out = make(self.heads * size, d, ("heads", "embed"))
        self.norm_mlp = rms_norm(d, rngs=rngs, eps=cfg.norm_eps, dtype=dtype)
        self.gate = make(d, cfg.mlp, ("embed", "mlp"))
        self.up = make(d, cfg.mlp, ("embed", "mlp"))
        self.down = make(cfg.mlp, d, ("mlp", "embed"))

    def project(
        self, h: Float[Array, "B T D"]
    ) -> tuple[
        Float[Array, "B T H K"], Float[Array, "B T G K"], Float[Array, "B T G K"]
    ]:
        """Queries, keys and values of normed activations, before their positions."""
        return (
            split_heads(self.to_q(h), self.heads),
            split_heads(self.to_k(h), self.kv_heads),
            split_heads(self.to_v(h), self.kv_heads),
        )

    def rotate(
        self, x: Float[Array, "B T H K"], rotary: Rotary
    ) -> Float[Array, "B T H K"]:
        """Queries or keys with their rotary positions."""
        return rotate(x, rotary)

    def scores(
        self, x: Float[Array, "B T D"], rotary: Rotary
    ) -> Float[Array, "B H T T"]:
        """The scores of attention (query, key) before any mask, in float32."""
        q, k, _ = self.project(self.norm_attention(x))
        q = self.rotate(q, rotary)
        return attention_scores(q, self.rotate(k, rotary), cap=self.cap)

    def attention_branch(
        self, x: Float[Array, "B T D"], out: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """x plus the branch of attention, given the output of its projection."""
        return constrain(x + out, "batch", "seq", None)

    def neurons(self, x: Float[Array, "B T D"]) -> Float[Array, "B T M"]:
        """The hidden activations of SwiGLU."""
        h = self.norm_mlp(x)
        return gated(self.gate(h), self.up(h))

    def mlp_branch(
        self, x: Float[Array, "B T D"], out: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """x plus the branch of the MLP, given the output of its last map."""
        return constrain(x + out, "batch", "seq", None)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotary: Rotary,
        attend: Attend,
        residual: Callable[[Array], Array] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any, Inside]:
        """(the block's output, extra of `attend`, what it computed on the way).

        `key` is that of dropout.
        """
        key_attention, key_mlp = part_keys(key, 2)
        h = self.norm_attention(x)
        q, k, v = self.project(h)
        attended, extra = attend(self.rotate(q, rotary), self.rotate(k, rotary), v)
        merged = attended.reshape(*x.shape[:2], -1)
        out = drop(self.to_out(merged), self.dropout, key_attention)
        x = self.attention_branch(x, with_residual(out, h, residual))
        neurons = self.neurons(x)
        out = drop(self.down(neurons), self.dropout, key_mlp)
        return self.mlp_branch(x, out), extra, Inside(merged, neurons)


@flax.struct.dataclass
class Context:
    """What the blocks read."""

    rotary: Rotary
    seen: Array | None  # mask of attention beside the causal one (`visible`)
    # computes attention in place of the causal one; None: the causal one
    attend: Attend | None = flax.struct.field(pytree_node=False, default=None)


class LMModule(Stacked):
    def __init__(self, cfg: LM, rngs: nnx.Rngs):
        kv_heads = cfg.kv_heads or cfg.heads
        if cfg.heads % kv_heads or (not cfg.head_dim and cfg.dim % cfg.heads):
            raise Refused(
                f"model: heads={cfg.heads} must be a multiple of kv_heads={kv_heads} "
                f"and divide dim={cfg.dim}"
            )
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        self.embed = embedding(cfg.vocab, cfg.dim, rngs=rngs)
        self.blocks = stack(cfg.block, cfg.depth, rngs)
        self.norm = rms_norm(cfg.dim, rngs=rngs, eps=cfg.norm_eps, dtype=self.dtype)
        if not cfg.tied:
            self.unembed = dense(
                cfg.dim, cfg.vocab, ("embed", "vocab"), rngs=rngs, bias=False
            )

    def __call__(
        self,
        tokens: Integer[Array, "B T"] | Float[Array, "B T D"],
        *,
        positions: Integer[Array, "*B T"] | None = None,
        segments: Integer[Array, "B T"] | None = None,
        mask: Shaped[Array, "B T"] | None = None,
        cache: dict[str, Any] | None = None,
        taps: tuple[int, ...] = (),
        hidden_only: bool = False,
        attend: Attend | None = None,
        **through: Any,
    ) -> Float[Array, "B T _"] | tuple:
        """Logits [B T V] in float32: position t predicts token t + 1.

        Args:
            tokens: of texts, or what follows them; or their embeddings, in place of rows of the
              table.
            positions: of the tokens; None: 0, 1, ... behind those of the cache.
            segments: a number for each of the documents packed into a sequence.
            mask: False on padding.
            cache: of `init_cache`, with what precedes the tokens.
            taps: indices of blocks.
            hidden_only: gives the final normed activations [B T D] in place of logits, for losses
              that project onto `unembedding()` in chunks.
            attend: computes the attention of every block, masks and all; None: causal attention.
            through: options of `Stacked.apply_blocks`.

        Returns:
            The logits; with `cache` or `taps` a tuple of them, the new cache, and the features
            [B T D] of those blocks.

        Raises:
            Refused: on more than max_length tokens; with a cache, on segments, on `attend` and on
              options of `apply_blocks`.
        """
        if cache is None:
            state, context = self.embed_inputs(
                tokens,
                positions=positions,
                segments=segments,
                mask=mask,
                attend=attend,
            )
            applied = self.apply_blocks(state, context, taps=taps, **through)
            x = applied.state
            extras = ()
            features = applied.features
        else:
            if segments is not None:
                raise Refused("segments: a cache holds one document a sequence")
            if attend is not None or through:
                options = ", ".join(
                    ["attend"] * (attend is not None) + sorted(through)
                )
                raise Refused(f"{options}: not with a cache")
            x, rotary = self._enter(tokens, positions, cache)
            x, cache, features = self._continue(x, rotary, mask, cache, taps)
            extras = (cache,)
        out = self.norm(x) if hidden_only else self.head(x)
        if taps:
            extras = (*extras, features)
        return (out, *extras) if extras else out

    def embed_inputs(
        self,
        tokens: Integer[Array, "B T"] | Float[Array, "B T D"],
        *,
        positions: Integer[Array, "*B T"] | None = None,
        segments: Integer[Array, "B T"] | None = None,
        mask: Shaped[Array, "B T"] | None = None,
        attend: Attend | None = None,
    ) -> tuple[Float[Array, "B T D"], Context]:
        x, rotary = self._enter(tokens, positions, None)
        return x, Context(rotary, visible(mask, segments), attend)

    def apply_block(self, block, state, context, residual=None, key=None):
        attend = context.attend or self._attend_causally(context.seen)
        state, _, inside = block(state, context.rotary, attend, residual, key)
        return state, inside

    def head(
        self, state: Float[Array, "B T D"], context: Context | None = None
    ) -> Float[Array, "B T V"]:
        return self._logits(self.norm(state))

    def scores(
        self, layer: int, state: Float[Array, "B T D"], context: Context
    ) -> Float[Array, "B H T T"]:
        """The scores of attention (query, key) of one layer before any mask, in float32.

        `state` is the input of the layer: the feature of the tap before it.
        """
        return self.layer(layer).scores(state, context.rotary)

    def _attend_causally(self, seen: Array | None) -> Attend:
        def attend(q, k, v):
            return attention(
                q, k, v, mask=seen, causal=True, cap=self.cfg.cap
            ), None

        return attend

    def _enter(
        self, tokens: Array, positions: Array | None, cache: dict[str, Any] | None
    ):
        """Embedded tokens [B T D], and the cosines and sines of their positions.

        Embeddings in place of tokens are taken as they are.
        """
        length = tokens.shape[1] if cache is None else cache["valid"].shape[1]
        if length > self.cfg.max_length:
            raise Refused(
                f"tokens: {length} in a sequence, max_length={self.cfg.max_length}"
            )
        start = 0 if cache is None else cache["length"]
        if positions is None:
            positions = start + jnp.arange(tokens.shape[1])
        angles = positions[..., None].astype(jnp.float32) * frequencies(self.cfg)
        embedded = lookup(self.embed, tokens) if tokens.ndim == 2 else tokens
        x = constrain(embedded.astype(self.dtype), "batch", "seq", None)
        cos = jnp.cos(angles)[..., None, :]
        sin = jnp.sin(angles)[..., None, :]
        return x, (cos, sin)

    def _continue(self, x, rotary, mask, cache, taps):
        """The layers over new tokens, whose keys and values are written into the cache in place."""
        batch, new = x.shape[:2]
        start = cache["length"]
        mask = jnp.ones((batch, new), bool) if mask is None else mask.astype(bool)
        valid = jax.lax.dynamic_update_slice(cache["valid"], mask, (0, start))
        slots = jnp.arange(valid.shape[1])
        seen = (slots <= start + jnp.arange(new)[:, None]) & valid[:, None, None, :]

        def layer(carry, inputs):
            x, store = carry
            block, i = inputs

            def attend(q, k, v):
                kept, (k, v) = append_to_store(store, i, start, (k, v))
                return attention(q, k, v, mask=seen, cap=self.cfg.cap), kept

            x, kept, _ = block(x, rotary, attend)
            return (x, kept), None

        layers = cache["layers"] or self.blocks
        stores = cache["stores"]
        x, stores, features = scan_stores(
            layer,
            x,
            layers,
            stores,
            self.cfg.depth,
            remat=self.cfg.remat,
            taps=taps,
        )
        return (
            x,
            {**cache, "stores": stores, "valid": valid, "length": start + new},
            features,
        )

    def _logits(self, x: Array) -> Array:
        logits = project(x, self._table(), jnp.float32)
        return constrain(logits, "batch", "seq", "vocab")

    def unembedding(self) -> Float[Array, "D V"]:
        """The matrix that makes logits of final activations, in the arithmetic's dtype."""
        return self._table()

    def _table(self) -> Array:
        if self.cfg.tied:
            return self.embed.embedding[...].T.astype(self.dtype)
        return self.unembed.kernel[...].astype(self.dtype)

    def init_cache(self, batch: int, length: int) -> dict[str, Any]:
        """An empty cache for `length` tokens of each of `batch` sequences.

        Writing past its end is not checked: only the running program knows the length so far.

        Returns:
            "stores" of keys and values [B G S K], "valid" bool [B S], "length" int32 [], and
            "layers" as decoding reads them (`unstacked`).
        """
        cfg = self.cfg
        shape = (batch, cfg.kv_heads or cfg.heads, length, cfg.head_size)
        stores = empty_stores(
            cfg.depth, functools.partial(zero_store, shape, self.dtype)
        )
        return {
            "stores": stores,
            "valid": jnp.zeros((batch, length), bool),
            "length": jnp.zeros((), jnp.int32),
            "layers": unstacked(self.blocks, cfg.depth),
        }


def zero_store(
    shape: tuple[int, int, int, int], dtype, *layers: int
) -> tuple[Float[Array, "*layers B G S K"], Float[Array, "*layers B G S K"]]:
    """Keys and values of zeros [*layers, *shape], where `shape` is [B G S K]."""
    names = (*(None for _ in layers), "batch", "heads", None, None)
    make = lambda: constrain(jnp.zeros((*layers, *shape), dtype), *names)
    return make(), make()


def context(batch: Batch) -> dict[str, Integer[Array, "*_"]]:
    """The arguments of a language model's call that a batch of data holds beside its tokens."""
    return {
        name: batch[name] for name in ("segments", "positions") if name in batch
    }


def following(x: Shaped[Array, "B T"], fill: int = 0) -> Shaped[Array, "B T"]:
    """x moved one position to the left: what comes after each token. `fill` is at the end.

    Losses compare logits [B T V] to labels of the same length. To cut the last position off the
    logits would copy them, and leave a length that no tile divides.
    """
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)), constant_values=fill)


def targets(batch: Batch) -> tuple[Integer[Array, "B T"], Bool[Array, "B T"]]:
    """The token after each token, and whether it is a target: never at the end of a sequence."""
    return following(batch["tokens"]), following(batch["mask"]) > 0


PADDING = 1024  # a table has fewer rows of padding than this, and than tokens
MULTIPLE = 8  # padded lengths of tables are multiples of it


def same_vocabulary(method: Any, nets: Mapping[str, Any]) -> None:
    """Refuses networks whose tokenizer cannot be the student's, for comparisons token by token.

    Tables of one tokenizer may be padded to different lengths (Qwen2.5: 152,064 and 151,936). The
    ids that all tables have are what is compared and sampled (`objectives.divergence.common`,
    `common_vocabulary`).

    Args:
        method: the method that compares them.
        nets: networks (core.net.Net) by role; those without a vocabulary are left out.

    Raises:
        Refused: where a vocabulary is neither the student's nor a padding of it.
    """
    sizes = {
        role: net.config.vocab
        for role, net in nets.items()
        if hasattr(net.config, "vocab")
    }
    for role, size in sizes.items():
        own = sizes.get("student", size)
        low, high = sorted((size, own))
        if high > low and (high % MULTIPLE or high - low >= min(low, PADDING)):
            raise Refused(
                f"config.roles.{role}: a vocabulary of {size} tokens, the student's has {own}; "
                f"{type(method).__name__} compares tokens, expected one tokenizer, its tables "
                "padded or not (methods.language.cross_tokenizer_kd does without)"
            )


def common_vocabulary(nets: Nets | Mapping[str, Any]) -> int:
    """How many token ids all language models among these networks have; 0: there is none.

    The networks may be bound or not.
    """
    by_role = nets if isinstance(nets, Mapping) else vars(nets)
    configs = [getattr(net, "config", None) for net in by_role.values()]
    return min(
        (config.vocab for config in configs if hasattr(config, "vocab")), default=0
    )


def visible(
    mask: Shaped[Array, "B T"] | None, segments: Num[Array, "B T"] | None
) -> Bool[Array, "B 1 #T T"] | None:
    """The attention mask beside the causal one: no padding, and nothing of other documents.

    None: everything is visible.
    """
    keys = key_mask(mask)
    if segments is None:
        return keys
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same if keys is None else same & keys


def frequencies(cfg: LM) -> np.ndarray:
    """Radians a token of K rotary channels, float32 [K / 2]: theta^(-2i / K).

    Long wavelengths are stretched as in Llama 3.1.
    """
    unstretched = cfg.rope_theta ** (-np.arange(0, cfg.rotary, 2) / cfg.rotary)
    # within the original context
    turns = cfg.rope_original * unstretched / (2 * np.pi)
    kept = np.clip((turns - cfg.rope_low) / (cfg.rope_high - cfg.rope_low), 0, 1)
    return np.float32(unstretched * (kept + (1 - kept) / cfg.rope_factor))
