"""Policy gradients on groups of responses: advantages, clipped ratios, estimators of a KL.

q is the policy that is trained, `old` the one that wrote the tokens, p a teacher or a reference;
each is given by its log-probabilities of the tokens that were written. There is one value for each
token or sample; `objectives.divergence.sequence_mean` reduces over tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxdistill.core.types import Array


def group_advantages(
    reward: Float[Array, " B"], group: int, *, eps: float = 1e-6, ddof: int = 0
) -> Float[Array, " B"]:
    """(r - mean) / (std + eps) within each `group` successive rewards (GRPO, arXiv:2402.03300).

    std^2 is the sum of squares over group - ddof. The paper leaves ddof open: 0 gives the deviation
    of the population, 1 that of a sample; TRL has ddof 1 and eps 1e-4. The result is exactly 0
    where all rewards of a group are equal, since they are measured from the first one of the group.
    """
    r = reward.reshape(-1, group)
    r = r - r[:, :1]
    r = r - jnp.mean(r, 1, keepdims=True)
    if ddof == 0:
        variance = jnp.mean(r**2, 1, keepdims=True)
    else:
        variance = jnp.sum(r**2, 1, keepdims=True) / (group - ddof)
    return (r / (jnp.sqrt(variance) + eps)).reshape(reward.shape)


def clipped_surrogate(
    log_ratio: Float[Array, "*B"],
    advantage: Float[Array, "*A"],
    low: float,
    high: float,
) -> Float[Array, "*B"]:
    """-min(r A, clip(r, 1 - low, 1 + high) A) with r = exp(log_ratio) (PPO, arXiv:1707.06347).

    It has no gradient where A > 0 and r > 1 + high, where A < 0 and r < 1 - low, and where A = 0.
    """
    ratio = jnp.exp(log_ratio)
    return -jnp.minimum(
        ratio * advantage, jnp.clip(ratio, 1 - low, 1 + high) * advantage
    )


def k1(log_p: Float[Array, "*B"], log_q: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """log q / p: unbiased for KL(q || p) on tokens of q, with a gradient of mean 0."""
    return log_q - log_p


def k2(log_p: Float[Array, "*B"], log_q: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """(log q / p)^2 / 2: biased, but on tokens of q its mean gradient is that of KL(q || p)."""
    return 0.5 * (log_q - log_p) ** 2


def k3(log_p: Float[Array, "*B"], log_q: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """p / q - 1 - log p / q >= 0: unbiased for KL(q || p) on tokens of q.

    Its mean gradient is that of KL(p || q).
    """
    return jnp.exp(log_p - log_q) - 1 - (log_p - log_q)


KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def clamp(x: Float[Array, "*B"], limit: float) -> Float[Array, "*B"]:
    """`x` clipped to [-limit, limit], without gradient outside."""
    return jnp.clip(x, -limit, limit)


def straight_through_clamp(
    x: Float[Array, "*B"], limit: float
) -> Float[Array, "*B"]:
    """`x` clipped to [-limit, limit], with the gradient of `x` everywhere."""
    return x + jax.lax.stop_gradient(jnp.clip(x, -limit, limit) - x)


CLAMPS = {"literal": clamp, "straight_through": straight_through_clamp}
