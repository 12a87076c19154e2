"""ViT (arXiv:2010.11929): an encoder of image patches with a class token, learned positions and
layer norms before each branch.

Weights are those of transformers' `ViTModel` and `ViTForImageClassification`, layers stacked. The
two share the paths of their encoder, so that a classifier starts from a pretrained encoder leaf by
leaf.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from jaxdistill.core.fields import Depth, Dtype, Remat
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array, Refused
from jaxdistill.core.types import lookup as lookup_name
from jaxdistill.models.layers import (
    ACTIVATIONS,
    ZEROS,
    attention,
    dense,
    layer_norm,
    scan_layers,
    split_heads,
    stack,
)

NORMAL = nnx.initializers.truncated_normal(0.02)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViT:
    """Sizes of the encoder with its pooler. Defaults are a toy's; ViT-B/16 is size 224, patch 16,
    channels 3, dim 768, mlp 3072, heads 12, depth 12; ViT-L/16 dim 1024, mlp 4096, heads 16, depth
    24.
    """

    size: int = 8  # images are [size, size, channels]
    patch: int = 2
    channels: int = 1
    dim: int = 64
    mlp: int = 128
    heads: int = 4
    depth: Depth = 4
    bias: bool = True  # of queries, keys and values
    activation: str = "gelu"  # a key of layers.ACTIVATIONS
    norm_eps: float = 1e-12
    dtype: Dtype = "float32"  # arithmetic; weights are float32
    remat: Remat = "none"

    def __call__(self, rngs: nnx.Rngs) -> ViTModule:
        return ViTModule(self, rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTClassifier(ViT):
    """The encoder that classifies images."""

    classes: int = 10

    def __call__(self, rngs: nnx.Rngs) -> ViTClassifierModule:
        return ViTClassifierModule(self, rngs)


class Block(nnx.Module):
    """A pre-norm layer of the encoders of images and texts (CLIP's too); `cfg` has ViT's fields."""

    def __init__(self, cfg: Any, rngs: nnx.Rngs):
        d = cfg.dim
        dtype = jnp.dtype(cfg.dtype)
        make = lambda i, o, names, bias=True: dense(
            i, o, names, rngs=rngs, init=NORMAL, bias=bias, dtype=dtype
        )
        self.norm_attention, self.norm_mlp = (
            layer_norm(d, rngs=rngs, eps=cfg.norm_eps, dtype=dtype) for _ in range(2)
        )
        self.to_q, self.to_k, self.to_v = (
            make(d, d, ("embed", "heads"), cfg.bias) for _ in range(3)
        )
        self.to_out = make(d, d, ("heads", "embed"))
        self.up = make(d, cfg.mlp, ("embed", "mlp"))
        self.down = make(cfg.mlp, d, ("mlp", "embed"))
        self.heads = cfg.heads
        self.activation = lookup_name(ACTIVATIONS, cfg.activation, "activation")

    def __call__(self, x: Array, *, mask: Array | None = None, causal: bool = False) -> Array:
        """x [B N D], mask bool [B 1 1 N] -> [B N D]."""
        h = self.norm_attention(x)
        q, k, v = (split_heads(f(h), self.heads) for f in (self.to_q, self.to_k, self.to_v))
        x = x + self.to_out(attention(q, k, v, mask=mask, causal=causal).reshape(x.shape))
        return constrain(
            x + self.down(self.activation(self.up(self.norm_mlp(x)))), "batch", "seq", None
        )


def check_sizes(cfg: Any) -> None:
    """Raises Refused where heads do not divide dim, or patches the image; `cfg` has ViT's fields."""
    if cfg.dim % cfg.heads or cfg.size % cfg.patch:
        raise Refused(
            f"model: heads={cfg.heads} must divide dim={cfg.dim}, and patch={cfg.patch} size={cfg.size}"
        )


def cut_patches(cfg: Any, x: Array) -> Array:
    """x [B H W C] -> [B H/p W/p, p p C] in cfg.dtype. Raises Refused on images of another size than
    cfg's.
    """
    if x.shape[1:] != (cfg.size, cfg.size, cfg.channels):
        raise Refused(f"x {list(x.shape)}: expected images of {[cfg.size, cfg.size, cfg.channels]}")
    return rearrange(
        x.astype(cfg.dtype), "b (i p) (j q) c -> b i j (p q c)", p=cfg.patch, q=cfg.patch
    )


def embed_patches(cfg: Any, project: nnx.Linear, token: Array, positions: Array, x: Array) -> Array:
    """x [B H W C] -> [B 1 + N D]: a token [D], then the patches by rows, each plus its row of
    positions [1 + N D].

    Raises Refused on images of another size than cfg's.
    """
    dtype = jnp.dtype(cfg.dtype)
    h = rearrange(cut_patches(cfg, x), "b i j p -> b (i j) p")
    first = jnp.broadcast_to(token.astype(dtype), (len(x), 1, cfg.dim))
    return jnp.concatenate([first, project(h)], 1) + positions.astype(dtype)


class Encoder(nnx.Module):
    def __init__(self, cfg: ViT, rngs: nnx.Rngs):
        check_sizes(cfg)
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        table = lambda rows: nnx.Param(
            nnx.with_partitioning(NORMAL, (None, "index", "embed"))(
                rngs.params(), (1, rows, cfg.dim)
            )
        )
        self.patch_embed = dense(
            cfg.patch**2 * cfg.channels,
            cfg.dim,
            (None, "embed"),
            rngs=rngs,
            init=NORMAL,
            dtype=self.dtype,
        )
        self.token = table(1)
        self.positions = table(1 + (cfg.size // cfg.patch) ** 2)
        self.blocks = stack(lambda r: Block(cfg, r), cfg.depth, rngs)
        self.norm = layer_norm(cfg.dim, rngs=rngs, eps=cfg.norm_eps, dtype=self.dtype)

    def encode(self, x: Array, taps: tuple[int, ...]) -> tuple[Array, tuple[Array, ...]]:
        """(states [B 1 + N D] after the last norm, states after the blocks that `taps` lists)."""
        cfg = self.cfg
        h = embed_patches(cfg, self.patch_embed, self.token[...], self.positions[...], x)
        body = lambda h, block: (block(h), None)
        h, _, features = scan_layers(
            body,
            constrain(h, "batch", "seq", None),
            self.blocks,
            cfg.depth,
            remat=cfg.remat,
            taps=taps,
        )
        return self.norm(h), features


class ViTModule(Encoder):
    def __init__(self, cfg: ViT, rngs: nnx.Rngs):
        super().__init__(cfg, rngs)
        self.pooler = dense(
            cfg.dim, cfg.dim, ("embed", None), rngs=rngs, init=NORMAL, dtype=self.dtype
        )

    def __call__(self, x: Array, *, taps: tuple[int, ...] = ()):
        """x [B H W C] -> states [B 1 + N D], the class token first; with `taps`, (states,
        states after those blocks).

        Raises Refused on images of another size.
        """
        states, features = self.encode(x, taps)
        return (states, features) if taps else states

    def pool(self, states: Array) -> Array:
        """An image's summary [B D] from its class token's state, states [B 1 + N D]."""
        return jnp.tanh(self.pooler(states[:, 0]))


class ViTClassifierModule(Encoder):
    def __init__(self, cfg: ViTClassifier, rngs: nnx.Rngs):
        super().__init__(cfg, rngs)
        self.classifier = dense(cfg.dim, cfg.classes, ("embed", None), rngs=rngs, init=ZEROS)

    def __call__(self, x: Array, *, taps: tuple[int, ...] = ()):
        """x [B H W C] -> logits float32 [B classes]. Otherwise as ViTModule."""
        states, features = self.encode(x, taps)
        logits = self.classifier(states[:, 0].astype(jnp.float32))
        return (logits, features) if taps else logits
