"""sCM (arXiv:2410.11081) on a Gaussian mixture, distilled from its exact velocity, from scratch.

    python -m launch.train --config=configs/toy/scm.py --workdir=runs/toy_scm

2 CPU cores, under 2 minutes. The claim: at one step the student's energy distance is at most a
tenth of the teacher's at one step. The student is a flow network, read in the trigonometric
process. The weight is slow: an exact teacher leaves next to no error at small t, which a fast one
would blow up. `--config.data.seed=N` makes another mixture.
"""

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.data.mixtures import Mixture
from jaxdistill.diffusion.denoiser import Denoiser
from jaxdistill.evals.points import PointEval
from jaxdistill.methods.trajectory.scm import SCM
from jaxdistill.models.denoisers.mlp import MLP
from jaxdistill.models.heads import TimeWeight


def get_config():
    return experiment(
        steps=6000,
        data=Mixture(seed=0, labelled=False),
        method=SCM(tangent_warmup=1000),
        roles=dict(
            teacher=Role(init="exact"),
            student=Role(
                model=MLP(),
                denoiser=Denoiser(),
                init="fresh",
                optimizer=Optimizer(lr=1e-3, b2=0.99, schedule="cosine"),
                ema=Ema(rate=0.995),
            ),
            weight=Role(model=TimeWeight(), optimizer=Optimizer(lr=1e-4, b2=0.99)),
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
