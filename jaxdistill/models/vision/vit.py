"""ViT (arXiv:2010.11929): an encoder of image patches.

It has a class token, learned positions and layer norms before each branch. Weights are those of
transformers' `ViTModel` and `ViTForImageClassification`, layers stacked. The two share the weight
paths of their encoder, so that a classifier starts from a pretrained encoder weight by weight.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Bool, Float

from jaxdistill.core.fields import Depth, Dtype, Remat
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array, Refused
from jaxdistill.core.types import lookup as lookup_name
from jaxdistill.models.layers import (
    ACTIVATIONS,
    ZEROS,
    Inside,
    Stacked,
    attention,
    dense,
    layer_norm,
    split_heads,
    stack,
    with_residual,
)

NORMAL = nnx.initializers.truncated_normal(0.02)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViT:
    """Sizes of the encoder with its pooler. Defaults are a toy's.

    ViT-B/16 is size 224, patch 16, channels 3, dim 768, mlp 3072, heads 12, depth 12; ViT-L/16 dim
    1024, mlp 4096, heads 16, depth 24.
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
        make = functools.partial(dense, rngs=rngs, init=NORMAL, dtype=dtype)
        self.norm_attention = layer_norm(
            d, rngs=rngs, eps=cfg.norm_eps, dtype=dtype
        )
        self.norm_mlp = layer_norm(d, rngs=rngs, eps=cfg.norm_eps, dtype=dtype)
        self.to_q = make(d, d, ("embed", "heads"), bias=cfg.bias)
        self.to_k = make(d, d, ("embed", "heads"), bias=cfg.bias)
        self.to_v = make(d, d, ("embed", "heads"), bias=cfg.bias)
        self.to_out = make(d, d, ("heads", "embed"))
        self.up = make(d, cfg.mlp, ("embed", "mlp"))
        self.down = make(cfg.mlp, d, ("mlp", "embed"))
        self.heads = cfg.heads
        self.activation = lookup_name(ACTIVATIONS, cfg.activation, "activation")

    def __call__(
        self,
        x: Float[Array, "B N D"],
        *,
        mask: Bool[Array, "B 1 1 N"] | None = None,
        causal: bool = False,
        residual: Callable[[Array], Array] | None = None,
    ) -> tuple[Float[Array, "B N D"], Inside]:
        h = self.norm_attention(x)
        q = split_heads(self.to_q(h), self.heads)
        k = split_heads(self.to_k(h), self.heads)
        v = split_heads(self.to_v(h), self.heads)
        attended = attention(q, k, v, mask=mask, causal=causal).reshape(x.shape)
        x = x + with_residual(self.to_out(attended), h, residual)
        neurons = self.activation(self.up(self.norm_mlp(x)))
        x = constrain(x + self.down(neurons), "batch", "seq", None)
        return x, Inside(attended, neurons)


def check_sizes(cfg: Any) -> None:
    """Raises Refused where heads do not divide dim, or patches the image; `cfg` is like a ViT."""
    if cfg.dim % cfg.heads or cfg.size % cfg.patch:
        raise Refused(
            f"model: heads={cfg.heads} must divide dim={cfg.dim}, "
            f"and patch={cfg.patch} size={cfg.size}"
        )


def cut_patches(cfg: Any, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
    """Patches of pictures in cfg.dtype; their channels are (row, column, channel).

    Raises:
        Refused: on images of another size than cfg's.
    """
    if x.shape[1:] != (cfg.size, cfg.size, cfg.channels):
        raise Refused(
            f"x {list(x.shape)}: expected images of {[cfg.size, cfg.size, cfg.channels]}"
        )
    p = cfg.patch
    return rearrange(
        x.astype(cfg.dtype), "b (i p) (j q) c -> b i j (p q c)", p=p, q=p
    )


def embed_patches(
    cfg: Any,
    project: nnx.Linear,
    token: Float[Array, "... D"],
    positions: Float[Array, "... M D"],
    x: Float[Array, "B H W C"],
) -> Float[Array, "B M D"]:
    """A token and the patches by rows, each plus its position.

    Raises:
        Refused: on images of another size than cfg's.
    """
    dtype = jnp.dtype(cfg.dtype)
    h = rearrange(cut_patches(cfg, x), "b i j p -> b (i j) p")
    first = jnp.broadcast_to(token.astype(dtype), (len(x), 1, cfg.dim))
    return jnp.concatenate([first, project(h)], 1) + positions.astype(dtype)


class Encoder(Stacked):
    def __init__(self, cfg: ViT, rngs: nnx.Rngs):
        check_sizes(cfg)
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        d = cfg.dim
        pixels = cfg.patch**2 * cfg.channels  # numbers in a patch
        patches = (cfg.size // cfg.patch) ** 2
        names = (None, "embed")
        self.patch_embed = dense(
            pixels, d, names, rngs=rngs, init=NORMAL, dtype=self.dtype
        )
        table = nnx.with_partitioning(NORMAL, (None, "index", "embed"))
        self.token = nnx.Param(table(rngs.params(), (1, 1, d)))
        self.positions = nnx.Param(table(rngs.params(), (1, 1 + patches, d)))
        self.blocks = stack(lambda r: Block(cfg, r), cfg.depth, rngs)
        self.norm = layer_norm(
            cfg.dim, rngs=rngs, eps=cfg.norm_eps, dtype=self.dtype
        )

    def embed_inputs(
        self, x: Float[Array, "B H W C"]
    ) -> tuple[Float[Array, "B N D"], None]:
        h = embed_patches(
            self.cfg, self.patch_embed, self.token[...], self.positions[...], x
        )
        return constrain(h, "batch", "seq", None), None

    def apply_block(self, block, state, context, residual=None):
        return block(state, residual=residual)


class ViTModule(Encoder):
    def __init__(self, cfg: ViT, rngs: nnx.Rngs):
        super().__init__(cfg, rngs)
        names = ("embed", None)
        self.pooler = dense(
            cfg.dim, cfg.dim, names, rngs=rngs, init=NORMAL, dtype=self.dtype
        )

    def __call__(
        self,
        x: Float[Array, "B H W C"],
        *,
        taps: tuple[int, ...] = (),
        **through: Any,
    ) -> Float[Array, "B N D"] | tuple[Float[Array, "B N D"], tuple]:
        """The class token and the patches by rows; with `taps`, (these, features of those blocks).

        `through` are options of `Stacked.apply_blocks`.

        Raises:
            Refused: on images of another size.
        """
        return self.through(*self.embed_inputs(x), taps=taps, **through)

    def head(
        self, state: Float[Array, "B N D"], context: None = None
    ) -> Float[Array, "B N D"]:
        return self.norm(state)

    def pool(self, tokens: Float[Array, "B N D"]) -> Float[Array, "B D"]:
        """The summary of an image, from its class token."""
        return jnp.tanh(self.pooler(tokens[:, 0]))


class ViTClassifierModule(Encoder):
    def __init__(self, cfg: ViTClassifier, rngs: nnx.Rngs):
        super().__init__(cfg, rngs)
        self.classifier = dense(
            cfg.dim, cfg.classes, ("embed", None), rngs=rngs, init=ZEROS
        )

    def __call__(
        self,
        x: Float[Array, "B H W C"],
        *,
        taps: tuple[int, ...] = (),
        **through: Any,
    ) -> Float[Array, "B K"] | tuple[Float[Array, "B K"], tuple]:
        """Logits of the classes, in float32. Otherwise as ViTModule."""
        return self.through(*self.embed_inputs(x), taps=taps, **through)

    def head(
        self, state: Float[Array, "B N D"], context: None = None
    ) -> Float[Array, "B K"]:
        tokens = self.norm(state)
        return self.classifier(tokens[:, 0].astype(jnp.float32))
