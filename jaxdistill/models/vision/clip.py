"""CLIP's two towers (arXiv:2103.00020): a causal text encoder and an image encoder, as ViT's.

Weights are those of transformers' `CLIPTextModel`, `CLIPVisionModel` and their `WithProjection`
variants, layers stacked. A tower with a projection shares the weight paths of the one without, so
that each loads the other's encoder weight by weight.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Integer, Shaped

from jaxdistill.core.fields import Depth, Dtype, Natural, Remat
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array, Refused
from jaxdistill.models.layers import (
    Stacked,
    dense,
    embedding,
    key_mask,
    layer_norm,
    lookup,
    stack,
)
from jaxdistill.models.vision.vit import NORMAL, Block, check_sizes, embed_patches


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipText:
    """Sizes of the text tower. Defaults are a toy's.

    CLIP-L/14 (Stable Diffusion 1, SDXL's first) is vocab 49408, dim 768, mlp 3072, heads 12, depth
    12, max_length 77; OpenCLIP bigG/14 (SDXL's second) dim 1280, mlp 5120, heads 20, depth 32,
    activation gelu, with a projection of 1280.
    """

    vocab: int = 64
    dim: int = 64
    mlp: int = 128
    heads: int = 4
    depth: Depth = 4
    max_length: int = 16  # tokens; each position has a learned embedding
    eos: Natural = 63  # the token whose features are the text's summary
    activation: str = "quick_gelu"  # a key of layers.ACTIVATIONS
    norm_eps: float = 1e-5
    # length of the summaries that texts and images share; only networks with a projection read it
    projection: int = 64
    dtype: Dtype = "float32"  # arithmetic; weights are float32
    remat: Remat = "none"
    bias = True  # of queries, keys and values: ViT's field

    def __call__(self, rngs: nnx.Rngs) -> ClipTextModule:
        return ClipTextModule(self, rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipTextProjected(ClipText):
    """The text tower whose summaries are compared with images'."""

    def __call__(self, rngs: nnx.Rngs) -> ClipTextProjectedModule:
        return ClipTextProjectedModule(self, rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipVision:
    """Sizes of the image tower. Defaults are a toy's.

    ViT-L/14 is size 224, patch 14, dim 1024, mlp 4096, heads 16, depth 24, projection 768; ViT-H/14
    (Wan 2.1's) dim 1280, mlp 5120, depth 32, activation gelu, projection 1024.
    """

    size: int = 8  # images are [size, size, channels]
    patch: int = 2
    channels: int = 3
    dim: int = 64
    mlp: int = 128
    heads: int = 4
    depth: Depth = 4
    activation: str = "quick_gelu"  # a key of layers.ACTIVATIONS
    norm_eps: float = 1e-5
    projection: int = 64  # as in ClipText
    dtype: Dtype = "float32"  # arithmetic; weights are float32
    remat: Remat = "none"
    bias = True

    def __call__(self, rngs: nnx.Rngs) -> ClipVisionModule:
        return ClipVisionModule(self, rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipVisionProjected(ClipVision):
    """The image tower whose summaries are compared with texts'."""

    def __call__(self, rngs: nnx.Rngs) -> ClipVisionProjectedModule:
        return ClipVisionProjectedModule(self, rngs)


def _project(cfg: ClipText | ClipVision, rngs: nnx.Rngs) -> nnx.Linear:
    """From the width of a tower to the summaries that texts and images share."""
    names = ("embed", None)
    dtype = jnp.dtype(cfg.dtype)
    return dense(
        cfg.dim,
        cfg.projection,
        names,
        rngs=rngs,
        init=NORMAL,
        bias=False,
        dtype=dtype,
    )


class ClipTextModule(Stacked):
    def __init__(self, cfg: ClipText, rngs: nnx.Rngs):
        if cfg.dim % cfg.heads:
            raise Refused(f"model: heads={cfg.heads} must divide dim={cfg.dim}")
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        self.embed = embedding(cfg.vocab, cfg.dim, rngs=rngs)
        self.embed_position = embedding(
            cfg.max_length, cfg.dim, rngs=rngs, names=("index", "embed")
        )
        self.blocks = stack(lambda r: Block(cfg, r), cfg.depth, rngs)
        self.norm = layer_norm(
            cfg.dim, rngs=rngs, eps=cfg.norm_eps, dtype=self.dtype
        )

    def __call__(
        self,
        tokens: Integer[Array, "B T"],
        *,
        mask: Shaped[Array, "B T"] | None = None,
        taps: tuple[int, ...] = (),
        **through: Any,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], tuple]:
        """The normed output; with `taps`, (this, features [B T D] of those blocks, not normed).

        `mask` is False on padding; the released pipelines give none and let the text attend to its
        padding. `through` are options of `Stacked.apply_blocks`.

        Raises:
            Refused: on more than max_length tokens.
        """
        return self.through(
            *self.embed_inputs(tokens, mask=mask), taps=taps, **through
        )

    def embed_inputs(
        self,
        tokens: Integer[Array, "B T"],
        *,
        mask: Shaped[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Bool[Array, "B 1 1 T"] | None]:
        length = tokens.shape[1]
        if length > self.cfg.max_length:
            raise Refused(
                f"tokens: {length} in a sequence, max_length={self.cfg.max_length}"
            )
        x = lookup(self.embed, tokens) + self.embed_position.embedding[:length]
        x = constrain(x.astype(self.dtype), "batch", "seq", None)
        return x, key_mask(mask)

    def apply_block(self, block, state, context, residual=None):
        return block(state, mask=context, causal=True, residual=residual)

    def head(
        self, state: Float[Array, "B T D"], context: Any = None
    ) -> Float[Array, "B T D"]:
        return self.norm(state)

    def pool(
        self, outputs: Float[Array, "B T D"], tokens: Integer[Array, "B T"]
    ) -> Float[Array, "B P"]:
        """The summary of a text: the output at its first `eos` token.

        With eos = 2, which the first released configurations give wrongly, it is that at the
        largest token.
        """
        last = jnp.argmax(
            tokens if self.cfg.eos == 2 else tokens == self.cfg.eos, -1
        )
        return jnp.take_along_axis(outputs, last[:, None, None], 1)[:, 0]


class ClipTextProjectedModule(ClipTextModule):
    def __init__(self, cfg: ClipTextProjected, rngs: nnx.Rngs):
        super().__init__(cfg, rngs)
        self.project = _project(cfg, rngs)

    def pool(
        self, outputs: Float[Array, "B T D"], tokens: Integer[Array, "B T"]
    ) -> Float[Array, "B P"]:
        """The projected summary of a text. Otherwise as ClipTextModule."""
        return self.project(super().pool(outputs, tokens))


class ClipVisionModule(Stacked):
    def __init__(self, cfg: ClipVision, rngs: nnx.Rngs):
        check_sizes(cfg)
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        d = cfg.dim
        pixels = cfg.patch**2 * cfg.channels  # numbers in a patch
        patches = (cfg.size // cfg.patch) ** 2
        self.patch_embed = dense(
            pixels,
            d,
            (None, "embed"),
            rngs=rngs,
            init=NORMAL,
            bias=False,
            dtype=self.dtype,
        )
        token = nnx.with_partitioning(NORMAL, ("embed",))
        table = nnx.with_partitioning(NORMAL, ("index", "embed"))
        self.token = nnx.Param(token(rngs.params(), (d,)))
        self.positions = nnx.Param(table(rngs.params(), (1 + patches, d)))
        self.norm_in = layer_norm(
            cfg.dim, rngs=rngs, eps=cfg.norm_eps, dtype=self.dtype
        )
        self.blocks = stack(lambda r: Block(cfg, r), cfg.depth, rngs)
        self.norm_out = layer_norm(
            cfg.dim, rngs=rngs, eps=cfg.norm_eps, dtype=self.dtype
        )

    def __call__(
        self,
        x: Float[Array, "B H W C"],
        *,
        taps: tuple[int, ...] = (),
        **through: Any,
    ) -> Float[Array, "B N D"] | tuple[Float[Array, "B N D"], tuple]:
        """The class token and the patches, not normed; with `taps`, (these, features of blocks).

        `through` are options of `Stacked.apply_blocks`.

        Raises:
            Refused: on images of another size.
        """
        return self.through(*self.embed_inputs(x), taps=taps, **through)

    def embed_inputs(
        self, x: Float[Array, "B H W C"]
    ) -> tuple[Float[Array, "B N D"], None]:
        h = embed_patches(
            self.cfg, self.patch_embed, self.token[...], self.positions[...], x
        )
        return constrain(self.norm_in(h), "batch", "seq", None), None

    def apply_block(self, block, state, context, residual=None):
        return block(state, residual=residual)

    def head(
        self, state: Float[Array, "B N D"], context: None = None
    ) -> Float[Array, "B N D"]:
        return state

    def pool(self, tokens: Float[Array, "B N D"]) -> Float[Array, "B P"]:
        """The summary of an image: its class token after the last norm."""
        return self.norm_out(tokens[:, 0])


class ClipVisionProjectedModule(ClipVisionModule):
    def __init__(self, cfg: ClipVisionProjected, rngs: nnx.Rngs):
        super().__init__(cfg, rngs)
        self.project = _project(cfg, rngs)

    def pool(self, tokens: Float[Array, "B N D"]) -> Float[Array, "B P"]:
        """The projected summary of an image. Otherwise as ClipVisionModule."""
        return self.project(super().pool(tokens))
