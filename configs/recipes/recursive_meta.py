"""Recursive Meta-Distillation (arXiv:2601.13100) at the size of Llama 3.1 8B into 3.2 1B.

    python -m launch.train --config=configs/recipes/recursive_meta.py --workdir=DIR \\
        --config.data.path=train.jsonl \\
        --config.data.tokenizer=LLAMA --config.roles.teacher.init=LLAMA_8B
        --config.roles.student.init=LLAMA_1B

The paper is a theory and gives no sizes: three generations after the first, gamma 0.5, each from
the one before's weights.
"""

from configs.recipes.kd import distil
from jaxdistill.methods.language.recursive_meta import RecursiveMeta


def get_config():
    config = distil(
        RecursiveMeta(
            generations=3,
            gamma=(0.5,),
            restart=False,
        )
    )
    config.data.length = 2048
    return config
