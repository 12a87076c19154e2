"""ERNIE-Tiny (arXiv:2106.02241): BERT-base into 4 layers of width 312 with 12 heads (14.5 M
weights).

    python -m launch.train --config=configs/recipes/ernie_tiny.py --workdir=DIR \\
        --config.roles.pretrained.init=BERT_BASE --config.roles.teacher.init=BERT_TUNED

The folders are those of `BertForSequenceClassification`, BERT_TUNED fine-tuned on the task. The
paper's table of stages is certain; its steps, rates and batch are not known: 200 k steps in shares
60, 6, 17 and 17 %, batch 256, lr 1e-4 linear.
Departures: synthetic text stands in for the corpus and the task (replace `data` by a set with the
same fields).
"""

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Optimizer
from jaxdistill.data.patterns import Patterns
from jaxdistill.methods.language.ernie_tiny import ErnieTiny
from jaxdistill.models.heads import Projection
from jaxdistill.models.language.bert import BertClassifier

BERT = dict(vocab=30522, heads=12, max_length=512, classes=2, dtype="bfloat16")
OPTIMIZER = Optimizer(lr=1e-4, schedule="linear", warmup=20_000, weight_decay=0.01)


def get_config():
    base = BertClassifier(dim=768, mlp=3072, depth=12, **BERT)
    return experiment(
        steps=200_000,
        data=Patterns(length=128, batch_size=256),
        method=ErnieTiny(student_depth=4, teacher_depth=12),
        roles=dict(
            pretrained=Role(model=base, param_dtype="bfloat16"),
            teacher=Role(model=base, param_dtype="bfloat16"),
            student=Role(
                model=BertClassifier(dim=312, mlp=1200, depth=4, **BERT),
                optimizer=OPTIMIZER,
            ),
            projection=Role(
                model=Projection(inputs=312, outputs=768), optimizer=OPTIMIZER
            ),
        ),
        checkpoint_every=5000,
    )
