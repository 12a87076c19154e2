"""BERT (arXiv:1810.04805): a bidirectional encoder with layer norms after each residual sum and
learned positions.

Weights are those of transformers' `BertModel`, `BertForMaskedLM` and
`BertForSequenceClassification`, layers stacked. The three share the paths of their encoder, so that
a classifier starts from a pretrained encoder leaf by leaf.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdistill.core.fields import Depth, Dtype, Remat
from jaxdistill.core.rows import project
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array, Refused
from jaxdistill.core.types import lookup as lookup_name
from jaxdistill.models.layers import (
    ACTIVATIONS,
    ZEROS,
    attention,
    dense,
    embedding,
    layer_norm,
    lookup,
    scan_layers,
    split_heads,
    stack,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bert:
    """Sizes of the encoder with its pooler. Defaults are a toy's; BERT-base is vocab 30522, dim
    768, mlp 3072, heads 12, depth 12, max_length 512.
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
    init_std: float = 0.02  # of a fresh matrix; sqrt(1 / dim) is about 0.04 at 768 and 0.12 at 64
    pad: int = 0  # filler; not used by the network, but by who fills batches
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
    """The encoder that guesses masked tokens; the output head is the embedding table."""

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
        make = lambda i, o, *names: dense(i, o, names, rngs=rngs, init=cfg.normal, dtype=dtype)
        self.to_q, self.to_k, self.to_v = (make(d, d, "embed", "heads") for _ in range(3))
        self.to_out = make(d, d, "heads", "embed")
        self.norm_attention = layer_norm(d, rngs=rngs, eps=cfg.norm_eps, dtype=dtype)
        self.up = make(d, cfg.mlp, "embed", "mlp")
        self.down = make(cfg.mlp, d, "mlp", "embed")
        self.norm_mlp = layer_norm(d, rngs=rngs, eps=cfg.norm_eps, dtype=dtype)
        self.heads = cfg.heads
        self.activation = lookup_name(ACTIVATIONS, cfg.activation, "activation")

    def __call__(self, x: Array, mask: Array | None) -> Array:
        """x [B T D], mask bool [B 1 1 T] -> [B T D]."""
        q, k, v = (split_heads(f(x), self.heads) for f in (self.to_q, self.to_k, self.to_v))
        x = self.norm_attention(x + self.to_out(attention(q, k, v, mask=mask).reshape(x.shape)))
        x = self.norm_mlp(x + self.down(self.activation(self.up(x))))
        return constrain(x, "batch", "seq", None)

    def scores(self, x: Array) -> Array:
        """Attention's logits float32 [B H T T] (query, key) on x [B T D], no mask applied."""
        q, k = (split_heads(f(x), self.heads) for f in (self.to_q, self.to_k))
        return (
            jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=jnp.float32)
            * q.shape[-1] ** -0.5
        )


class Encoder(nnx.Module):
    def __init__(self, cfg: Bert, rngs: nnx.Rngs):
        if cfg.dim % cfg.heads:
            raise Refused(f"model: heads={cfg.heads} must divide dim={cfg.dim}")
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        self.embed = embedding(cfg.vocab, cfg.dim, rngs=rngs)
        self.embed_position = embedding(
            cfg.max_length, cfg.dim, rngs=rngs, names=("index", "embed")
        )
        self.embed_type = embedding(cfg.types, cfg.dim, rngs=rngs, names=("index", "embed"))
        self.norm = layer_norm(cfg.dim, rngs=rngs, eps=cfg.norm_eps, dtype=self.dtype)
        self.blocks = stack(lambda r: Block(cfg, r), cfg.depth, rngs)

    def encode(
        self,
        tokens: Array,
        types: Array | None,
        mask: Array | None,
        taps: tuple[int, ...],
        scores: tuple[int, ...],
    ):
        """(states [B T D], extras): the extras are what `taps` and `scores` ask for, in this
        order.
        """
        cfg = self.cfg
        length = tokens.shape[1]
        if length > cfg.max_length:
            raise Refused(f"tokens: {length} in a sequence, max_length={cfg.max_length}")
        if any(not 0 <= i < cfg.depth for i in scores):
            raise Refused(f"scores={scores}: layers are numbered 0 to {cfg.depth - 1}")
        types = jnp.zeros_like(tokens) if types is None else types
        x = (
            lookup(self.embed, tokens)
            + lookup(self.embed_type, types)
            + self.embed_position.embedding[:length]
        )
        first = constrain(self.norm(x), "batch", "seq", None)
        keys = None if mask is None else mask[:, None, None, :].astype(bool)
        layers = tuple(sorted({*taps, *(i - 1 for i in scores if i)}))
        x, _, states = scan_layers(
            lambda x, block: (block(x, keys), None),
            first,
            self.blocks,
            cfg.depth,
            remat=cfg.remat,
            taps=layers,
        )
        after = {-1: first, **dict(zip(layers, states))}
        found = tuple(
            jax.tree.map(lambda w: w[i], self.blocks).scores(after[i - 1]) for i in scores
        )
        return x, ((tuple(after[i] for i in taps),) if taps else ()) + ((found,) if scores else ())


class BertModule(Encoder):
    def __init__(self, cfg: Bert, rngs: nnx.Rngs):
        super().__init__(cfg, rngs)
        self.pooler = dense(
            cfg.dim, cfg.dim, ("embed", None), rngs=rngs, init=cfg.normal, dtype=self.dtype
        )

    def __call__(
        self,
        tokens: Array,
        *,
        types: Array | None = None,
        mask: Array | None = None,
        taps: tuple[int, ...] = (),
        scores: tuple[int, ...] = (),
    ):
        """tokens int [B T] -> states [B T D].

        types int [B T] defaults to 0, mask bool [B T] is False on padding, wherever it stands. With
        `taps`, the states [B T D] after those blocks are appended; with `scores`, the logits
        float32 [B H T T] (query, key) of those blocks' attention before masking, computed again
        from the block's input so that the others keep none.
        """
        x, extras = self.encode(tokens, types, mask, taps, scores)
        return (x, *extras) if extras else x

    def pool(self, states: Array) -> Array:
        """A text's summary [B D] from its first token's state, states [B T D]."""
        return jnp.tanh(self.pooler(states[:, 0]))


class MaskedBertModule(Encoder):
    def __init__(self, cfg: MaskedBert, rngs: nnx.Rngs):
        super().__init__(cfg, rngs)
        self.transform = dense(
            cfg.dim, cfg.dim, ("embed", None), rngs=rngs, init=cfg.normal, dtype=self.dtype
        )
        self.norm_out = layer_norm(cfg.dim, rngs=rngs, eps=cfg.norm_eps, dtype=self.dtype)
        self.bias = nnx.Param(nnx.with_partitioning(ZEROS, ("vocab",))(rngs.params(), (cfg.vocab,)))

    def __call__(
        self,
        tokens: Array,
        *,
        types: Array | None = None,
        mask: Array | None = None,
        taps: tuple[int, ...] = (),
        scores: tuple[int, ...] = (),
    ):
        """tokens int [B T] -> logits float32 [B T V]: position t guesses token t. Other arguments
        as in BertModule.
        """
        x, extras = self.encode(tokens, types, mask, taps, scores)
        x = self.norm_out(ACTIVATIONS[self.cfg.activation](self.transform(x)))
        table = self.embed.embedding[...].astype(self.dtype)
        logits = project(x, table.T, jnp.float32) + self.bias[...]
        logits = constrain(logits, "batch", "seq", "vocab")
        return (logits, *extras) if extras else logits


class BertClassifierModule(BertModule):
    def __init__(self, cfg: BertClassifier, rngs: nnx.Rngs):
        super().__init__(cfg, rngs)
        self.classifier = dense(cfg.dim, cfg.classes, ("embed", None), rngs=rngs, init=cfg.normal)

    def __call__(
        self,
        tokens: Array,
        *,
        types: Array | None = None,
        mask: Array | None = None,
        taps: tuple[int, ...] = (),
        scores: tuple[int, ...] = (),
    ):
        """tokens int [B T] -> logits float32 [B C]. Other arguments as in BertModule."""
        x, extras = self.encode(tokens, types, mask, taps, scores)
        logits = self.classifier(self.pool(x).astype(jnp.float32))
        return (logits, *extras) if extras else logits
