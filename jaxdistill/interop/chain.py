"""A student's sampler as the network sees it: the chain of its evaluations, and the scheduler of
diffusers that makes the same one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.core.types import Refused
from jaxdistill.diffusion.denoiser import Noise, Velocity, VPVelocity
from jaxdistill.diffusion.process import DDPM, Flow

SCHEDULER = "scheduler/scheduler_config.json"  # where diffusers looks for one
PREDICTIONS = {
    "epsilon": Noise,
    "v_prediction": VPVelocity,
}  # by `prediction_type` of schedulers' configs


def chain(method, denoiser, steps: int) -> np.ndarray:
    """The student's chain in the network's own coordinates, float64 [steps, 6]: at each time, what
    the network is fed as its time, the scale of its input, the p and q of x0 = p x + q output, and
    the state's alpha and sigma.

    Raises Refused where `method.sample` is no chain of x0 at fixed times.
    """
    if denoiser.fold or steps < 1:
        raise Refused(f"{type(method).__name__}: its network is fed two times")
    native = denoiser.native
    one = jnp.ones(1)
    t = denoiser.own_time(method.process, method.sampling_times(steps))

    def row(t):
        scale, fed = denoiser.param.inputs(native, one, t[None])
        p, q = (
            denoiser.param.pred(native, raw, x, t[None]).x0
            for x, raw in ((one, 0 * one), (0 * one, one))
        )
        return jnp.stack([fed, scale, p, q, *native.alpha_sigma(t[None])])[:, 0]

    return np.asarray(jax.vmap(row)(t), np.float64)


def start(method, denoiser, steps: int) -> float:
    """The first state for unit noise, in the network's own coordinates: it is seen as one of the
    first time.
    """
    state = method.process.start(method.initial(jnp.ones((1, 1))))[0, 0]
    return float(state * denoiser.own_scale(method.process, method.sampling_times(steps)[0]))


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """`config` is scheduler_config.json, `times` what `set_timesteps` is called with, as Python."""

    config: dict[str, Any]
    times: str

    @property
    def name(self) -> str:
        """diffusers' class."""
        return self.config["_class_name"]

    @property
    def scales(self) -> bool:
        """Whether its states are scaled: the first by `init_noise_sigma`, the network's input by
        `scale_model_input`.
        """
        return self.name == "EulerDiscreteScheduler"


def scheduler(method, denoiser, steps: int) -> Scheduler:
    """The scheduler whose steps with the network's output are `method.sample` at `steps`
    evaluations.

    FlowMatchEulerDiscreteScheduler for velocities of rectified flow. For eps and v of DDPM,
    LCMScheduler where there is one step or fresh noise between steps, cut behind the first time, so
    that it begins there by itself (SDXL's one-step students at index 399); else
    EulerDiscreteScheduler, which is DDIM. Raises Refused where there is none.
    """
    fed, *_, sigma = chain(method, denoiser, steps).T
    param = denoiser.param
    native = denoiser.native
    kind = next((kind for kind, cls in PREDICTIONS.items() if type(param) is cls), "")
    if type(param) is Velocity and native == Flow() and param.time_scale == int(param.time_scale):
        found = _flow(
            sigma, int(param.time_scale), getattr(method.process, "shift", 1.0), method.renoises
        )
    elif kind and isinstance(native, DDPM) and param.time_scale == native.steps - 1:
        index = np.round(fed)
        fed = np.where(
            np.abs(fed - index) < 0.01, index, fed
        )  # the way through an angle rounds to .001 of an index
        found = (_renoised if method.renoises or steps == 1 else _ddim)(fed, native, kind)
    else:
        raise Refused(
            f"diffusers has no scheduler for {type(param).__name__}(time_scale={param.time_scale:g}) on {type(native).__name__}"
        )
    if not np.isclose(first := start(method, denoiser, steps), 1, rtol=1e-5):
        raise Refused(f"no scheduler of diffusers starts from noise of size {first:.7g}")
    return found


def _flow(sigma: np.ndarray, scale: int, shift: float, renoises: bool) -> Scheduler:
    """The shift is that of the method's times, so that pipelines that give even steps get these."""
    config = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": scale,
        "shift": shift,
    }
    even = sigma / (shift - (shift - 1) * sigma)
    times = (
        "num_inference_steps=1"
        if len(even) == 1 and np.isclose(even[0], 1)
        else f"sigmas={_list(even)}"
    )
    return Scheduler(config | {"stochastic_sampling": renoises}, times)


def _renoised(fed: np.ndarray, native: DDPM, kind: str) -> Scheduler:
    if (fed != np.round(fed)).any():
        raise Refused(f"LCMScheduler has whole time indices, not {_list(fed)}")
    count = int(fed[0]) + 1
    steps = len(fed)
    config = {
        "_class_name": "LCMScheduler",
        **_betas(native, kind, count),
        "original_inference_steps": count,
        "timestep_scaling": 1e6,
    }
    own = count - 1 - np.floor(np.arange(steps) * count / steps)
    return Scheduler(
        config, f"num_inference_steps={steps}" if (own == fed).all() else f"timesteps={_list(fed)}"
    )


def _ddim(fed: np.ndarray, native: DDPM, kind: str) -> Scheduler:
    """Spacing "leading" is for the first state, alone of all with unit noise; the times are given."""
    config = {
        "_class_name": "EulerDiscreteScheduler",
        **_betas(native, kind, native.steps),
        "timestep_spacing": "leading",
    }
    return Scheduler(config, f"timesteps={_list(fed)}")


def _betas(native: DDPM, kind: str, count: int) -> dict[str, Any]:
    """Of the first `count` indices."""
    ends = {"beta_start": native.beta_min, "beta_end": float(f"{native.betas[count - 1]:.12g}")}
    return {
        "num_train_timesteps": count,
        "beta_schedule": "scaled_linear" if native.scaled else "linear",
        **ends,
        "prediction_type": kind,
    }


def _list(values: np.ndarray) -> str:
    return f"[{', '.join(f'{v:.6g}' for v in values)}]"
