"""SwiftBrush (arXiv:2312.05239) of Stable Diffusion 2.1 base at 512 pixels: one step, from prompts
alone.

    python -m launch.train --config=configs/recipes/swiftbrush.py --workdir=DIR \\
        --config.data.path=PROMPTS \\
        --config.roles.teacher.init=SD21/unet

SD21 is the published model's folder. PROMPTS is a folder of *.arrayrecord
(`data.arrayrecord:GroupedRecords`) with the states of the text encoder, cond/text [77, 1024] and
null_cond/text the same of the empty prompt; there are no images. The paper: 1.38 M prompts of
JourneyDB, three epochs at batch 64 (about 65 k updates, uncertain), guidance 4.5 on both scores,
adapters of rank 64 and alpha 108 on queries and values at 1e-3, the student at 1e-6, gradient norm
1 for each. COCO 2014 at one step: FID 16.67 and CLIP .29 (15.46 and .30 in SNOOPI's measurement;
the teacher's best, 25 steps at scale 3, 9.60 and .32).
"""

from jaxdistill.core.build import Lora, Role, experiment
from jaxdistill.core.optim import CopyEma, Optimizer
from jaxdistill.data.arrayrecord import GroupedRecords
from jaxdistill.diffusion.denoiser import Denoiser, Noise
from jaxdistill.diffusion.process import DDPM
from jaxdistill.methods.distribution.swiftbrush import SwiftBrush
from jaxdistill.models.denoisers.unet import UNet

COMMON = dict(
    size=64,
    widths=(320, 640, 1280, 1280),
    depths=(1, 1, 1, 0),
    groups=32,
    dtype="bfloat16",
    remat="full",
)
SD21 = dict(**COMMON, heads=(5, 10, 20, 20), text_dim=1024)
PROCESS = DDPM(scaled=True, beta_min=0.00085, beta_max=0.012)
RECORD = {f"{group}/text": "normal 77 1024" for group in ("cond", "null_cond")}


def distil(method, unet, alpha, steps, weight_decay=0.0, **roles):
    """The recipe that SNOOPI shares: adapters on queries and values of all attention layers."""
    return experiment(
        steps=steps,
        data=GroupedRecords(batch_size=64),
        method=method,
        roles=dict(
            teacher=Role(
                model=UNet(**unet),
                denoiser=Denoiser(param=Noise(time_scale=999.0), native=PROCESS),
                param_dtype="bfloat16",
            ),
            student=Role(
                optimizer=Optimizer(lr=1e-6, weight_decay=weight_decay),
                ema=CopyEma(rate=0.9999),
            ),
            fake=Role(
                lora=Lora(
                    rank=64, alpha=alpha, targets=r".*attn[12]/to_[qv]/kernel"
                ),
                optimizer=Optimizer(lr=1e-3, weight_decay=weight_decay),
            ),
            **roles,
        ),
        checkpoint_every=1_000,
        log_every=50,
    )


def get_config():
    return distil(
        SwiftBrush(process=PROCESS, shape=(64, 64, 4)),
        SD21,
        108.0,
        65_000,
    )
