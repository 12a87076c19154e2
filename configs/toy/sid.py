"""SiD (arXiv:2404.04057) on a Gaussian mixture with an exact teacher: one step close to the
distribution, without data.

    python -m launch.train --config=configs/toy/sid.py --workdir=runs/toy_sid

2 CPU cores, about a minute. The claim: at one step the student's energy distance is at most a tenth
of the teacher's at one step. Measured on seeds 0, 1, 2 (seed and data.seed): .0094, .0175, .0131
against .434, .469, .414; on seed 10 .0081 against .444. `--config.method.alpha=0.5` is half the
exact gradient of the Fisher divergence; `--config.data.seed=N` makes another mixture.
"""

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.data.mixtures import Mixture
from jaxdistill.diffusion.denoiser import Denoiser, EDMPrecond
from jaxdistill.diffusion.process import EDM
from jaxdistill.evals.points import PointEval
from jaxdistill.methods.distribution.sid import SiD
from jaxdistill.models.denoisers.mlp import MLP

ABLATIONS = {
    "exact gradient: alpha 0.5": ("method.alpha=0.5",),
    "alpha 1": ("method.alpha=1.0",),
}
NET = dict(
    model=MLP(), denoiser=Denoiser(param=EDMPrecond(), native=EDM()), init="fresh"
)
STUDENT = Role(
    **NET,
    optimizer=Optimizer(lr=5e-4, b1=0.0, schedule="cosine"),
    ema=Ema(rate=0.99),
)
FAKE = Role(**NET, optimizer=Optimizer(lr=1e-3, b1=0.0))


def distil(method, **rest):
    """One step, from scratch, by a method that needs no data."""
    return experiment(
        steps=4000,
        data=Mixture(seed=0, labelled=False),
        method=method,
        roles=dict(teacher=Role(init="exact"), student=STUDENT, fake=FAKE),
        evaluation=PointEval(student_steps=(1,), teacher_steps=(50, 1)),
        claim=dict(
            metric="energy",
            model="student@1",
            baseline="teacher@1",
            better="lower",
            ratio=0.1,
        ),
        checkpoint_every=4000,
        **rest,
    )


def get_config():
    return distil(SiD(critic_steps=2))
