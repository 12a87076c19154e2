"""My method (arXiv:2601.00000) at the size of Llama 3.1 8B into 3.2 1B.

    python -m launch.train --config=configs/recipes/my_method.py --workdir=DIR \\
        --config.data.path=train.jsonl \\
        --config.data.tokenizer=LLAMA --config.roles.teacher.init=LLAMA_8B
        --config.roles.student.init=LLAMA_1B

The folders are those of `LlamaForCausalLM`. The paper's constants, hardware, hours and figures
stand here, and what departs from them.
"""

from configs.recipes.kd import distil
from jaxdistill.methods.language.my_method import MyMethod


def get_config():
    return distil(MyMethod())
