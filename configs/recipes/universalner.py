"""UniversalNER (arXiv:2308.03279): Llama 3.1 8B in place of LLaMA 7B, tuned on a teacher's answers
about 45,889 passages.

    python -m launch.train --config=configs/recipes/universalner.py --workdir=DIR \\
        --config.data.path=entities.jsonl \\
        --config.data.tokenizer=LLAMA --config.roles.student.init=LLAMA_8B

The rows come from `jaxdistill.data.endpoint.ask_all` with `jaxdistill.data.ner.ask`, and
`labelled`. The paper: passages of up to 256 tokens of the Pile, gpt-3.5-turbo-0301 at temperature
0; 3 epochs, lr 2e-5, cosine, warm-up 4 %, batch 256, conversations of up to 1024 tokens, bfloat16.
Published zero-shot F1 over 43 sets: 41.7 (7B), teacher 34.9. Departure: the family.
"""

from configs.recipes.kd import LLAMA_8B
from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Optimizer
from jaxdistill.data.ner import Conversations
from jaxdistill.methods.language.universalner import UniversalNER
from jaxdistill.models.language.lm import LM

STEPS = 3 * 45_889 * 98 // 100 // 256


def get_config():
    return experiment(
        steps=STEPS,
        accumulate=4,
        data=Conversations(batch_size=256),
        method=UniversalNER(chunk=16032),
        roles=dict(
            student=Role(
                model=LM(**LLAMA_8B),
                optimizer=Optimizer(lr=2e-5, schedule="cosine", warmup=STEPS // 25),
            )
        ),
        checkpoint_every=100,
    )
