"""BERT (arXiv:1810.04805): a bidirectional encoder with layer norms after each residual sum.

Positions are learned. Weights are those of transformers' `BertModel`, `BertForMaskedLM` and
`BertForSequenceClassification`, layers stacked. The three share the weight paths of their encoder,
so that a classifier starts from a pretrained encoder weight by weight.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Integer, Shaped

from jaxdistill.core.fields import Depth, Dtype, Remat
from jaxdistill.core.rows import project
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array, Refused
from jaxdistill.core.types import lookup as lookup_name
from jaxdistill.models.layers import (
    ACTIVATIONS,
    ZEROS,
    Inside,
    Stacked,
    attention,
    attention_scores,
    check_taps,
    dense,
    embedding,
    key_mask,
    layer_norm,
    lookup,
    split_heads,
    stack,
    with_residual,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bert:
    """Sizes of the encoder with its pooler. Defaults are a toy's.

    BERT-base is vocab 30522, dim 768, mlp 3072, heads 12, depth 12, max_length 512.
    """

    vocab: int = 64
    dim: int = 64
    mlp: int = 128
    heads: int = 4
    depth: Depth = 4
    max_length: int = 128  # tokens; each position has a learned embedding
    types: int = 2  # kinds of token: first and second sentence
    activation: str = "gelu"  # a key of layers.ACTIVATIONS
    norm_eps: float = 1e-12
    # of a fresh matrix; sqrt(1 / dim) is about 0.04 at 768 and 0.12 at 64
    init_std: float = 0.02
    pad: int = 0  # padding token; data pipelines use it, the network does not
    dtype: Dtype = "float32"  # arithmetic; weights are float32
    remat: Remat = "none"

    @property
    def normal(self):
        """Initialiser of a matrix."""
        return nnx.initializers.normal(self.init_std)

    def __call__(self, rngs: nnx.Rngs) -> BertModule:
        return BertModule(self, rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedBert(Bert):
    """The encoder that predicts masked tokens; the output head is the embedding table."""

    def __call__(self, rngs: nnx.Rngs) -> MaskedBertModule:
        return MaskedBertModule(self, rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertClassifier(Bert):
    """The encoder that classifies texts."""

    classes: int = 2

    def __call__(self, rngs: nnx.Rngs) -> BertClassifierModule:
        return BertClassifierModule(self, rngs)


class Block(nnx.Module):
    def __init__(self, cfg: Bert, rngs: nnx.Rngs):
        d = cfg.dim
        dtype = jnp.dtype(cfg.dtype)
        make = functools.partial(dense, rngs=rngs, init=cfg.normal, dtype=dtype)
        self.to_q = make(d, d, ("embed", "heads"))
        self.to_k = make(d, d, ("embed", "heads"))
        self.to_v = make(d, d, ("embed", "heads"))
        self.to_out = make(d, d, ("heads", "embed"))
        self.norm_attention = layer_norm(
            d, rngs=rngs, eps=cfg.norm_eps, dtype=dtype
        )
        self.up = make(d, cfg.mlp, ("embed", "mlp"))
        self.down = make(cfg.mlp, d, ("mlp", "embed"))
        self.norm_mlp = layer_norm(d, rngs=rngs, eps=cfg.norm_eps, dtype=dtype)
        self.heads = cfg.heads
        self.activation = lookup_name(ACTIVATIONS, cfg.activation, "activation")

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "B 1 1 T"] | None,
        residual: Callable[[Array], Array] | None = None,
    ) -> tuple[Float[Array, "B T D"], Inside]:
        q = split_heads(self.to_q(x), self.heads)
        k = split_heads(self.to_k(x), self.heads)
        v = split_heads(self.to_v(x), self.heads)
        attended = attention(q, k, v, mask=mask).reshape(x.shape)
        branch = with_residual(self.to_out(attended), x, residual)
        x = self.norm_attention(x + branch)
        neurons = self.activation(self.up(x))
        x = self.norm_mlp(x + self.down(neurons))
        return constrain(x, "batch", "seq", None), Inside(attended, neurons)

    def scores(self, x: Float[Array, "B T D"]) -> Float[Array, "B H T T"]:
        """The scores of attention (query, key) before any mask, in float32."""
        q = split_heads(self.to_q(x), self.heads)
        k = split_heads(self.to_k(x), self.heads)
        return attention_scores(q, k)


class Encoder(Stacked):
    def __init__(self, cfg: Bert, rngs: nnx.Rngs):
        if cfg.dim % cfg.heads:
            raise Refused(f"model: heads={cfg.heads} must divide dim={cfg.dim}")
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        self.embed = embedding(cfg.vocab, cfg.dim, rngs=rngs)
        names = ("index", "embed")
        self.embed_position = embedding(
            cfg.max_length, cfg.dim, rngs=rngs, names=names
        )
        self.embed_type = embedding(cfg.types, cfg.dim, rngs=rngs, names=names)
        self.norm = layer_norm(
            cfg.dim, rngs=rngs, eps=cfg.norm_eps, dtype=self.dtype
        )
        self.blocks = stack(lambda r: Block(cfg, r), cfg.depth, rngs)

    def embed_inputs(
        self,
        tokens: Integer[Array, "B T"],
        *,
        types: Integer[Array, "B T"] | None = None,
        mask: Shaped[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Bool[Array, "B 1 1 T"] | None]:
        length = tokens.shape[1]
        if length > self.cfg.max_length:
            raise Refused(
                f"tokens: {length} in a sequence, max_length={self.cfg.max_length}"
            )
        types = jnp.zeros_like(tokens) if types is None else types
        embedded = lookup(self.embed, tokens) + lookup(self.embed_type, types)
        embedded = embedded + self.embed_position.embedding[:length]
        first = constrain(self.norm(embedded), "batch", "seq", None)
        return first, key_mask(mask)

    def apply_block(self, block, state, context, residual=None):
        return block(state, context, residual)

    def encode(
        self,
        tokens: Integer[Array, "B T"],
        *,
        types: Integer[Array, "B T"] | None = None,
        mask: Shaped[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """The features of the last block."""
        state, context = self.embed_inputs(tokens, types=types, mask=mask)
        return self.apply_blocks(state, context).state

    def with_scores(
        self,
        first: Float[Array, "B T D"],
        context: Bool[Array, "B 1 1 T"] | None,
        taps: tuple[int, ...],
        scores: tuple[int, ...],
        **through: Any,
    ) -> Any:
        """The output, features of blocks with `taps`, then scores of attention with `scores`."""
        check_taps(scores, self.cfg.depth, "scores")
        layers = tuple(sorted({*taps, *(i - 1 for i in scores if i)}))
        applied = self.apply_blocks(first, context, taps=layers, **through)
        features = {-1: first, **dict(zip(layers, applied.features))}
        extras = ()
        if taps:
            extras = (tuple(features[i] for i in taps),)
        if scores:
            found = [self.scores(i, features[i - 1], context) for i in scores]
            extras = (*extras, tuple(found))
        out = self.head(applied.state, context)
        return (out, *extras) if extras else out

    def scores(
        self, layer: int, state: Float[Array, "B T D"], context: Any
    ) -> Float[Array, "B H T T"]:
        """The scores of attention (query, key) of one layer before any mask, in float32.

        `state` is the input of the layer: the feature of the tap before it.
        """
        return self.layer(layer).scores(state)


class BertModule(Encoder):
    def __init__(self, cfg: Bert, rngs: nnx.Rngs):
        super().__init__(cfg, rngs)
        names = ("embed", None)
        self.pooler = dense(
            cfg.dim, cfg.dim, names, rngs=rngs, init=cfg.normal, dtype=self.dtype
        )

    def __call__(
        self,
        tokens: Integer[Array, "B T"],
        *,
        types: Integer[Array, "B T"] | None = None,
        mask: Shaped[Array, "B T"] | None = None,
        taps: tuple[int, ...] = (),
        scores: tuple[int, ...] = (),
        **through: Any,
    ) -> Float[Array, "B T D"] | tuple:
        """The features of the last block.

        Args:
            tokens: of texts.
            types: kinds of the tokens; None: 0.
            mask: False on padding, wherever it stands.
            taps: indices of blocks.
            scores: indices of blocks.
            through: options of `Stacked.apply_blocks`.

        Returns:
            The features; with `taps` or `scores` a tuple of them, the features [B T D] of the
            blocks `taps`, and the scores of attention [B H T T] (query, key) of the blocks
            `scores`, in float32 and before masking. They are computed again from the block's input,
            so that other blocks keep none.

        Raises:
            Refused: on more than max_length tokens, and on blocks that there are not.
        """
        state, context = self.embed_inputs(tokens, types=types, mask=mask)
        return self.with_scores(state, context, taps, scores, **through)

    def head(
        self, state: Float[Array, "B T D"], context: Any = None
    ) -> Float[Array, "B T D"]:
        return state

    def pool(self, features: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        """The summary of a text, from the features of its first token."""
        return jnp.tanh(self.pooler(features[:, 0]))


class MaskedBertModule(Encoder):
    def __init__(self, cfg: MaskedBert, rngs: nnx.Rngs):
        super().__init__(cfg, rngs)
        d = cfg.dim
        names = ("embed", None)
        self.transform = dense(
            d, d, names, rngs=rngs, init=cfg.normal, dtype=self.dtype
        )
        self.norm_out = layer_norm(d, rngs=rngs, eps=cfg.norm_eps, dtype=self.dtype)
        bias = nnx.with_partitioning(ZEROS, ("vocab",))
        self.bias = nnx.Param(bias(rngs.params(), (cfg.vocab,)))

    def __call__(
        self,
        tokens: Integer[Array, "B T"],
        *,
        types: Integer[Array, "B T"] | None = None,
        mask: Shaped[Array, "B T"] | None = None,
        taps: tuple[int, ...] = (),
        scores: tuple[int, ...] = (),
        **through: Any,
    ) -> Float[Array, "B T V"] | tuple:
        """Logits in float32: position t predicts token t. Arguments as in BertModule."""
        state, context = self.embed_inputs(tokens, types=types, mask=mask)
        return self.with_scores(state, context, taps, scores, **through)

    def head(
        self, state: Float[Array, "B T D"], context: Any = None
    ) -> Float[Array, "B T V"]:
        x = self.norm_out(ACTIVATIONS[self.cfg.activation](self.transform(state)))
        table = self.embed.embedding[...].astype(self.dtype)
        logits = project(x, table.T, jnp.float32) + self.bias[...]
        return constrain(logits, "batch", "seq", "vocab")


class BertClassifierModule(BertModule):
    def __init__(self, cfg: BertClassifier, rngs: nnx.Rngs):
        super().__init__(cfg, rngs)
        self.classifier = dense(
            cfg.dim, cfg.classes, ("embed", None), rngs=rngs, init=cfg.normal
        )

    def __call__(
        self,
        tokens: Integer[Array, "B T"],
        *,
        types: Integer[Array, "B T"] | None = None,
        mask: Shaped[Array, "B T"] | None = None,
        taps: tuple[int, ...] = (),
        scores: tuple[int, ...] = (),
        **through: Any,
    ) -> Float[Array, "B K"] | tuple:
        """Logits of the classes, in float32. Arguments as in BertModule."""
        state, context = self.embed_inputs(tokens, types=types, mask=mask)
        return self.with_scores(state, context, taps, scores, **through)

    def head(
        self, state: Float[Array, "B T D"], context: Any = None
    ) -> Float[Array, "B K"]:
        return self.classifier(self.pool(state).astype(jnp.float32))
