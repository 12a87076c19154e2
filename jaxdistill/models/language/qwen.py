"""Qwen 2, 2.5 and 3 (arXiv:2407.10671, 2412.15115, 2505.09388): Llama with another attention.

Weights are those of transformers' `Qwen2ForCausalLM` and `Qwen3ForCausalLM`, layers stacked.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from jaxdistill.core.types import Array
from jaxdistill.models.language.lm import LM, Block, LMModule
from jaxdistill.models.layers import dense, rms_norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2(LM):
    """Queries, keys and values have a bias.

    Qwen2.5-0.5B is vocab 151936, dim 896, mlp 4864, heads 14, kv_heads 2, depth 24, rope_theta 1e6,
    max_length 32768, tied.
    """

    def block(self, rngs: nnx.Rngs) -> Block:
        return Qwen2Block(self, rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3(LM):
    """Queries and keys pass an RMS norm before their positions.

    Qwen3-0.6B is vocab 151936, dim 1024, mlp 3072, heads 16, kv_heads 8, head_dim 128, depth 28,
    rope_theta 1e6, max_length 40960, tied.
    """

    def block(self, rngs: nnx.Rngs) -> Block:
        return Qwen3Block(self, rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2Text(Qwen2):
    """The language model of Qwen2.5-VL as an encoder of prompts (Qwen-Image's).

    Its call gives the final normed activations [B T D] in place of logits. On text alone the three
    axes of its rotary positions are equal. 7B is dim 3584, mlp 18944, heads 28, kv_heads 4, depth
    28.
    """

    tied: bool = True  # there is no head

    def __call__(self, rngs: nnx.Rngs) -> Qwen2TextModule:
        return Qwen2TextModule(self, rngs)


class Qwen2TextModule(LMModule):
    def _logits(self, x: Array) -> Array:
        return x


class Qwen2Block(Block):
    def __init__(self, cfg: Qwen2, rngs: nnx.Rngs):
        super().__init__(cfg, rngs)
        names = ("embed", "heads")
        make = functools.partial(
            dense, cfg.dim, rngs=rngs, dtype=jnp.dtype(cfg.dtype)
        )
        self.to_q = make(self.heads * cfg.head_size, names)
        self.to_k = make(self.kv_heads * cfg.head_size, names)
        self.to_v = make(self.kv_heads * cfg.head_size, names)


class Qwen3Block(Block):
    def __init__(self, cfg: Qwen3, rngs: nnx.Rngs):
        super().__init__(cfg, rngs)
        dtype = jnp.dtype(cfg.dtype)
        self.norm_q = rms_norm(
            cfg.head_size, rngs=rngs, eps=cfg.norm_eps, dtype=dtype
        )
        self.norm_k = rms_norm(
            cfg.head_size, rngs=rngs, eps=cfg.norm_eps, dtype=dtype
        )

    def project(
        self, h: Float[Array, "B T D"]
    ) -> tuple[
        Float[Array, "B T H K"], Float[Array, "B T G K"], Float[Array, "B T G K"]
    ]:
        q, k, v = super().project(h)
        return self.norm_q(q), self.norm_k(k), v
