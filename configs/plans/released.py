r"""What distillation of the released models costs, at their true sizes and on random data, to be
compiled and not run.

    python -m launch.train --config=configs/plans/released.py:wan_1_3b --workdir=DIR --dry_run
    python tools/plan.py --config=configs/plans/released.py:wan_1_3b --topology=v5p:2x2x4

`:wan_1_3b` and `:wan_14b` are DMD2 of Wan 2.1 (81 frames of 480 x 832), `:qwen_image` of Qwen-Image
20 B and `:sdxl` of SDXL (1024 pixels each): full weights of student and fake score with Adam in
float32, the frozen teacher in bfloat16, one sample a chip. `:qwen3_8b` is word-level KD of Qwen3-8B
from Qwen3-32B, 4,096 tokens a sample. `data.batch_size` is for the slice named in docs/scale.md;
weights are laid out over `fsdp`.
"""

from configs.recipes.flash_dmd import PROCESS, SDXL
from configs.recipes.phased_dmd import RECORD as VIDEO
from configs.recipes.phased_dmd import WAN14B
from configs.recipes.twinflow import QWEN
from configs.recipes.twinflow import RECORD as PICTURE
from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.core.sharding import MeshShape
from jaxdistill.core.types import lookup
from jaxdistill.data.synthetic import Synthetic
from jaxdistill.diffusion.denoiser import Denoiser, Noise, Velocity
from jaxdistill.methods.distribution.dmd2 import DMD2
from jaxdistill.methods.language.kd import KD
from jaxdistill.models.denoisers.qwen_image import QwenImage
from jaxdistill.models.denoisers.unet import UNet
from jaxdistill.models.denoisers.wan import Wan
from jaxdistill.models.heads import Discriminator
from jaxdistill.models.language.qwen import Qwen3

WAN1_3B = {**WAN14B, "dim": 1536, "mlp": 8960, "heads": 12, "depth": 30}
QWEN3 = dict(
    vocab=151936,
    head_dim=128,
    kv_heads=8,
    rope_theta=1e6,
    max_length=4096,
    dtype="bfloat16",
    remat="full",
)
QWEN3_32B = dict(dim=5120, mlp=25600, heads=64, depth=64, **QWEN3)
QWEN3_8B = dict(dim=4096, mlp=12288, heads=32, depth=36, **QWEN3)
TEXT = {
    f"{c}/{k}": v
    for c in ("cond", "null_cond")
    for k, v in dict(
        text="normal 77 2048", pooled="normal 1280", size="normal 6"
    ).items()
}


def dmd2(model, arrays, denoiser, dim, tap, chips, classes=0, **method):
    optimizer = Optimizer(lr=2e-6, b1=0.0, weight_decay=0.01, clip=10.0)
    return experiment(
        steps=10_000,
        mesh=MeshShape(fsdp=-1),
        data=Synthetic(batch_size=chips, arrays=arrays),
        method=DMD2(taps=(tap,), **method),
        roles=dict(
            teacher=Role(model=model, denoiser=denoiser, param_dtype="bfloat16"),
            student=Role(init="teacher", optimizer=optimizer, ema=Ema(rate=0.999)),
            fake=Role(init="teacher", optimizer=optimizer),
            disc=Role(
                model=Discriminator(dim=dim, width=512, classes=classes),
                optimizer=optimizer,
            ),
        ),
    )


def kd():
    return experiment(
        steps=10_000,
        mesh=MeshShape(fsdp=-1),
        data=Synthetic(
            batch_size=32,
            arrays=dict(tokens="integers 151936 4096", mask="constant 1 4096"),
        ),
        method=KD(chunk=18992),
        roles=dict(
            teacher=Role(model=Qwen3(**QWEN3_32B), param_dtype="bfloat16"),
            student=Role(
                model=Qwen3(**QWEN3_8B),
                init="fresh",
                optimizer=Optimizer(lr=1e-5, b2=0.95, weight_decay=0.1),
            ),
        ),
    )


FLOW = Denoiser(param=Velocity(time_scale=1000.0))
SDXL_METHOD = dict(process=PROCESS, guidance=4.0)
EPS = Denoiser(param=Noise(time_scale=999.0), native=PROCESS)
PLANS = {
    "wan_1_3b": lambda: dmd2(
        Wan(**WAN1_3B), VIDEO, FLOW, 1536, 15, 16, guidance=4.0
    ),
    "wan_14b": lambda: dmd2(Wan(**WAN14B), VIDEO, FLOW, 5120, 20, 64, guidance=4.0),
    "qwen_image": lambda: dmd2(
        QwenImage(**QWEN),
        PICTURE,
        FLOW,
        3072,
        30,
        64,
        guidance=4.0,
    ),
    "sdxl": lambda: dmd2(
        UNet(**SDXL),
        {"x": "normal 128 128 4", **TEXT},
        EPS,
        1280,
        3,
        16,
        process=PROCESS,
        guidance=4.0,
    ),
    "qwen3_8b": kd,
}


def get_config(variant="wan_1_3b"):
    return lookup(PLANS, variant, "variant")()
