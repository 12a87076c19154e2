r"""DMD2 of a 14 B-weight diffusion transformer at 32 k tokens, on random data: what a
video model of that size costs.

    python -m launch.train --config=configs/plans/dit_14b.py --workdir=DIR --dry_run
    python tools/plan.py --config=configs/plans/dit_14b.py --topology=v5p:4x4x4

40 layers of width 5120 with 40 heads, samples of 128 x 256 patches of 2 x 2 x 16, one sample a chip
(`data.batch_size`): bfloat16 arithmetic and frozen teacher, float32 weights and Adam of student and
fake score, everything rematerialised.
"""

from configs.plans.released import FLOW, dmd2
from jaxdistill.models.denoisers.dit import DiT

SIZES = dict(
    size=512,
    patch=2,
    channels=16,
    dim=5120,
    depth=40,
    heads=40,
    classes=1000,
    dtype="bfloat16",
    remat="full",
)
SAMPLE = dict(
    x="normal 256 512 16", cond="integers 1000", null_cond="constant 1000"
)


def get_config():
    return dmd2(DiT(**SIZES), SAMPLE, FLOW, 5120, 20, 64, classes=1000)
