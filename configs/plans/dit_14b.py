r"""DMD2 of a 14 B-weight diffusion transformer at 32 k tokens, on random data: what a video model of that size costs.

    python -m launch.train --config=configs/plans/dit_14b.py --workdir=DIR --dry_run
    python tools/plan.py --config=configs/plans/dit_14b.py --topology=v5p:4x4x4

40 layers of width 5120 with 40 heads, samples of 128 x 256 patches of 2 x 2 x 16, one sample a chip (`data.batch_size`):
bfloat16 arithmetic and frozen teacher, float32 weights and Adam of student and fake score, everything rematerialised.
"""

from jaxdistill.core.build import Role, experiment, spec
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.core.sharding import MeshShape
from jaxdistill.diffusion.denoiser import Denoiser, Velocity

SIZES = dict(size=512, patch=2, channels=16, dim=5120, depth=40, heads=40, classes=1000, dtype="bfloat16", remat="full")

SAMPLE = dict(x="normal 256 512 16", cond="integers 1000", null_cond="constant 1000")


def get_config():
    optimizer = Optimizer(lr=2e-6, b1=0.0, weight_decay=0.01, clip=10.0)
    return experiment(
        steps=10_000,
        mesh=MeshShape(fsdp=-1),
        data=spec(
            "data.synthetic:Synthetic", batch_size=64, arrays=dict(x="normal 256 512 16", cond="integers 1000", null_cond="constant 1000")
        ),
        method=spec("methods.distribution.dmd2:DMD2", taps=(20,)),
        roles=dict(
            teacher=Role(
                model=spec("models.dit:DiT", **SIZES),
                denoiser=Denoiser(param=Velocity(time_scale=1000.0)),
                param_dtype="bfloat16",
            ),
            student=Role(init="teacher", optimizer=optimizer, ema=Ema(rate=0.999)),
            fake=Role(init="teacher", optimizer=optimizer),
            disc=Role(model=spec("models.heads:Discriminator", dim=5120, width=512, classes=1000), optimizer=optimizer),
        ),
    )
