"""My method (arXiv:2601.00000) on a synthetic language with an exact teacher.

    python -m launch.train --config=configs/toy/my_method.py \\
        --workdir=runs/toy_my_method

2 CPU cores, how many minutes. The claim: what the paper claims, at small scale; as it stands, after
the same steps the student has a lower held-out perplexity than one that sees the tokens alone
(`baseline`). `--config.data.seed=N` makes another language.
"""

from configs.toy.kd import DATA, STUDENT, baseline
from jaxdistill.core.build import Role, experiment
from jaxdistill.data.language import Markov
from jaxdistill.evals.text import TextEval
from jaxdistill.methods.language.my_method import MyMethod

ABLATIONS = {"twice the temperature": ("method.temperature=2.0",)}


def get_config():
    return experiment(
        steps=400,
        runs=dict(baseline=baseline(400)),
        data=Markov(**DATA),
        method=MyMethod(),
        roles=dict(teacher=Role(init="exact"), student=STUDENT),
        evaluation=TextEval(),
        claim=dict(
            metric="perplexity",
            model="student",
            baseline="baseline",
            better="lower",
            ratio=0.98,
        ),
    )
