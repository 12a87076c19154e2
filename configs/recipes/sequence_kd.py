"""Sequence-level distillation (arXiv:1606.07947), Llama 3.1 8B into 3.2 1B in place of the paper's
LSTM translators.

    python -m launch.train --config=configs/recipes/sequence_kd.py --workdir=DIR \\
        --config.data.path=train.jsonl \\
        --config.data.tokenizer=LLAMA --config.roles.teacher.init=LLAMA_8B
        --config.roles.student.init=LLAMA_1B

The paper writes the training set once with a beam of 5. Departures: the teacher decodes greedily,
in every step.
"""

from configs.recipes.kd import PROMPTS, distil
from jaxdistill.methods.language.sequence_kd import SequenceKD


def get_config():
    return distil(SequenceKD(eos=(128001, 128009), chunk=16032), PROMPTS)
