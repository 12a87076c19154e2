"""GPT-NeoX (arXiv:2204.06745) and Pythia (2304.01373): attention and MLP side by side on one
residual stream, layer norms, biases, and rotary positions on a part of each head.

Weights are those of transformers' `GPTNeoXForCausalLM`, layers stacked; queries, keys and values
stay one matrix.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx

from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array, Refused
from jaxdistill.core.types import lookup as lookup_name
from jaxdistill.models.language.lm import LM, LMModule
from jaxdistill.models.layers import ACTIVATIONS, dense, layer_norm, rotate, split_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeoX(LM):
    """Pythia-70m is vocab 50304, dim 512, mlp 2048, heads 8, depth 6; GPT-NeoX-20B is vocab 50432,
    dim 6144, mlp 24576, heads 64, depth 44, activation gelu_fast. Neither kv_heads nor head_dim are
    used.
    """

    norm_eps: float = 1e-5
    rotary_share: float = 0.25  # of a head's channels that turn with the position
    # attention and MLP read the same state; False: the MLP reads what attention has written
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
    def __init__(self, cfg: NeoX, rngs: nnx.Rngs):
        d = cfg.dim
        dtype = jnp.dtype(cfg.dtype)
        make = lambda i, o, *names: dense(i, o, names, rngs=rngs, dtype=dtype)
        self.heads = cfg.heads
        self.rotary = cfg.rotary
        self.parallel = cfg.parallel
        self.activation = lookup_name(ACTIVATIONS, cfg.activation, "activation")
        self.norm_attention, self.norm_mlp = (
            layer_norm(d, rngs=rngs, eps=cfg.norm_eps, dtype=dtype) for _ in range(2)
        )
        self.to_qkv = make(d, 3 * d, "embed", "heads")  # head by head: a query, its key, its value
        self.to_out = make(d, d, "heads", "embed")
        self.up = make(d, cfg.mlp, "embed", "mlp")
        self.down = make(cfg.mlp, d, "mlp", "embed")

    def turn(self, x: Array, rotary: tuple[Array, Array]) -> Array:
        """Rotary positions on the first channels of [B T H K]."""
        return jnp.concatenate([rotate(x[..., : self.rotary], rotary), x[..., self.rotary :]], -1)

    def run(self, x: Array, rotary: tuple[Array, Array], attend):
        """Returns (the block's output [B T D], extra of `attend`, the MLP's activations [B T mlp]);
        see models/language/lm.py.
        """
        q, k, v = jnp.split(split_heads(self.to_qkv(self.norm_attention(x)), self.heads), 3, -1)
        mixed, extra = attend(self.turn(q, rotary), self.turn(k, rotary), v)
        mid = x + self.to_out(mixed.reshape(x.shape))
        neurons = self.activation(self.up(self.norm_mlp(x if self.parallel else mid)))
        return constrain(mid + self.down(neurons), "batch", "seq", None), extra, neurons

    def __call__(self, x: Array, rotary: tuple[Array, Array], attend):
        return self.run(x, rotary, attend)[:2]


class NeoXModule(LMModule):
    def __init__(self, cfg: NeoX, rngs: nnx.Rngs):
        if cfg.kv_heads or cfg.head_dim:
            raise Refused(
                f"model: kv_heads={cfg.kv_heads}, head_dim={cfg.head_dim}: NeoX has heads={cfg.heads} of dim / heads, expected 0"
            )
        if cfg.rotary % 2 or not cfg.rotary:
            raise Refused(
                f"model: {cfg.rotary} of a head's {cfg.head_size} channels turn (rotary_share={cfg.rotary_share}), not pairs"
            )
        super().__init__(cfg, rngs)
        self.norm = layer_norm(cfg.dim, rngs=rngs, eps=cfg.norm_eps, dtype=self.dtype)
