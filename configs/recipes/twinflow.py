"""TwinFlow (arXiv:2512.05150) of Qwen-Image, 20 B: adapters on the frozen base, for one to four
evaluations at 1024 pixels.

    python -m launch.train --config=configs/recipes/twinflow.py --workdir=DIR \\
        --config.data.path=RECORDS \\
        --config.roles.teacher.init=PIPELINE/transformer

PIPELINE is Qwen-Image's diffusers folder. RECORDS are those of `data.arrayrecord:GroupedRecords`: x
[128, 128, 16] (latents), and in the groups cond and null_cond text [512, 3584] (Qwen2.5-VL's
states) and mask [512]. The paper: about 200 k pairs of BLIP-3o-60k, Echo-4o and ShareGPT-4o, batch
64, 7 k steps, AdamW 1e-4 (.9, .99) without decay, gradient norm 1, rank and alpha 64, the base's
one time embedder fed t - r / 2, order 2, live F^- (kappa = 0), push .5. At one step GenEval .86,
DPG 86.5, WISE .54, at two .87, 87.6, .57; RCGM alone .52, 59.5, .30 at one; the base at 100
evaluations .87, 88.3, .62. `:imagefree` trains on own samples, with the base's velocity at scale 4.
Guidance .8 is that of the released configs; the length of texts is our own.
"""

from jaxdistill.core.build import Lora, Role, experiment
from jaxdistill.core.optim import Optimizer, RampEma
from jaxdistill.core.types import lookup
from jaxdistill.data.arrayrecord import GroupedRecords
from jaxdistill.diffusion.denoiser import Denoiser, Velocity
from jaxdistill.methods.trajectory.twinflow import ImageFreeTwinFlow, TunedTwinFlow
from jaxdistill.models.denoisers.qwen_image import QwenImage

QWEN = dict(
    channels=16,
    heads=24,
    axes=(16, 56, 56),
    depth=60,
    text_dim=3584,
    dtype="bfloat16",
    remat="full",
)
CONDITION = {"text": "normal 512 3584", "mask": "constant 1 512"}
RECORD = {
    "x": "normal 128 128 16",
    **{f"{c}/{k}": v for c in ("cond", "null_cond") for k, v in CONDITION.items()},
}
METHODS = {
    "": TunedTwinFlow(target_network="student", training_guidance=0.8),
    "imagefree": ImageFreeTwinFlow(),
}


def get_config(variant=""):
    return experiment(
        steps=7_000,
        data=GroupedRecords(batch_size=64),
        method=lookup(METHODS, variant, "variant"),
        roles=dict(
            teacher=Role(
                model=QwenImage(**QWEN),
                denoiser=Denoiser(param=Velocity(time_scale=1000.0), fold=0.5),
                param_dtype="bfloat16",
            ),
            student=Role(
                lora=Lora(rank=64, alpha=64.0),
                optimizer=Optimizer(lr=1e-4, b2=0.99, clip=1.0),
                ema=RampEma(rate=0.0),  # the live adapters
            ),
        ),
        checkpoint_every=500,
        log_every=10,
    )
