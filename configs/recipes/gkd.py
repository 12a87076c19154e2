"""GKD (arXiv:2306.13649): on-policy distillation, Llama 3.1 8B into 3.2 1B in place of the paper's
T5-XL into T5-small.

    python -m launch.train --config=configs/recipes/gkd.py --workdir=DIR \\
        --config.data.path=train.jsonl \\
        --config.data.tokenizer=LLAMA --config.roles.teacher.init=LLAMA_8B
        --config.roles.student.init=LLAMA_1B

The paper: student from supervised training, on-policy share 0, 0.5 or 1, JSD beta 0.1 to 0.9 by
task, temperature 1.
"""

from configs.recipes.kd import PROMPTS, distil
from jaxdistill.methods.language.gkd import GKD


def get_config():
    return distil(GKD(on_policy=0.5, eos=(128001, 128009)), PROMPTS)
