"""Minitron (arXiv:2407.14679) at the size of Llama 3.1 8B into 4B: half of the layers, or narrower
MLPs, then KD on logits.

    python -m launch.train --config=configs/recipes/prune_then_distil.py --workdir=DIR \\
        --config.data.path=train.jsonl \\
        --config.data.tokenizer=LLAMA --config.roles.teacher.init=LLAMA_8B

The report of Llama-3.1-Minitron-4B: depth 32 -> 16, 94 B tokens, forward KL on logits alone.
Departure: their width pruning also drops attention heads and embedding channels.
"""

from configs.recipes.kd import distil
from jaxdistill.core.build import Role, plain
from jaxdistill.methods.architecture.prune_then_distil import PruneThenDistil


def get_config():
    config = distil(PruneThenDistil(depth=16, chunk=16032))
    with config.unlocked():
        config.roles.student = plain(Role(optimizer=Role().optimizer))
        config.roles.student.optimizer.lr = 1e-4
    return config
