"""My method (arXiv:2601.00000) on a synthetic language: half the layers, then
distillation.

    python -m launch.train --config=configs/toy/my_method.py \\
        --workdir=runs/toy_my_method

2 CPU cores, how many minutes, teacher included. The claim: what the paper claims, at small scale;
as it stands, after the same steps the student has a lower perplexity than a network of its size
trained from scratch (`baseline`).
"""

from configs.toy.kd import DATA
from configs.toy.prune_then_distil import OPTIMIZER, train
from jaxdistill.core.build import Role, experiment
from jaxdistill.data.language import Markov
from jaxdistill.evals.text import TextEval
from jaxdistill.methods.architecture.my_method import MyMethod

ABLATIONS = {"three of four layers": ("method.depth=3",)}


def get_config():
    return experiment(
        steps=200,
        runs=dict(
            teacher=train(800, depth=4, mlp=128),
            baseline=train(200, depth=2, mlp=128),
        ),
        data=Markov(**DATA),
        method=MyMethod(depth=2),
        roles=dict(
            teacher=Role(init="@teacher"), student=Role(optimizer=OPTIMIZER)
        ),
        evaluation=TextEval(),
        claim=dict(
            metric="perplexity",
            model="student",
            baseline="baseline",
            better="lower",
            ratio=0.98,
        ),
    )
