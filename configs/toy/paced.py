"""PACED (arXiv:2603.11178) on additions among four times as many problems that nobody can solve.

    python -m launch.train --config=configs/toy/paced.py --workdir=runs/toy_paced

2 CPU cores, about three minutes. Student and teacher start from supervised training on the sums, the student's cut short. The
claim: after the same updates, greedy `accuracy` on sums that were kept back is higher than that of distillation with equal
weights (`baseline`: exponents 0), and no more than that. Leaving out every problem with pass rate 0 or 1 is a large part of
the difference, and the shape of the kernel in between is not told apart here; the mean divergence from the teacher on
held-out sums, which has the problems that the student does not solve in it, is not lower (seed 0: 0.64 against 0.51).
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
