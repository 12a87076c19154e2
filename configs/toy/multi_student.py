"""MSD (arXiv:2410.23274) on a labelled mixture: four tiny students against one.

python -m launch.train --config=configs/toy/multi_student.py --workdir=runs/toy_multi_student
"""

from jaxdistill.core.build import Role, experiment, spec
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.core.types import Refused
from jaxdistill.diffusion.denoiser import Denoiser
from jaxdistill.diffusion.times import Uniform

CLASSES, WIDTH, SHARE = 8, 24, 64


def distil(cells: int, kind="Consecutive", runs=None, **rest):
    """`cells` students, each on batches of SHARE."""
    method = spec(
        "methods.distribution.multi_student:MultiStudent",
        partition=spec(f"objectives.partition:{kind}", cells=cells, classes=CLASSES),
        tsm=spec("methods.distribution.multi_student:TSM", times=Uniform(), target="v"),
        dm=spec("methods.distribution.multi_student:DM", batches=100, solver_steps=16),
        adm=spec("methods.distribution.dmd2:DMD2", gan_weight=1e-3, critic_steps=5),
        shares=(1.0, 2.0, 2.0),
    )
    return experiment(
        steps=5000,
        data=spec("data.mixtures:Mixture", batch_size=SHARE * cells, modes=4 * CLASSES, std=0.04, classes=CLASSES),
        method=method,
        roles=dict(
            teacher=Role(init="exact"),
            student=Role(
                model=spec("models.mlp:MLP", width=WIDTH, depth=2, classes=CLASSES),
                denoiser=Denoiser(),
                init="fresh",
                bank=cells,
                optimizer=Optimizer(lr=1e-3, b1=0.0, schedule="cosine"),
                ema=Ema(rate=0.99),
            ),
            fake=Role(init="student", bank=cells, optimizer=Optimizer(lr=2e-3, b1=0.0)),
            disc=Role(
                model=spec("models.heads:Discriminator", dim=WIDTH, width=WIDTH, classes=CLASSES),
                bank=cells,
                optimizer=Optimizer(lr=1e-3, b1=0.0),
            ),
        ),
        evaluation=spec("evals.points:LabelledPointEval", samples=4000, student_steps=(1,), teacher_steps=(50, 1)),
        runs=runs or {},
        checkpoint_every=5000,
        **rest,
    )


def get_config(variant=""):
    if variant not in ("", "random"):
        raise Refused(f"variant {variant!r}: expected none or random")
    return distil(
        4,
        "Shuffled" if variant else "Consecutive",
        runs=dict(baseline=distil(1)),
        claim=dict(metric="class_energy", model="student@1", baseline="baseline@1", better="lower", ratio=0.6),
    )
