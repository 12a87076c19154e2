"""Distillation of a latent DiT-XL/2 on one accelerator, on random latents and weights: `:dmd2` and
`:scm`, to be timed.

    JAX_PLATFORMS=cuda python tools/bench.py --alone --config=configs/plans/dit_xl2.py:dmd2
    python -m launch.train --config=configs/plans/dit_xl2.py:dmd2 --workdir=DIR --dry_run

The recipes of the same names (configs/recipes) in bfloat16 with 32 samples of 32 x 32 x 4, which
one GPU of 80 GB holds.
"""

from configs.recipes import dmd2, scm
from jaxdistill.core.build import plain
from jaxdistill.core.types import lookup
from jaxdistill.data.synthetic import Synthetic

LATENTS = dict(x="normal 32 32 4", cond="integers 1000", null_cond="constant 1000")


def get_config(name: str = "dmd2"):
    config = lookup({"dmd2": dmd2, "scm": scm}, name, "variant").get_config()
    with config.unlocked():
        config.data = plain(Synthetic(batch_size=32, arrays=LATENTS))
        config.roles.teacher.init = "fresh"
        config.roles.teacher.model.dtype = "bfloat16"
        config.steps = 100
    return config
