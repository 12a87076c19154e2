"""DMD2 (arXiv:2405.14867) on a Gaussian mixture with an exact teacher: one step close to the law,
from scratch.

    python -m launch.train --config=configs/toy/dmd2.py --workdir=runs/toy_dmd2

2 CPU cores, under 2 minutes. The claim: at one step the student's energy distance is at most a
tenth of the teacher's at one step. `--config.data.seed=N` makes another mixture;
`--config.method.gan_weight=0` leaves the GAN out.
"""

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.data.mixtures import Mixture
from jaxdistill.diffusion.denoiser import Denoiser
from jaxdistill.evals.points import PointEval
from jaxdistill.methods.distribution.dmd2 import DMD2
from jaxdistill.models.denoisers.mlp import MLP
from jaxdistill.models.heads import Discriminator


def get_config():
    return experiment(
        steps=4000,
        data=Mixture(seed=0, labelled=False),
        method=DMD2(gan_weight=1e-3),
        roles=dict(
            teacher=Role(init="exact"),
            student=Role(
                model=MLP(),
                denoiser=Denoiser(),
                init="fresh",
                optimizer=Optimizer(lr=5e-4, b1=0.0, schedule="cosine"),
                ema=Ema(rate=0.99),
            ),
            fake=Role(
                model=MLP(),
                denoiser=Denoiser(),
                init="fresh",
                optimizer=Optimizer(lr=1e-3, b1=0.0),
            ),
            disc=Role(
                model=Discriminator(taps=1, dim=128),
                optimizer=Optimizer(lr=1e-3, b1=0.0),
            ),
        ),
        evaluation=PointEval(student_steps=(1,), teacher_steps=(50, 1)),
        claim=dict(
            metric="energy",
            model="student@1",
            baseline="teacher@1",
            better="lower",
            ratio=0.1,
        ),
        checkpoint_every=1000,
    )
