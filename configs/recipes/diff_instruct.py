r"""Diff-Instruct (arXiv:2305.18455), class-conditional CIFAR-10 on EDM's DDPM++.

    python -m launch.train --config=configs/recipes/diff_instruct.py --workdir=DIR \
        --config.data.path=CIFAR10 \
        --config.roles.teacher.init=TEACHER

CIFAR10 and TEACHER as in configs/recipes/uni_instruct.py; of the data the labels are read. The
released constants: batch 128, Adam 1e-5 (betas 0, .999) on both sides, one update each by turns,
noise levels of EDM's law for both, a student that is told sigma = 1, 200 M images, an average of
half-life 500 k images; FID 4.53 at one step without labels. Departures: no dropout (.13) and no
augmentation (.12) of the fake score. Its losses are sums over the 3072 dimensions, here means:
Adam's eps of 1e-8 is as many times smaller, which makes its steps equal.
"""

import dataclasses

from configs.recipes.uni_instruct import ADAM, TEACHER
from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import HalfLifeEma
from jaxdistill.data.images import ParquetImages
from jaxdistill.methods.distribution.diff_instruct import EDMDiffInstruct

MEANS = dataclasses.replace(ADAM, eps=1e-8 / (32 * 32 * 3))


def get_config():
    return experiment(
        steps=1_562_500,
        data=ParquetImages(batch_size=128),
        method=EDMDiffInstruct(),
        roles=dict(
            teacher=TEACHER,
            student=Role(
                optimizer=MEANS,
                ema=HalfLifeEma(half_life=500_000.0, batch=128, ramp=0.05),
            ),
            fake=Role(optimizer=MEANS),
        ),
        checkpoint_every=5_000,
        log_every=100,
    )
