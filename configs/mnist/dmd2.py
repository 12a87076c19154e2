"""DMD2 (arXiv:2405.14867) on MNIST, from the standard IDX files in --config.data.path: 50 steps
into one.

    python -m launch.train --config=configs/mnist/dmd2.py --workdir=runs/mnist_dmd2 \\
        --config.data.path=DIR

24 minutes on 2 CPU cores; trains the teacher first, in workdir/teacher. Fréchet distances are in
the features of a small classifier of the training images (evals/classifier.py). Seed 0: student
5.56 at 1 step, teacher 2.36 at 50 and 31.3 at 1.
"""

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.data.idx import IDX
from jaxdistill.diffusion.denoiser import Denoiser, Velocity
from jaxdistill.evals.images import ImageEval
from jaxdistill.methods.distribution.dmd2 import DMD2
from jaxdistill.methods.trajectory.flow_matching import FlowMatching
from jaxdistill.models.denoisers.dit import DiT
from jaxdistill.models.heads import Discriminator

EVALUATION = dict(samples=2000, batch=250)


def teacher():
    return experiment(
        steps=3000,
        data=IDX(batch_size=64),
        method=FlowMatching(),
        roles=dict(
            student=Role(
                model=DiT(size=28, patch=4, dim=96, depth=4, heads=4),
                denoiser=Denoiser(param=Velocity(time_scale=1000.0)),
                optimizer=Optimizer(lr=2e-3, schedule="cosine", warmup=50),
                ema=Ema(rate=0.998),
            ),
        ),
        evaluation=ImageEval(student_steps=(50, 1), **EVALUATION),
    )


def get_config():
    return experiment(
        steps=1500,
        runs=dict(teacher=teacher()),
        data=IDX(batch_size=32),
        method=DMD2(guidance=1.5, gan_weight=3e-2, taps=(1,)),
        roles=dict(
            teacher=Role(init="@teacher"),
            student=Role(
                optimizer=Optimizer(lr=2e-4, b1=0.0, b2=0.99, warmup=20),
                ema=Ema(rate=0.98),
            ),
            fake=Role(optimizer=Optimizer(lr=4e-4, b1=0.0, b2=0.99, warmup=20)),
            disc=Role(
                model=Discriminator(dim=96, classes=10),
                optimizer=Optimizer(lr=1e-3, b1=0.0, b2=0.99),
            ),
        ),
        evaluation=ImageEval(
            student_steps=(1,), teacher_steps=(50, 1), **EVALUATION
        ),
        claim=dict(
            metric="frechet",
            model="student@1",
            baseline="teacher@1",
            better="lower",
            ratio=0.4,
        ),
    )
