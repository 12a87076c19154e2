"""A student's sampler in the coordinates of its network: the chain of its evaluations, and the
scheduler of diffusers that takes the same steps.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.core.types import Refused
from jaxdistill.diffusion.denoiser import Denoiser, Noise, Velocity, VPVelocity
from jaxdistill.diffusion.process import DDPM, Flow

SCHEDULER = "scheduler/scheduler_config.json"  # where diffusers looks for a scheduler's config
# `prediction_type` of schedulers' configs -> the prediction
PREDICTIONS = {"epsilon": Noise, "v_prediction": VPVelocity}


def chain(method: Any, denoiser: Denoiser, steps: int) -> np.ndarray:
    """The student's chain in the network's own coordinates.

    Returns:
        float64 [steps, 6], for each time: the network's input of time, the scale of its input, the
        p and q of x0 = p x + q output, and alpha and sigma of the state.

    Raises:
        Refused: `method.sample` is no chain of x0 at fixed times.
    """
    if denoiser.fold or steps < 1:
        raise Refused(f"{type(method).__name__}: its network is fed two times")
    native = denoiser.native
    one = jnp.ones(1)
    zero = 0 * one
    times = denoiser.own_time(method.process, method.sampling_times(steps))

    def row(t):
        t = t[None]
        scale, time_input = denoiser.param.inputs(native, one, t)
        p = denoiser.param.pred(native, zero, one, t).x0
        q = denoiser.param.pred(native, one, zero, t).x0
        alpha, sigma = native.alpha_sigma(t)
        return jnp.stack([time_input, scale, p, q, alpha, sigma])[:, 0]

    return np.asarray(jax.vmap(row)(times), np.float64)


def start(method: Any, denoiser: Denoiser, steps: int) -> float:
    """The first state for unit noise, in the network's own coordinates at the first time."""
    state = method.process.start(method.initial(jnp.ones((1, 1))))[0, 0]
    return float(
        state * denoiser.own_scale(method.process, method.sampling_times(steps)[0])
    )


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """A scheduler of diffusers."""

    config: dict[str, Any]  # the content of scheduler_config.json
    times: str  # the arguments of `set_timesteps`, as Python

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


def scheduler(method: Any, denoiser: Denoiser, steps: int) -> Scheduler:
    """The scheduler whose steps with the network's output are those of `method.sample` at `steps`
    evaluations.

    For velocities of rectified flow it is FlowMatchEulerDiscreteScheduler. For eps and v of DDPM it
    is LCMScheduler where there is one step or fresh noise between steps; its indices end at the
    first time, so that it begins there by itself (SDXL's one-step students at index 399). Otherwise
    it is EulerDiscreteScheduler, which is DDIM. Raises Refused where there is none.
    """
    steps_of_chain = chain(method, denoiser, steps)
    time_input = steps_of_chain[:, 0]
    sigma = steps_of_chain[:, -1]
    param = denoiser.param
    native = denoiser.native
    kinds = [
        kind
        for kind, prediction in PREDICTIONS.items()
        if type(param) is prediction
    ]
    is_flow = type(param) is Velocity and native == Flow()
    if is_flow and param.time_scale == int(param.time_scale):
        shift = getattr(method.process, "shift", 1.0)
        found = _flow(sigma, int(param.time_scale), shift, method.renoises)
    elif (
        kinds and isinstance(native, DDPM) and param.time_scale == native.steps - 1
    ):
        # the conversion of times by an angle is exact to .001 of an index
        index = np.round(time_input)
        time_input = np.where(np.abs(time_input - index) < 0.01, index, time_input)
        make = _renoised if method.renoises or steps == 1 else _ddim
        found = make(time_input, native, kinds[0])
    else:
        raise Refused(
            f"diffusers has no scheduler for {type(param).__name__}"
            f"(time_scale={param.time_scale:g}) on {type(native).__name__}"
        )
    first = start(method, denoiser, steps)
    if not np.isclose(first, 1, rtol=1e-5):
        raise Refused(
            f"no scheduler of diffusers starts from noise of size {first:.7g}"
        )
    return found


def _flow(sigma: np.ndarray, scale: int, shift: float, renoises: bool) -> Scheduler:
    """The scheduler of rectified flow. It has the shift of the method's times, so that pipelines
    that give even steps get these times.
    """
    even = sigma / (shift - (shift - 1) * sigma)
    if len(even) == 1 and np.isclose(even[0], 1):
        times = "num_inference_steps=1"
    else:
        times = f"sigmas={_list(even)}"
    config = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": scale,
        "shift": shift,
        "stochastic_sampling": renoises,
    }
    return Scheduler(config, times)


def _renoised(indices: np.ndarray, native: DDPM, kind: str) -> Scheduler:
    """The scheduler with fresh noise between steps. Raises Refused where an index is no integer."""
    if (indices != np.round(indices)).any():
        raise Refused(f"LCMScheduler has whole time indices, not {_list(indices)}")
    count = int(indices[0]) + 1
    steps = len(indices)
    config = {
        "_class_name": "LCMScheduler",
        **_betas(native, kind, count),
        "original_inference_steps": count,
        "timestep_scaling": 1e6,
    }
    own = count - 1 - np.floor(np.arange(steps) * count / steps)
    if (own == indices).all():
        return Scheduler(config, f"num_inference_steps={steps}")
    return Scheduler(config, f"timesteps={_list(indices)}")


def _ddim(indices: np.ndarray, native: DDPM, kind: str) -> Scheduler:
    """The scheduler without fresh noise.

    The times are given. The spacing "leading" is for the first state: with any other, the scheduler
    does not begin with unit noise.
    """
    config = {
        "_class_name": "EulerDiscreteScheduler",
        **_betas(native, kind, native.steps),
        "timestep_spacing": "leading",
    }
    return Scheduler(config, f"timesteps={_list(indices)}")


def _betas(native: DDPM, kind: str, count: int) -> dict[str, Any]:
    """The keys that say process and prediction, of a schedule of the first `count` indices."""
    return {
        "num_train_timesteps": count,
        "beta_schedule": "scaled_linear" if native.scaled else "linear",
        "beta_start": native.beta_min,
        "beta_end": float(f"{native.betas[count - 1]:.12g}"),
        "prediction_type": kind,
    }


def _list(values: np.ndarray) -> str:
    """Numbers as a list in Python."""
    return f"[{', '.join(f'{v:.6g}' for v in values)}]"
