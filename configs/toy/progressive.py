"""Progressive distillation (arXiv:2202.00512) on a Gaussian mixture: an exact teacher of 32 steps,
halved five times.

    python -m launch.train --config=configs/toy/progressive.py --workdir=runs/toy_progressive

2 CPU cores, under 2 minutes. The claim: at one step the student's energy distance is at most a
tenth of the teacher's at one step. `--config.data.seed=N` makes another mixture.
"""

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.data.mixtures import Mixture
from jaxdistill.diffusion.denoiser import Denoiser
from jaxdistill.evals.points import PointEval
from jaxdistill.methods.trajectory.progressive import Progressive
from jaxdistill.models.denoisers.mlp import MLP


def get_config():
    return experiment(
        steps=6000,
        data=Mixture(seed=0, labelled=False),
        method=Progressive(teacher_steps=32),
        roles=dict(
            teacher=Role(init="exact"),
            student=Role(
                model=MLP(),
                denoiser=Denoiser(),
                init="fresh",
                optimizer=Optimizer(lr=1e-3, b2=0.99, schedule="cosine"),
                ema=Ema(rate=0.995),
            ),
        ),
        evaluation=PointEval(
            student_steps=(1,), teacher_steps=(32, 1), solver="ddim"
        ),
        claim=dict(
            metric="energy",
            model="student@1",
            baseline="teacher@1",
            better="lower",
            ratio=0.1,
        ),
        checkpoint_every=2000,
    )
