"""Prompts that a teacher reads and a student does not."""

from __future__ import annotations

import jax.numpy as jnp

from jaxdistill.core.types import Batch


def solution_first(batch: Batch, prompt_length: int = 0) -> Batch:
    """Every problem with its solution in front: problem, solution, problem again, response.

    Args:
      batch: problems and responses of T tokens, as `samplers.text.respond` gives them; its prompts
        have P tokens. The solution is what `answer_mask` marks of `answer`, or, where nothing has
        been generated, what `mask` marks of `tokens`.
      prompt_length: P, for a batch without "prompt".

    Returns:
      The batch with sequences of 2 T tokens, padded on the left as in `data.text:PaddedJson`:
      tokens, segments, positions int32 [B 2T], mask float32 [B 2T], prompt int32 [B T+P] and
      prompt_mask bool [B T+P]. The last T columns belong to those of `batch`, from the last token
      of the prompt on. Without a solution a sequence has nothing in front of its problem.
    """
    tokens = batch["tokens"]
    solution = batch.get("answer", tokens)
    solution_mask = batch.get("answer_mask", batch["mask"])
    width = batch["prompt"].shape[1] if "prompt" in batch else prompt_length
    if "prompt_mask" in batch:
        problem_seen = batch["prompt_mask"].astype(bool)
    else:
        problem_seen = jnp.ones((len(tokens), width), bool)
    solution_seen = solution_mask[:, width:] > 0
    if "segments" in batch:
        response_seen = batch["segments"][:, width:] > 0
    else:
        response_seen = jnp.ones(solution_seen.shape, bool)

    problem = tokens[:, :width]
    response = tokens[:, width:]
    shown = problem_seen & solution_seen.any(1, keepdims=True)
    seen = jnp.concatenate([shown, solution_seen, problem_seen], 1)
    text = jnp.concatenate([problem, solution[:, width:], problem], 1)
    padding_first = jnp.argsort(seen, axis=1, stable=True)
    prompt = jnp.take_along_axis(text, padding_first, 1)
    prompt_mask = jnp.take_along_axis(seen, padding_first, 1)
    valid = jnp.concatenate([prompt_mask, response_seen], 1)
    return {
        **batch,
        "tokens": jnp.concatenate([prompt, response], 1),
        "segments": valid.astype(jnp.int32),
        "mask": jnp.concatenate([jnp.zeros_like(batch["mask"]), batch["mask"]], 1),
        "positions": jnp.maximum(jnp.cumsum(valid, 1, dtype=jnp.int32) - 1, 0),
        "prompt": prompt,
        "prompt_mask": prompt_mask,
    }
