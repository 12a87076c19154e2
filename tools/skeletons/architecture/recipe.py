"""My method (arXiv:2601.00000), Llama 3.1 8B: half of the layers, then KD on logits.

    python -m launch.train --config=configs/recipes/my_method.py --workdir=DIR \\
        --config.data.path=train.jsonl \\
        --config.data.tokenizer=LLAMA --config.roles.teacher.init=LLAMA_8B

The folders are those of `LlamaForCausalLM`. The paper's constants, hardware, hours and figures
stand here, and what departs from them.
"""

from configs.recipes.kd import distil
from jaxdistill.core.build import Role, plain
from jaxdistill.methods.architecture.my_method import MyMethod


def get_config():
    config = distil(MyMethod(depth=16, chunk=16032))
    with config.unlocked():
        config.roles.student = plain(Role(optimizer=Role().optimizer))
        config.roles.student.optimizer.lr = 1e-4
    return config
