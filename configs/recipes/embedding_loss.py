r"""Embedding loss (arXiv:2604.22379) beside a SiDA-like host on class-conditional CIFAR-10, on EDM's DDPM++.

    python -m launch.train --config=configs/recipes/embedding_loss.py --workdir=DIR --config.data.path=CIFAR10 \
        --config.roles.teacher.init=TEACHER

CIFAR10 and TEACHER as in configs/recipes/uni_instruct.py, whose reverse KL is the host (score identity with a GAN). The paper:
FID 1.380 at one step with its best distribution-matching host, 1.475 unconditional, in up to 80 % fewer iterations. Its
networks, weight and batch sizes are not published: two random networks a step from the pool below, weight .3 of the host's
gradient, two real samples per generated one, labels inside the networks. Batch 256 (512 real), Adam 1e-5. Departures: as there.
"""

import dataclasses

from configs.recipes.uni_instruct import NET
from jaxdistill.core.build import Role, experiment, spec
from jaxdistill.core.optim import HalfLifeEma, Optimizer
from jaxdistill.diffusion.denoiser import Denoiser, EDMPrecond
from jaxdistill.diffusion.process import EDM


def get_config():
    optimizer = Optimizer(algorithm="adam", lr=1e-5, b1=0.0, b2=0.999, clip=0.0)
    critic = dataclasses.replace(optimizer, clip_value=1.0)
    denoiser = Denoiser(param=EDMPrecond(), native=EDM())
    host = spec("methods.distribution.uni_instruct:UniInstruct", divergence="reverse_kl", taps=(2,))
    return experiment(
        steps=400_000,
        data=spec("data.images:ParquetImages", batch_size=512, flip=True),
        method=spec("methods.distribution.embedding_loss:EmbeddingLoss", host=host, real_per_fake=2, labelled=True),
        roles=dict(
            teacher=Role(model=spec("models.edm:SongUNet", **NET), denoiser=denoiser, param_dtype="bfloat16"),
            student=Role(optimizer=optimizer, ema=HalfLifeEma(half_life=500_000.0, batch=256, ramp=0.05)),
            fake=Role(optimizer=critic),
            disc=Role(model=spec("models.heads:Discriminator", dim=256, width=256, classes=10), optimizer=critic),
        ),
        checkpoint_every=5_000,
        log_every=100,
    )
