r"""f-distill (arXiv:2502.15681) on class-conditional ImageNet-64: EDM's network into one step.

    python -m launch.train --config=configs/recipes/f_distill.py --workdir=DIR \
        --config.data.path=IMAGES --config.roles.teacher.init=TEACHER

IMAGES and TEACHER as in configs/recipes/dmd2.py, whose optimisers and noise levels these are. The
paper: Jensen-Shannon, ratios clipped to .1 to 20 and divided by their running means in ten bins of
times, each keeping half of its mean; FID 1.16 at one step (DMD2 in the same setting 1.27,
uncertain), CIFAR-10 1.92. Uncertain: batch, length and GAN weight are DMD2's. Departure: DMD2's, a
discriminator of pooled features.
"""

from configs.recipes.dmd2 import ADAMW, MATCH, TEACHER
from configs.recipes.dmd2 import RECORD as RECORD
from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Ema
from jaxdistill.data.arrayrecord import ArrayRecords
from jaxdistill.methods.distribution.f_distill import BinnedFDistill
from jaxdistill.models.heads import Discriminator
from jaxdistill.objectives.fdivergence import JensenShannon


def get_config():
    return experiment(
        steps=200_000,
        data=ArrayRecords(batch_size=288),
        method=BinnedFDistill(
            divergence=JensenShannon(), bin_rate=0.5, taps=(4,), **MATCH
        ),
        roles=dict(
            teacher=TEACHER,
            student=Role(optimizer=ADAMW, ema=Ema(rate=0.0, warmup=False)),
            fake=Role(optimizer=ADAMW),
            disc=Role(
                model=Discriminator(dim=768, width=512, classes=1000),
                optimizer=ADAMW,
            ),
        ),
        checkpoint_every=5_000,
        log_every=100,
    )
