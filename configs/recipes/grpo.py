"""GRPO (arXiv:2402.03300) at the size of DeepSeekMath 7B: questions with an answer that ends in a
number.

    python -m launch.train --config=configs/recipes/grpo.py:verified --workdir=DIR \\
        --config.data.path=train.jsonl \\
        --config.data.tokenizer=MODEL --config.method.reward.tokenizer=MODEL \\
        --config.roles.student.init=MODEL --config.roles.reference.init=MODEL

The paper: 64 responses to a question, 1024 responses a step, up to 1024 tokens, one update to a
roll-out, lr 1e-6, KL 0.04.
Departure: the reward is the last number of the response against that of the answer; the paper has a
reward model. Without `:verified` it is token by token, in the program: a verifier on the host
cannot be compiled for a TPU from elsewhere.
"""

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Optimizer
from jaxdistill.core.types import lookup
from jaxdistill.data.text import PaddedJson
from jaxdistill.methods.language.grpo import GRPO
from jaxdistill.models.language.lm import LM
from jaxdistill.objectives.reward import Exact, Verified

DEEPSEEK_7B = dict(
    vocab=102400,
    dim=4096,
    mlp=11008,
    heads=32,
    depth=30,
    max_length=4096,
    dtype="bfloat16",
    remat="full",
)


def reward(variant: str, function: str = "last_number"):
    """Of the variant "verified", a function on the host; else tokens are compared."""
    verified = Verified(
        function=f"objectives.verifiers:{function}", tokenizer="byte"
    )
    return lookup({"": Exact(), "verified": verified}, variant, "variant")


def improve(
    method, student, *, prompts, prompt_length, response_length, steps, **roles
):
    return experiment(
        steps=steps,
        data=PaddedJson(
            prompt_length=prompt_length,
            response_length=response_length,
            batch_size=prompts,
        ),
        method=method,
        roles=dict(
            student=Role(model=student, optimizer=Optimizer(lr=1e-6)),
            old=Role(
                optimizer=Optimizer(algorithm="sgd", clip=0.0)
            ),  # it only copies: no moments
            **roles,
        ),
        checkpoint_every=50,
    )


def get_config(variant=""):
    return improve(
        GRPO(
            reward=reward(variant),
            group=64,
            eos=(100001,),
            pad=100001,
            chunk=12800,
        ),
        LM(**DEEPSEEK_7B),
        prompts=16,
        prompt_length=512,
        response_length=1024,
        steps=2000,
        reference=Role(param_dtype="bfloat16", model=LM(**DEEPSEEK_7B)),
    )
