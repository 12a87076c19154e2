"""DMD2 (arXiv:2405.14867) on class-conditional ImageNet-64: EDM's network into one step.

    python -m launch.train --config=configs/recipes/dmd2.py --workdir=DIR \\
        --config.data.path=IMAGES --config.roles.teacher.init=TEACHER

TEACHER is EDM's edm-imagenet-64x64-cond-adm, converted as interop/families/edm.py says; IMAGES is a
folder of *.arrayrecord with x float32 [64, 64, 3] in [-1, 1], cond and null_cond (= 1000). The
paper's constants: batch 280 (288 here, for meshes of 32), AdamW 2e-6 with decay 0.01 on both sides,
gradient norm 10, five critic updates to one of the student, GAN weight 3e-3, discriminator weight
1e-2, EDM weights of the fake score's error, times in [.02, .98] of Karras' grid. Steps are the
critics': 200 k for FID 1.51 at one step; 1.28 after 405 k without the GAN (2.61) and 140 k with it
at rate 5e-7.
Departure: the discriminator sees pooled features, at the gradient's times, where the code has
convolutions and all times.
"""

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.data.arrayrecord import ArrayRecords
from jaxdistill.diffusion.denoiser import Denoiser, EDMPrecond
from jaxdistill.diffusion.process import EDM
from jaxdistill.diffusion.times import Karras
from jaxdistill.methods.distribution.dmd2 import DMD2
from jaxdistill.models.denoisers.edm import DhariwalUNet
from jaxdistill.models.heads import Discriminator

RECORD = {
    "x": "normal 64 64 3",
    "cond": "integers 1000",
    "null_cond": "constant 1000",
}
ADM = dict(
    size=64,
    width=192,
    multiples=(1, 2, 3, 4),
    blocks=3,
    attention=(32, 16, 8),
    head_dim=64,
    classes=1000,
    dtype="bfloat16",
    remat="full",
)
TEACHER = Role(
    model=DhariwalUNet(**ADM),
    denoiser=Denoiser(param=EDMPrecond(), native=EDM()),
    param_dtype="bfloat16",
)
ADAMW = Optimizer(lr=2e-6, weight_decay=0.01, clip=10.0)
MATCH = dict(
    process=EDM(),
    student_times=(80.0,),
    match_times=Karras(low=0.02, high=0.98),
    fake_times=Karras(),
    fake_target="edm",
)


def get_config():
    return experiment(
        steps=200_000,
        data=ArrayRecords(batch_size=288),
        method=DMD2(taps=(4,), **MATCH),
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
