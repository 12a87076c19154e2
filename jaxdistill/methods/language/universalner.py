"""UniversalNER - Targeted Distillation from Large Language Models for Open NER (arXiv:2308.03279).

One broad skill is copied from a teacher that only answers in text. The teacher lists the entities
of many passages, with types in its own words; the student is tuned on conversations that ask for
one type at a time (data/ner.py). Types that do not occur are asked for too, so that it learns to
answer "none". There are no teacher probabilities: the loss is that of supervised fine-tuning on the
tokens of the answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jaxdistill.methods.language.sft import SFT
from jaxdistill.samplers.text import generate


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniversalNER(SFT):
    """L = - sum_j m_j log q(c_j | c_<j) / sum_j m_j over a batch of conversations; m is 1 at the
    tokens of answers and at their end tokens.
    """

    # longest answer, tokens
    answer_length: int = 256

    def answer(
        self, net: Callable, prompt: Int[np.ndarray, " P"], eos: int
    ) -> np.ndarray:
        """The student's greedy answer, int [n], without the end token.

        Args:
          net: the student with its weights bound.
          prompt: a conversation (data.ner.encode).
          eos: the token that ends an answer.
        """
        size = len(prompt)
        length = size + self.answer_length
        prompts = jnp.asarray(prompt)[None]
        tokens, valid = generate(
            net, prompts, length, jax.random.key(0), temperature=0.0, eos=eos
        )
        answer = np.asarray(tokens[0, size:])
        answer = answer[np.asarray(valid[0, size:])]
        return answer[answer != eos]
