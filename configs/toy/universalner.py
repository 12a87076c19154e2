"""UniversalNER (arXiv:2308.03279) on made-up sentences with twelve types of entity and a teacher
that is often wrong.

    python -m launch.train --config=configs/toy/universalner.py --workdir=runs/toy_universalner

2 CPU cores, about three minutes. The teacher misses or misnames 8 % of the entities and names only
types that it sees. Every type of new sentences is asked for, against the right labels. The claim:
strict micro-F1 is higher where absent types were asked for too, drawn by frequency, than after the
same steps without (`baseline`), where a student always finds something.
"""

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Optimizer
from jaxdistill.core.types import lookup
from jaxdistill.data.ner import Slots
from jaxdistill.evals.ner import NerEval
from jaxdistill.methods.language.universalner import UniversalNER
from jaxdistill.models.language.lm import LM


def train(negatives: str, runs=None, **rest):
    return experiment(
        steps=1200,
        runs=runs or {},
        data=Slots(negatives=negatives, batch_size=64),
        method=UniversalNER(),
        roles=dict(
            student=Role(
                model=LM(
                    vocab=107,
                    dim=64,
                    mlp=128,
                    heads=4,
                    depth=2,
                    max_length=24,
                ),
                optimizer=Optimizer(lr=3e-3, schedule="cosine", warmup=50),
            )
        ),
        evaluation=NerEval(samples=1200, batch=1200),
        **rest,
    )


def get_config(variant=""):
    """`variant`: frequency (the default) or uniform, the law of the absent types that are asked
    for.
    """
    return train(
        lookup(
            {"": "frequency", "frequency": "frequency", "uniform": "uniform"},
            variant,
            "variant",
        ),
        dict(baseline=train("none")),
        claim=dict(
            metric="f1",
            model="student",
            baseline="baseline",
            better="higher",
            ratio=1.2,
        ),
    )
