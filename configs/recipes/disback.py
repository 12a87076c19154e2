"""DisBack (arXiv:2408.15991) of Stable Diffusion XL at 1024 pixels into one step.

    python -m launch.train --config=configs/recipes/disback.py --workdir=DIR \\
        --config.data.path=RECORDS \\
        --config.roles.teacher.init=SDXL/unet

SDXL and RECORDS are those of configs/recipes/flash_dmd.py, without `image`; x is read, by the
discriminator. To start from a one-step student, as the released script does:
`--config.roles.student.init=RUN`, a run of configs/recipes/dmd2.py's kind on this network. The
released constants: ten checkpoints 100 updates of the fake score apart, 1000 updates for each on
the way back, five to one of the student, AdamW 5e-7 with decay 0.01, gradient norm 10, guidance 8
of the real score, GAN weights 5e-3 and 1e-2, the student's noise conditioned on t = 399. Steps, and
with them any figure, are not stated for SDXL; the paper's are ImageNet-64: FID 1.38 at one step.
`--config.method.guided_targets=1` guides the original teacher alone.

The path holds eleven networks in float32 (113 GB over all chips) and no moments. Departures: t is
drawn in [.02, .98] as a continuous time; arithmetic is bfloat16, not half precision; features for
the discriminator are the bottleneck's, pooled.
"""

from configs.recipes.flash_dmd import PROCESS, SDXL
from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.data.arrayrecord import GroupedRecords
from jaxdistill.diffusion.denoiser import Denoiser, Noise
from jaxdistill.methods.distribution.disback import DisBack
from jaxdistill.models.denoisers.unet import UNet
from jaxdistill.models.heads import Discriminator


def get_config():
    optimizer = Optimizer(lr=5e-7, weight_decay=0.01, clip=10.0)
    method = DisBack(
        process=PROCESS,
        student_times=(399 / 999,),
        fake_target="eps",
        guidance=8.0,
        taps=(3,),
    )
    return experiment(
        steps=50_000,
        data=GroupedRecords(batch_size=64),
        method=method,
        roles=dict(
            teacher=Role(
                model=UNet(**SDXL),
                denoiser=Denoiser(param=Noise(time_scale=999.0), native=PROCESS),
                param_dtype="bfloat16",
            ),
            path=Role(init="teacher", bank=11),
            student=Role(
                optimizer=optimizer, ema=Ema(rate=0.0, warmup=False)
            ),  # the paper names no average
            fake=Role(optimizer=optimizer),
            disc=Role(
                model=Discriminator(dim=1280, width=512), optimizer=optimizer
            ),
        ),
        checkpoint_every=1000,
        log_every=50,
    )
