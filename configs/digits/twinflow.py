"""TwinFlow (arXiv:2512.05150) on scikit-learn's 8x8 digits, against RCGM alone, both from scratch in about the same time.

    python -m launch.train --config=configs/digits/twinflow.py --workdir=runs/digits_twinflow

2 CPU cores, minutes.
"""

from jaxdistill.core.build import Role, experiment, spec
from jaxdistill.core.optim import Optimizer, RampEma
from jaxdistill.diffusion.denoiser import Denoiser, Velocity

EVALUATION = spec("evals.images:ImageEval", student_steps=(1, 2, 4))


def student():
    return Role(
        model=spec("models.dit:DiT", second_time=True),
        denoiser=Denoiser(param=Velocity(time_scale=1000.0)),
        optimizer=Optimizer(lr=2e-3, schedule="cosine", warmup=50),
        ema=RampEma(rate=0.99),
    )


def rcgm():
    """The host alone, for as long."""
    return experiment(
        steps=800,
        data=spec("data.digits:Digits", batch_size=64),
        method=spec("methods.trajectory.rcgm:RCGM", enhance=0.0),
        roles=dict(student=student()),
        evaluation=EVALUATION,
        checkpoint_every=500,
    )


def get_config():
    return experiment(
        steps=800,
        runs=dict(rcgm=rcgm()),
        data=spec("data.digits:Digits", batch_size=64),
        method=spec("methods.trajectory.twinflow:TwinFlow", enhance=0.0),
        roles=dict(student=student()),
        evaluation=EVALUATION,
        claim=dict(metric="frechet", model="student@1", baseline="rcgm@1", better="lower", ratio=1.0),
        checkpoint_every=500,
    )
