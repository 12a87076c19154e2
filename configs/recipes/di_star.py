r"""DI* (arXiv:2410.20898) of Stable Diffusion XL at 1024 pixels: one step, with a reward.

    python -m launch.train --config=configs/recipes/di_star.py --workdir=DIR \
        --config.data.path=RECORDS --config.roles.teacher.init=SDXL/unet \
        --config.roles.student.init=START --config.roles.reward.init=REWARD

SDXL and RECORDS are those of configs/recipes/flash_dmd.py, without `image`; of x the shape alone is
read. START is a one-step student (the paper's is DMD2's of SDXL), REWARD as in
configs/recipes/di_plus_plus.py. The paper: 2.6 B weights, the divergence of scores with the
pseudo-Huber distance, guidance of the teacher as a second reward; on Parti's prompts its
ImageReward, PickScore and CLIP score are above those of the 12 B FLUX.1-dev at 50 steps. Uncertain:
guidance, the weights of both parts, rates, batch and length.

Departures: the reward judges latents, in the paper decoded pictures. The student starts at the
process's last time, DMD2's at 399 of 999 (`--config.method.student_times="(0.3994,)"`, where the
input is noise of that level, in DMD2 of level 1).
"""

from configs.recipes.flash_dmd import PROCESS, SDXL
from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import CopyEma, Optimizer
from jaxdistill.data.arrayrecord import GroupedRecords
from jaxdistill.diffusion.denoiser import Denoiser, Noise
from jaxdistill.diffusion.times import Uniform
from jaxdistill.methods.distribution.di_star import DIStar
from jaxdistill.models.denoisers.unet import UNet
from jaxdistill.models.vision.judges import LatentReward


def get_config():
    optimizer = Optimizer(lr=5e-7, b1=0.0, clip=1.0)
    return experiment(
        steps=10_000,
        data=GroupedRecords(batch_size=64),
        method=DIStar(
            process=PROCESS,
            student_times=(PROCESS.t_max,),
            match_times=Uniform(low=0.02, high=0.98),
            fake_times=Uniform(),
            fake_target="eps",
            guidance=7.5,
            scale=1.0,
            reward_weight=1.0,
        ),
        roles=dict(
            teacher=Role(
                model=UNet(**SDXL),
                denoiser=Denoiser(param=Noise(time_scale=999.0), native=PROCESS),
                param_dtype="bfloat16",
            ),
            reward=Role(model=LatentReward(), param_dtype="bfloat16"),
            student=Role(optimizer=optimizer, ema=CopyEma(rate=0.9999)),
            fake=Role(optimizer=optimizer),
        ),
        checkpoint_every=500,
        log_every=10,
    )
