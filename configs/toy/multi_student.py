"""MSD (arXiv:2410.23274) on a labelled mixture: four tiny students, each for two classes of four
modes, against one for all.

    python -m launch.train --config=configs/toy/multi_student.py --workdir=runs/toy_multi_student

2 CPU cores, some minutes, the single student (`baseline`) included: equal steps and samples for
each student, so that the four see four times as many in all. The claim: the mean over classes of
the energy distance to the class's data, `class_energy`, is at most 0.6 of the single student's.
Measured on seeds 0, 1, 2: .0082, .0054, .0055 against .0129, .0110, .0099, ratios of .63, .49, .56:
it holds on two of three. Samples near a mode are 63, 72, 67 % against 51, 61, 57 %. The teacher is
exact; all networks have width 24.

`:random` is a partition without neighbours; `--config.method.shares="(0.0,2.0,2.0)"` leaves score
matching out.
"""

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.core.types import lookup
from jaxdistill.data.mixtures import Mixture
from jaxdistill.diffusion.denoiser import Denoiser
from jaxdistill.diffusion.times import Uniform
from jaxdistill.evals.points import LabelledPointEval
from jaxdistill.methods.distribution.dmd import DMD
from jaxdistill.methods.distribution.dmd2 import DMD2
from jaxdistill.methods.distribution.multi_student import TSM, MultiStudent
from jaxdistill.models.denoisers.mlp import MLP
from jaxdistill.models.heads import Discriminator
from jaxdistill.objectives.partition import Consecutive, Shuffled

ABLATIONS = {
    "random partition": (":random",),
    "no score matching first": ("method.shares=(0.0,2.0,2.0)",),
}
CLASSES = 8
WIDTH = 24
SHARE = 64


def distil(cells: int, kind=Consecutive, runs=None, **rest):
    """`cells` students, each on batches of SHARE."""
    method = MultiStudent(
        partition=kind(cells=cells, classes=CLASSES),
        tsm=TSM(times=Uniform(), target="v"),
        dm=DMD(batches=100, solver_steps=16),
        adm=DMD2(gan_weight=1e-3, critic_steps=5),
        shares=(1.0, 2.0, 2.0),
    )
    return experiment(
        steps=5000,
        data=Mixture(
            batch_size=SHARE * cells,
            modes=4 * CLASSES,
            std=0.04,
            classes=CLASSES,
        ),
        method=method,
        roles=dict(
            teacher=Role(init="exact"),
            student=Role(
                model=MLP(width=WIDTH, depth=2, classes=CLASSES),
                denoiser=Denoiser(),
                init="fresh",
                bank=cells,
                optimizer=Optimizer(lr=1e-3, b1=0.0, schedule="cosine"),
                ema=Ema(rate=0.99),
            ),
            fake=Role(
                init="student", bank=cells, optimizer=Optimizer(lr=2e-3, b1=0.0)
            ),
            disc=Role(
                model=Discriminator(dim=WIDTH, width=WIDTH, classes=CLASSES),
                bank=cells,
                optimizer=Optimizer(lr=1e-3, b1=0.0),
            ),
        ),
        evaluation=LabelledPointEval(
            samples=4000,
            student_steps=(1,),
            teacher_steps=(50, 1),
        ),
        runs=runs or {},
        checkpoint_every=5000,
        **rest,
    )


def get_config(variant=""):
    return distil(
        4,
        lookup({"": Consecutive, "random": Shuffled}, variant, "variant"),
        runs=dict(baseline=distil(1)),
        claim=dict(
            metric="class_energy",
            model="student@1",
            baseline="baseline@1",
            better="lower",
            ratio=0.6,
        ),
    )
