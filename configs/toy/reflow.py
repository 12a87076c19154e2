"""Rectified flow (arXiv:2209.03003) on a Gaussian mixture: one round of pairs from an exact
teacher, from scratch.

    python -m launch.train --config=configs/toy/reflow.py --workdir=runs/toy_reflow

2 CPU cores, under 2 minutes. The claim: at one step the student's energy distance is at most a
tenth of the teacher's at one step. `--config.data.seed=N` makes another mixture.
"""

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.data.mixtures import Mixture
from jaxdistill.diffusion.denoiser import Denoiser
from jaxdistill.evals.points import PointEval
from jaxdistill.methods.trajectory.reflow import Reflow
from jaxdistill.models.denoisers.mlp import MLP


def get_config():
    return experiment(
        steps=6000,
        data=Mixture(seed=0, labelled=False),
        method=Reflow(batches=100, solver_steps=25),
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
        evaluation=PointEval(student_steps=(1, 2), teacher_steps=(50, 2, 1)),
        claim=dict(
            metric="energy",
            model="student@1",
            baseline="teacher@1",
            better="lower",
            ratio=0.1,
        ),
        checkpoint_every=2000,
    )
