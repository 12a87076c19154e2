"""PACED (arXiv:2603.11178) on additions among four times as many problems that nobody can solve.

    python -m launch.train --config=configs/toy/paced.py --workdir=runs/toy_paced

2 CPU cores, about three minutes. Student and teacher start from supervised training on the sums. The claim: after the
same updates, greedy `accuracy` on sums that were kept back is higher than that of distillation with equal weights
(`baseline`: exponents 0). What is claimed is this and no more: leaving out every problem with pass rate 0 or 1 already
gives most of it, and the shape of the kernel in between is not told apart here.
"""

from configs.toy.tsd_kd import WRITING, distil
from jaxdistill.core.build import spec


def paced(runs=None, claim=None, **exponents):
    return distil(
        spec("methods.language.paced:Paced", batches=300, **exponents, **WRITING),
        spec("data.language:JunkCarry", digits=2, batch_size=32),
        steps=300,
        runs=runs,
        claim=claim,
    )


def get_config():
    return paced(
        dict(baseline=paced(a=0.0, b=0.0)),
        dict(metric="accuracy", model="student", baseline="baseline", better="higher", ratio=1.1),
    )
