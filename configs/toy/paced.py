"""PACED (arXiv:2603.11178) on additions among four times as many problems that nobody can solve.

    python -m launch.train --config=configs/toy/paced.py --workdir=runs/toy_paced

2 CPU cores, about three minutes. Student and teacher start from supervised training on the sums. The claim: after the
same updates, greedy `accuracy` on sums that were kept back is higher than that of distillation with equal weights
(`baseline`: exponents 0). What is claimed is this and no more: leaving out every problem with pass rate 0 or 1 already
gives most of it, and the shape of the kernel in between is not told apart here.
"""

from configs.toy.grpo import OPTIMIZER, WRITING, train
from jaxdistill.core.build import Role, experiment, spec


def distil(runs=None, **method):
    return experiment(
        steps=300,
        runs=dict(start=train(200), teacher=train(600), **(runs or {})),
        data=spec("data.language:JunkCarry", digits=2, batch_size=32),
        method=spec("methods.language.paced:Paced", batches=300, **method, **WRITING),
        roles=dict(teacher=Role(init="@teacher"), student=Role(init="@start", optimizer=OPTIMIZER)),
        evaluation=spec("evals.text:TextEval"),
        **({"claim": dict(metric="accuracy", model="student", baseline="baseline", better="higher", ratio=1.1)} if runs else {}),
    )


def get_config():
    return distil(dict(baseline=distil(a=0.0, b=0.0)))
