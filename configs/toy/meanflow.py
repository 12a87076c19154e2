"""MeanFlow (arXiv:2505.13447) on a Gaussian mixture, distilled from its exact velocity, from
scratch.

    python -m launch.train --config=configs/toy/meanflow.py --workdir=runs/toy_meanflow

2 CPU cores, under 2 minutes. The claim: at one step the student's energy distance is at most a
tenth of the teacher's at one step. `--config.data.seed=N` makes another mixture.
"""

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.data.mixtures import Mixture
from jaxdistill.diffusion.denoiser import Denoiser
from jaxdistill.evals.points import PointEval
from jaxdistill.methods.trajectory.meanflow import MeanFlowDistillation
from jaxdistill.models.denoisers.mlp import MLP


def get_config():
    return experiment(
        steps=6000,
        data=Mixture(seed=0, labelled=False),
        method=MeanFlowDistillation(flow_share=0.5),
        roles=dict(
            teacher=Role(init="exact"),
            student=Role(
                model=MLP(second_time=True),
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
