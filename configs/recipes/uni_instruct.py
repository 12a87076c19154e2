r"""Uni-Instruct (arXiv:2505.20755), its class-conditional CIFAR-10 recipe on EDM's DDPM++.

    python -m launch.train --config=configs/recipes/uni_instruct.py --workdir=DIR \
        --config.data.path=CIFAR10 \
        --config.roles.teacher.init=TEACHER

CIFAR10 is a folder of Hugging Face's parquet files; TEACHER is EDM's edm-cifar10-32x32-cond-vp,
converted as interop/families/edm.py says. The paper: batch 256, Adam 1e-5 (betas 0, .999) on both
sides, one critic update to one of the student, 100k images for the critics alone, 100k of reverse
KL, then the divergence, 300 M images; FID 1.42 at one step with JKL (.4 forward, .6 reverse), 1.44
with reverse KL, and 1.38 with forward KL after longer training. The critics' gradients are clipped
by value.
Departures: no dropout (.13) and no augmentation of the critics' batches (.12).
"""

import dataclasses

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import HalfLifeEma, Optimizer
from jaxdistill.data.images import ParquetImages
from jaxdistill.diffusion.denoiser import Denoiser, EDMPrecond
from jaxdistill.diffusion.process import EDM
from jaxdistill.methods.distribution.uni_instruct import UniInstruct
from jaxdistill.models.denoisers.edm import SongUNet
from jaxdistill.models.heads import Discriminator
from jaxdistill.objectives.fdivergence import Jeffreys

NET = dict(
    size=32,
    width=128,
    multiples=(2, 2, 2),
    blocks=4,
    attention=(16,),
    augment_dim=9,
    classes=10,
    dtype="bfloat16",
)
TEACHER = Role(
    model=SongUNet(**NET),
    denoiser=Denoiser(param=EDMPrecond(), native=EDM()),
    param_dtype="bfloat16",
)
ADAM = Optimizer(algorithm="adam", lr=1e-5, b1=0.0, b2=0.999, clip=0.0)


def roles():
    critic = dataclasses.replace(ADAM, clip_value=1.0)
    return dict(
        teacher=TEACHER,
        student=Role(
            optimizer=ADAM,
            ema=HalfLifeEma(half_life=500_000.0, batch=256, ramp=0.05),
        ),
        fake=Role(optimizer=critic),
        disc=Role(
            model=Discriminator(dim=256, width=256, classes=10),
            optimizer=critic,
        ),
    )


def get_config():
    return experiment(
        steps=1_171_875,
        data=ParquetImages(batch_size=256, flip=True),
        method=UniInstruct(
            divergence=Jeffreys(forward=0.4, reverse=0.6), taps=(2,)
        ),
        roles=roles(),
        checkpoint_every=5_000,
        log_every=100,
    )
