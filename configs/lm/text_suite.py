"""Language methods on the bytes of a plain-text file: `--config=configs/lm/text_suite.py:METHOD`,
each name below.

    python -m launch.train --config=configs/lm/text_suite.py:gkd --workdir=runs/text/gkd_0 \\
        --config.data.path=FILE \\
        --config.roles.teacher.init=TEACHER --config.roles.student.init=START
    # all of them on seeds 0, 1, 2, and the table
    python tools/reproduce.py --suite=text --config.data.path=FILE

TEACHER and START are runs of this file's variants `teacher` and `start`: byte-level Llamas of 1.0 M
and 0.12 M weights, trained for 800 and 300 steps. The same for all: both of these, 16 rows of 64
bytes that a step learns from, steps, Adam with lr 1e-3. Nothing here can be right or wrong, so that
the methods that need a reward are in configs/lm/suite.py alone.
"""

from configs.lm.gkd_shakespeare import STUDENT, TEACHER, train
from configs.lm.suite import REINFORCED, methods
from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Optimizer
from jaxdistill.core.types import lookup
from jaxdistill.data.text import Text
from jaxdistill.evals.text import TextEval

STEPS = 400
# a step's, in bytes
ROWS = 16
LENGTH = 64
PROMPT = 16  # bytes that a student goes on from
REWARDED = ("paced", *REINFORCED)
SHARED = {
    "teacher": lambda: train(800, TEACHER),
    "start": lambda: train(300, STUDENT),
}
VARIANTS = {
    name: made
    for name, made in methods(prompt_length=PROMPT).items()
    if name not in REWARDED
}


def get_config(method="gkd"):
    variant = lookup(SHARED | VARIANTS, method, "variant")
    if method in SHARED:
        return variant()
    teacher = (
        dict(teacher=Role(init="runs/text/teacher_0")) if method != "sft" else {}
    )
    return experiment(
        steps=STEPS,
        data=Text(length=LENGTH, batch_size=ROWS),
        method=variant(),
        roles=dict(
            student=Role(
                init="runs/text/start_0", optimizer=Optimizer(lr=1e-3, warmup=10)
            ),
            **teacher,
        ),
        evaluation=TextEval(prompt_length=PROMPT),
        checkpoint_every=STEPS,
        log_every=50,
    )
