r"""Uni-Instruct (arXiv:2505.20755), its class-conditional CIFAR-10 recipe, on a pixel-space DiT in place of EDM's DDPM++.

    python -m launch.train --config=configs/recipes/uni_instruct.py --workdir=DIR --config.data.path=CIFAR10 \
        --config.roles.teacher.init=TEACHER

CIFAR10 is a folder of Hugging Face's parquet files; TEACHER is a run that trained the network below by EDM's loss. The paper:
batch 256, Adam 1e-5 (betas 0, .999) on both sides, one critic update to one of the student, 100k images for the critics
alone, 100k of reverse KL, then the divergence, 300 M images; FID 1.42 at one step with JKL (.4 forward, .6 reverse), 1.44 with
reverse KL, and 1.38 with forward KL after longer training. Departures: backbone, gradients clipped by norm rather than by
value, no dropout (.13) and no augmentation of the critics' batches (.12).
"""

from jaxdistill.core.build import Role, experiment, spec
from jaxdistill.core.optim import HalfLifeEma, Optimizer
from jaxdistill.diffusion.denoiser import Denoiser, EDMPrecond
from jaxdistill.diffusion.process import EDM

NET = dict(size=32, patch=2, channels=3, dim=512, depth=12, heads=8, classes=10, dtype="bfloat16")


def get_config():
    optimizer = Optimizer(algorithm="adam", lr=1e-5, b1=0.0, b2=0.999)
    denoiser = Denoiser(param=EDMPrecond(), native=EDM())
    return experiment(
        steps=1_171_875,
        data=spec("data.images:ParquetImages", batch_size=256, flip=True),
        method=spec("methods.distribution.uni_instruct:UniInstruct", divergence="jkl", taps=(5,)),
        roles=dict(
            teacher=Role(model=spec("models.dit:DiT", **NET), denoiser=denoiser, param_dtype="bfloat16"),
            student=Role(optimizer=optimizer, ema=HalfLifeEma(half_life=500_000.0, batch=256, ramp=0.05)),
            fake=Role(optimizer=optimizer),
            disc=Role(model=spec("models.heads:Discriminator", dim=512, width=256, classes=10), optimizer=optimizer),
        ),
        checkpoint_every=5_000,
        log_every=100,
    )
