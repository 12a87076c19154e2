"""Gemma 2 (arXiv:2408.00118): Llama with norms on both sides of each branch, GeGLU and caps.

Attention's scores and the logits are capped by tanh. Weights are those of transformers'
`Gemma2ForCausalLM`, and of `Gemma2Model`, SANA's text encoder; layers stacked. Every second layer
of the released models attends to a window only; here sequences are at most as long as the window,
where both are equal.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array, Refused
from jaxdistill.core.types import lookup as lookup_name
from jaxdistill.models.language.lm import LM, Block, LMModule
from jaxdistill.models.layers import ACTIVATIONS, ZEROS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma2(LM):
    """Gemma-2-2B is vocab 256000, dim 2304, mlp 9216, heads 8, kv_heads 4, head_dim 256, depth 26,
    max_length and window 4096, query_scale 256, cap 50, logit_cap 30.
    """

    tied: bool = True
    window: int = 2048  # tokens that every second layer attends to; max_length is at most as long
    # scores are divided by its root (query_pre_attn_scalar)
    query_scale: float = 16.0
    cap: float = 50.0  # of attention's scores; 0: none
    logit_cap: float = 30.0  # of the logits; 0: none
    activation: str = "gelu_pytorch_tanh"  # a key of layers.ACTIVATIONS

    def block(self, rngs: nnx.Rngs) -> Gemma2Block:
        return Gemma2Block(self, rngs)

    def __call__(self, rngs: nnx.Rngs) -> Gemma2Module:
        return Gemma2Module(self, rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma2Text(Gemma2):
    """The decoder as an encoder of prompts.

    Its call gives the final normed activations [B T D] in place of logits.
    """

    def __call__(self, rngs: nnx.Rngs) -> Gemma2TextModule:
        return Gemma2TextModule(self, rngs)


class CentredNorm(nnx.Module):
    """Root-mean-square norm whose gain is 1 + scale; float32 until both are applied."""

    def __init__(self, dim: int, eps: float, dtype, rngs: nnx.Rngs):
        self.scale = nnx.Param(
            nnx.with_partitioning(ZEROS, (None,))(rngs.params(), (dim,))
        )
        self.eps = eps
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + self.eps)
        return (h * (1 + self.scale[...])).astype(self.dtype)


class Gemma2Block(Block):
    def __init__(self, cfg: Gemma2, rngs: nnx.Rngs):
        super().__init__(cfg, rngs)
        make = lambda: CentredNorm(
            cfg.dim, cfg.norm_eps, jnp.dtype(cfg.dtype), rngs
        )
        self.norm_attention = make()
        self.norm_attention_out = make()
        self.norm_mlp = make()
        self.norm_mlp_out = make()
        self.activation = lookup_name(ACTIVATIONS, cfg.activation, "activation")
        # attention divides the scores by the root of a head's size
        self.query_factor = (cfg.head_size / cfg.query_scale) ** 0.5

    def project(
        self, h: Float[Array, "B T D"]
    ) -> tuple[
        Float[Array, "B T H K"], Float[Array, "B T G K"], Float[Array, "B T G K"]
    ]:
        q, k, v = super().project(h)
        return self.query_factor * q, k, v

    def attention_branch(
        self, x: Float[Array, "B T D"], out: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        return constrain(x + self.norm_attention_out(out), "batch", "seq", None)

    def neurons(self, x: Float[Array, "B T D"]) -> Float[Array, "B T M"]:
        h = self.norm_mlp(x)
        return self.activation(self.gate(h)) * self.up(h)

    def mlp_branch(
        self, x: Float[Array, "B T D"], out: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        return constrain(x + self.norm_mlp_out(out), "batch", "seq", None)


class Gemma2Module(LMModule):
    def __init__(self, cfg: Gemma2, rngs: nnx.Rngs):
        if cfg.max_length > cfg.window:
            raise Refused(
                f"model: max_length={cfg.max_length} is more than window={cfg.window} tokens, "
                "which half of the layers see"
            )
        super().__init__(cfg, rngs)
        self.norm = CentredNorm(cfg.dim, cfg.norm_eps, self.dtype, rngs)

    def _enter(
        self, tokens: Array, positions: Array | None, cache: dict[str, Any] | None
    ):
        x, rotary = super()._enter(tokens, positions, cache)
        return x * jnp.asarray(self.cfg.dim**0.5, self.dtype), rotary

    def _logits(self, x: Array) -> Array:
        cap = self.cfg.logit_cap
        logits = super()._logits(x)
        return cap * jnp.tanh(logits / cap) if cap else logits

    def unembedding(self) -> Float[Array, "D V"]:
        """The matrix that makes logits of final activations.

        Raises:
            Refused: where logits are capped, and so are no linear map of the activations.
        """
        if self.cfg.logit_cap:
            raise Refused(
                f"model: logits are capped at {self.cfg.logit_cap} and cannot be made in chunks; "
                "set method.chunk=0"
            )
        return super().unembedding()


class Gemma2TextModule(Gemma2Module):
    def _logits(self, x: Array) -> Array:
        return x
