"""Flash-DMD (arXiv:2511.20549) of Stable Diffusion XL at 1024 pixels: four steps, 1000 updates of
the student.

    python -m launch.train --config=configs/recipes/flash_dmd.py --workdir=DIR \\
        --config.data.path=RECORDS \\
        --config.roles.teacher.init=SDXL/unet --config.roles.decoder.init=SDXL/vae
        --config.roles.features.init=SAM

SDXL is the published model's folder, SAM that of Segment Anything's ViT-B. RECORDS are those of
`data.arrayrecord:GroupedRecords`: x [128, 128, 4] (latents; only their shape is read), image uint8
[1024, 1024, 3], and in the groups cond and null_cond text [77, 2048], pooled [1280] and size [6].
The paper: batch 64; TTUR 1 for 1 k updates, ImageReward .951 and HPSv2 .297 on 10 k COCO captions,
or `--config.method.critic_steps=2 --config.steps=16000` (8 k), .974 and .298; the teacher at 100
evaluations .714 and .287. With `:rl` 2 k more steps, five in six of them on preferences,
ImageReward 1.004: `--config.roles.reward.init=RUN` names weights of a reward of noisy latents (any
model called with (x_t, t, cond) and its own sizes).

Learning rate, optimiser and GAN weight are DMD2's for SDXL, since the paper's are not known; nor
are the size of SAM, the layers that have heads (here those that see the whole image), and the sizes
of heads and reward.
"""

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.core.types import lookup
from jaxdistill.data.arrayrecord import GroupedRecords
from jaxdistill.diffusion.denoiser import Denoiser, Noise
from jaxdistill.diffusion.process import DDPM
from jaxdistill.methods.distribution.flash_dmd import FlashDMD
from jaxdistill.methods.distribution.flash_dmd_rl import FlashDMDRL
from jaxdistill.models.autoencoders.vae import VAE
from jaxdistill.models.denoisers.unet import UNet
from jaxdistill.models.heads import Heads
from jaxdistill.models.vision.judges import LatentReward
from jaxdistill.models.vision.sam import SamVision
from jaxdistill.objectives.pixels import SAM

SDXL = dict(
    size=128,
    widths=(320, 640, 1280),
    depths=(0, 2, 10),
    mid_depth=10,
    heads=(5, 10, 20),
    text_dim=2048,
    pooled_dim=1280,
    size_dim=256,
    groups=32,
    dtype="bfloat16",
    remat="full",
)
SDXL_VAE = dict(
    size=1024,
    widths=(128, 256, 512, 512),
    layers=2,
    groups=32,
    scale=0.13025,
    dtype="bfloat16",
    remat="full",
)
SAM_B = dict(
    size=1024,
    patch=16,
    dim=768,
    mlp=3072,
    heads=12,
    depth=12,
    window=14,
    global_layers=(2, 5, 8, 11),
    neck=256,
    dtype="bfloat16",
    remat="full",
)
PROCESS = DDPM(scaled=True, beta_min=0.00085, beta_max=0.012)


def get_config(variant=""):
    refine = lookup({"": False, "rl": True}, variant, "variant")
    optimizer = Optimizer(lr=5e-7, weight_decay=0.01, clip=10.0)
    times = tuple(t / 999 for t in (999, 749, 499, 249))
    common = dict(
        process=PROCESS,
        student_times=times,
        fake_target="eps",
        guidance=8.0,
        gan_weight=5e-3,
        taps=SAM_B["global_layers"],
        preprocess=SAM,
    )
    method = FlashDMD(**common)
    more = {}
    if refine:
        method = FlashDMDRL(
            rl_share=2 / 3,
            margin="mean",
            beta=5000.0,
            **common,
        )
        more = dict(
            reference=Role(init="student"),
            reward=Role(model=LatentReward()),
        )
    return experiment(
        steps=3000 if refine else 1000,
        data=GroupedRecords(batch_size=64),
        method=method,
        roles=dict(
            teacher=Role(
                model=UNet(**SDXL),
                denoiser=Denoiser(param=Noise(time_scale=999.0), native=PROCESS),
                param_dtype="bfloat16",
            ),
            decoder=Role(model=VAE(**SDXL_VAE), param_dtype="bfloat16"),
            features=Role(model=SamVision(**SAM_B), param_dtype="bfloat16"),
            student=Role(
                optimizer=optimizer, ema=Ema(rate=0.0, warmup=False)
            ),  # the paper names no average
            fake=Role(optimizer=optimizer),
            disc=Role(model=Heads(dims=(768,) * 4, width=256), optimizer=optimizer),
            **more,
        ),
        checkpoint_every=500,
        log_every=10,
    )
