"""SiDA (arXiv:2410.14919) on a mixture whose teacher is blurred: the student passes its teacher.

    python -m launch.train --config=configs/toy/sida.py --workdir=runs/toy_sida

2 CPU cores, about 2 minutes. The teacher is that of the data with N(0, .4^2) added, five times the
modes' own width: no student of its scores alone comes nearer to the data than it. The claim: with
the GAN on real data the one-step student's energy distance to the data is at most 0.8 of that of
the teacher's own samples. `--config.method.gan_weight=0` is SiD; `--config.data.seed=N` makes
another mixture.
"""

from configs.toy.sid import FAKE, STUDENT
from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Optimizer
from jaxdistill.data.mixtures import Blurred
from jaxdistill.evals.points import PointEval
from jaxdistill.methods.distribution.sida import SiDA
from jaxdistill.models.heads import Discriminator

ABLATIONS = {"no GAN: SiD": ("method.gan_weight=0",), "alpha 1.2": ("method.alpha=1.2",)}


def get_config():
    return experiment(
        steps=4000,
        data=Blurred(seed=0, labelled=False, blur=0.4),
        method=SiDA(critic_steps=2, reverse_until=500, gan_weight=0.1, alpha=1.0),
        roles=dict(
            teacher=Role(init="exact"),
            student=STUDENT,
            fake=FAKE,
            disc=Role(
                model=Discriminator(features=1, dim=128), optimizer=Optimizer(lr=1e-3, b1=0.0)
            ),
        ),
        evaluation=PointEval(student_steps=(1,), teacher_steps=(50, 1)),
        claim=dict(
            metric="energy", model="student@1", baseline="teacher@99", better="lower", ratio=0.8
        ),
        checkpoint_every=4000,
    )
