r"""SiD (arXiv:2404.04057), class-conditional CIFAR-10 on EDM's DDPM++.

    python -m launch.train --config=configs/recipes/sid.py --workdir=DIR \
        --config.data.path=CIFAR10 --config.roles.teacher.init=TEACHER

Variant: `:imagenet64` is class-conditional ImageNet-64 on EDM's ADM, its files as in
configs/recipes/dmd2.py. CIFAR10 and TEACHER as in configs/recipes/uni_instruct.py; of the data the
labels are read. The released constants: alpha 1.2, sigma_init 2.5, tmax 800, one update each by
turns, Adam (betas 0, .999) of 1e-5 at batch 256, of 4e-6 at batch 8192 for ImageNet, averages of
half-life 500 k and 2 M images. FID at one step 1.71 (CIFAR-10, conditional) and 1.52 (ImageNet-64);
with alpha 1 1.93 and 2.02. The lengths are those of the released script, 100 M images, which says
that the reported results take more.

Departures: no dropout (.13; ImageNet .1) and no augmentation (.12; none) of the fake score; its
loss is a sum over dimensions, here a mean: Adam's eps of 1e-8 is as many times smaller, which makes
its steps equal. ImageNet runs in bfloat16, in the code in float16.
"""

import dataclasses

from configs.recipes import dmd2, uni_instruct
from configs.recipes.diff_instruct import MEANS
from configs.recipes.uni_instruct import ADAM
from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import HalfLifeEma
from jaxdistill.core.types import lookup
from jaxdistill.data.arrayrecord import ArrayRecords
from jaxdistill.data.images import ParquetImages
from jaxdistill.methods.distribution.sid import SiD

IMAGES = 100_000_000  # of the student


def distil(method, batch, average, teacher, data, student, fake):
    """One step by a method that needs no data but its conditions."""
    ema = HalfLifeEma(half_life=average, batch=batch, ramp=0.05)
    return experiment(
        steps=IMAGES // batch,
        data=data,
        method=method,
        roles=dict(
            teacher=teacher,
            student=Role(optimizer=student, ema=ema),
            fake=Role(optimizer=fake),
        ),
        checkpoint_every=5_000,
        log_every=100,
    )


def cifar10(method):
    data = ParquetImages(batch_size=256)
    return distil(method, 256, 500_000.0, uni_instruct.TEACHER, data, ADAM, MEANS)


def imagenet64(method):
    student = dataclasses.replace(ADAM, lr=4e-6)
    fake = dataclasses.replace(student, eps=1e-8 / (64 * 64 * 3))
    data = ArrayRecords(batch_size=8192)
    return distil(method, 8192, 2_000_000.0, dmd2.TEACHER, data, student, fake)


def get_config(variant=""):
    return lookup({"": cifar10, "imagenet64": imagenet64}, variant, "variant")(
        SiD()
    )
