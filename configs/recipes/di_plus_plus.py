r"""DI++ (arXiv:2410.18881) of Stable Diffusion 1.5 at 512 pixels: one step, with a reward.

    python -m launch.train --config=configs/recipes/di_plus_plus.py --workdir=DIR \
        --config.data.path=PROMPTS --config.roles.teacher.init=SD15/unet \
        --config.roles.reward.init=REWARD

SD15 is the published model's folder. PROMPTS is a folder of *.arrayrecord
(`data.arrayrecord:GroupedRecords`) with cond/text [77, 768], the states of the text encoder,
null_cond/text the same of the empty prompt, and x [64, 64, 4], of which the shape alone is read.
REWARD is a run or folder with the weights of a differentiable reward of latents; any model called
with (x0, t = 0, cond) takes the place of `LatentReward`.

The paper aligns two students, of Stable Diffusion 1.5 (with prompts of LAION-Aesthetics) and of
PixArt-alpha, with ImageReward as the reward; that of PixArt-alpha reaches an aesthetic score of
6.19, ImageReward 1.24 and HPSv2.0 28.48 at one step. It starts from a student that Diff-Instruct
has distilled: `--config.roles.student.init=RUN`. Uncertain: guidance, the reward's weight, rates,
batch and length. Departures: the reward judges latents, in the paper decoded pictures.
"""

from configs.recipes.snoopi import SD15
from configs.recipes.swiftbrush import PROCESS
from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import CopyEma, Optimizer
from jaxdistill.data.arrayrecord import GroupedRecords
from jaxdistill.diffusion.denoiser import Denoiser, Noise
from jaxdistill.methods.distribution.di_plus_plus import DIPlusPlus
from jaxdistill.models.denoisers.unet import UNet
from jaxdistill.models.vision.judges import LatentReward

RECORD = {f"{group}/text": "normal 77 768" for group in ("cond", "null_cond")} | {
    "x": "normal 64 64 4"
}


def get_config():
    optimizer = Optimizer(lr=1e-6, b1=0.0, clip=1.0)
    return experiment(
        steps=50_000,
        data=GroupedRecords(batch_size=64),
        method=DIPlusPlus(
            process=PROCESS, fake_target="eps", guidance=4.5, reward_weight=1.0
        ),
        roles=dict(
            teacher=Role(
                model=UNet(**SD15),
                denoiser=Denoiser(param=Noise(time_scale=999.0), native=PROCESS),
                param_dtype="bfloat16",
            ),
            reward=Role(model=LatentReward(), param_dtype="bfloat16"),
            student=Role(optimizer=optimizer, ema=CopyEma(rate=0.9999)),
            fake=Role(optimizer=optimizer),
        ),
        checkpoint_every=1_000,
        log_every=50,
    )
