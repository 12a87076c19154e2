"""Recursive Meta-Distillation (arXiv:2601.13100) on a synthetic language with an exact teacher:
anchored generations.

    python -m launch.train --config=configs/toy/recursive_meta.py --workdir=runs/toy_recursive_meta

2 CPU cores, about two minutes. Six generations of students too small for the language, each from
fresh weights. The claim: the last one is nearer to the teacher (`kl` on held-out text) where every
generation keeps 0.3 of the teacher as its target than where each learns from the one before alone
(`baseline`: gamma 0).
"""

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Optimizer
from jaxdistill.data.language import Markov
from jaxdistill.evals.text import TextEval
from jaxdistill.methods.language.recursive_meta import RecursiveMeta
from jaxdistill.models.language.lm import LM

DATA = dict(vocab=12, length=32, batch_size=32)
STUDENT = Role(
    model=LM(vocab=12, dim=32, mlp=64, heads=4, depth=2, max_length=32),
    optimizer=Optimizer(lr=4e-3, schedule="cosine", warmup=10),
)


def distil(gamma: float, runs=None, **rest):
    return experiment(
        steps=1500,
        runs=runs or {},
        data=Markov(**DATA),
        method=RecursiveMeta(gamma=(gamma,), generations=5),
        roles=dict(teacher=Role(init="exact"), student=STUDENT),
        evaluation=TextEval(),
        **rest,
    )


def get_config():
    return distil(
        0.3,
        dict(baseline=distil(0.0)),
        claim=dict(
            metric="kl",
            model="student",
            baseline="baseline",
            better="lower",
            ratio=0.85,
        ),
    )
