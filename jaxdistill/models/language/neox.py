"""GPT-NeoX (arXiv:2204.06745) and Pythia (2304.01373): attention and MLP in parallel branches.

It has layer norms, biases, and rotary positions on a part of each head. Weights are those of
transformers' `GPTNeoXForCausalLM`, layers stacked; queries, keys and values stay one matrix.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Key

from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array, Refused
from jaxdistill.core.types import lookup as lookup_name
from jaxdistill.models.language.lm import LM, Attend, LMModule
from jaxdistill.models.layers import (
    ACTIVATIONS,
    Inside,
    Rotary,
    attention_scores,
    dense,
    drop,
    layer_norm,
    part_keys,
    rotate,
    split_heads,
    with_residual,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeoX(LM):
    """Sizes; neither kv_heads nor head_dim are used.

    Pythia-70m is vocab 50304, dim 512, mlp 2048, heads 8, depth 6. GPT-NeoX-20B is vocab 50432, dim
    6144, mlp 24576, heads 64, depth 44, activation gelu_fast.
    """

    norm_eps: float = 1e-5
    rotary_share: float = 0.25  # of a head's channels that turn with the position
    # attention and MLP read the same activations; False: the MLP reads the output of attention
    parallel: bool = True
    activation: str = "gelu"  # a key of layers.ACTIVATIONS

    @property
    def rotary(self) -> int:
        return int(self.head_size * self.rotary_share)

    def block(self, rngs: nnx.Rngs) -> Block:
        return Block(self, rngs)

    def __call__(self, rngs: nnx.Rngs) -> NeoXModule:
        return NeoXModule(self, rngs)


class Block(nnx.Module):
    """As `lm.Block`."""

    def __init__(self, cfg: NeoX, rngs: nnx.Rngs):
        d = cfg.dim
        dtype = jnp.dtype(cfg.dtype)
        make = functools.partial(dense, rngs=rngs, dtype=dtype)
        self.heads = cfg.heads
        self.dropout = cfg.dropout
        self.rotary = cfg.rotary
        self.parallel = cfg.parallel
        self.activation = lookup_name(ACTIVATIONS, cfg.activation, "activation")
        self.norm_attention = layer_norm(
            d, rngs=rngs, eps=cfg.norm_eps, dtype=dtype
        )
        self.norm_mlp = layer_norm(d, rngs=rngs, eps=cfg.norm_eps, dtype=dtype)
        # its output channels are (head, one of q k v, channel)
        self.to_qkv = make(d, 3 * d, ("embed", "heads"))
        self.to_out = make(d, d, ("heads", "embed"))
        self.up = make(d, cfg.mlp, ("embed", "mlp"))
        self.down = make(cfg.mlp, d, ("mlp", "embed"))

    def project(
        self, h: Float[Array, "B T D"]
    ) -> tuple[
        Float[Array, "B T H K"], Float[Array, "B T H K"], Float[Array, "B T H K"]
    ]:
        qkv = split_heads(self.to_qkv(h), self.heads)
        q, k, v = jnp.split(qkv, 3, -1)
        return q, k, v

    def rotate(
        self, x: Float[Array, "B T H K"], rotary: Rotary
    ) -> Float[Array, "B T H K"]:
        """Rotary positions on the first channels of each head."""
        rotated = rotate(x[..., : self.rotary], rotary)
        return jnp.concatenate([rotated, x[..., self.rotary :]], -1)

    def scores(
        self, x: Float[Array, "B T D"], rotary: Rotary
    ) -> Float[Array, "B H T T"]:
        q, k, _ = self.project(self.norm_attention(x))
        return attention_scores(self.rotate(q, rotary), self.rotate(k, rotary))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotary: Rotary,
        attend: Attend,
        residual: Callable[[Array], Array] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any, Inside]:
        key_attention, key_mlp = part_keys(key, 2)
        h = self.norm_attention(x)
        q, k, v = self.project(h)
        attended, extra = attend(self.rotate(q, rotary), self.rotate(k, rotary), v)
        merged = attended.reshape(x.shape)
        out = drop(self.to_out(merged), self.dropout, key_attention)
        mid = x + with_residual(out, h, residual)
        neurons = self.activation(
            self.up(self.norm_mlp(x if self.parallel else mid))
        )
        out = drop(self.down(neurons), self.dropout, key_mlp)
        x = constrain(mid + out, "batch", "seq", None)
        return x, extra, Inside(merged, neurons)


class NeoXModule(LMModule):
    def __init__(self, cfg: NeoX, rngs: nnx.Rngs):
        if cfg.kv_heads or cfg.head_dim:
            raise Refused(
                f"model: kv_heads={cfg.kv_heads}, head_dim={cfg.head_dim}: "
                f"NeoX has heads={cfg.heads} of dim / heads, expected 0"
            )
        if cfg.rotary % 2 or not cfg.rotary:
            raise Refused(
                f"model: {cfg.rotary} of a head's {cfg.head_size} channels turn "
                f"(rotary_share={cfg.rotary_share}), not pairs"
            )
        super().__init__(cfg, rngs)
        self.norm = layer_norm(
            cfg.dim, rngs=rngs, eps=cfg.norm_eps, dtype=self.dtype
        )
