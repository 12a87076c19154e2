"""TwinFlow (arXiv:2512.05150) on a Gaussian mixture: RCGM with a twin flow at negative times, against RCGM alone.

    python -m launch.train --config=configs/toy/twinflow.py --workdir=runs/toy_twinflow

2 CPU cores, about 3 minutes.
"""

from jaxdistill.core.build import Role, experiment, spec
from jaxdistill.core.optim import Optimizer, RampEma
from jaxdistill.diffusion.denoiser import Denoiser

DATA = spec("data.mixtures:Mixture", seed=0, labelled=False, modes=8, radius=2.0, std=0.15)
EVALUATION = spec("evals.points:PointEval", samples=10_000, student_steps=(1, 2, 4))
STUDENT = Role(
    model=spec("models.mlp:MLP", second_time=True),
    denoiser=Denoiser(),
    optimizer=Optimizer(lr=1e-3, b2=0.99),
    ema=RampEma(rate=0.99),
)


def rcgm():
    """The host alone, for as long."""
    return experiment(
        steps=7000,
        data=DATA,
        method=spec("methods.trajectory.rcgm:RCGM", enhance=0.0),
        roles=dict(student=STUDENT),
        evaluation=EVALUATION,
        checkpoint_every=5000,
    )


def get_config():
    return experiment(
        steps=5000,
        runs=dict(rcgm=rcgm()),
        data=DATA,
        method=spec("methods.trajectory.twinflow:TwinFlow", enhance=0.0),
        roles=dict(student=STUDENT),
        evaluation=EVALUATION,
        claim=dict(metric="energy", model="student@1", baseline="rcgm@1", better="lower", ratio=0.8),
        checkpoint_every=5000,
    )
