"""Times steps of GKD against TRL's `GKDTrainer`: python tools/bench.py --trl.

Both train the same Llama (depth 4, width 128) on the same batch of 8 texts of 32 prompt tokens and
128 more, at vocabularies of 512 and 32 k, on-policy (the student generates the 128 tokens in the
step) and off-policy. A step has the roll-out, both networks, JSD with beta 0.5, gradient, clipping
and AdamW. Both sides run in each round; compilation is not counted. `loss_apart` is the relative
difference of the losses on the same weights and text. Needs torch, transformers and trl.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np

from jaxdistill import interop
from jaxdistill.core import sharding
from jaxdistill.core.types import Refused
from jaxdistill.methods.language.gkd import GKD
from jaxdistill.run.table import text_table
from tools.bench_cases import Case, language

PROMPT = 32  # tokens


def modules():
    """(torch, transformers, datasets, GKDConfig, GKDTrainer). Raises Refused without one."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        import datasets
        import torch
        import transformers

        try:
            from trl.experimental.gkd import GKDConfig, GKDTrainer
        except ImportError:
            from trl import GKDConfig, GKDTrainer  # before TRL 1.0
    except ImportError as error:
        raise Refused(
            f"--trl: needs torch, transformers and trl ({error}); "
            "pip install 'jaxdistill[torch]' trl"
        ) from error
    return torch, transformers, datasets, GKDConfig, GKDTrainer


class Theirs:
    """TRL's trainer, with the weights and the batch of a case."""

    def __init__(self, case, on_policy: float, folder: Path):
        torch, transformers, datasets, GKDConfig, GKDTrainer = modules()
        transformers.logging.set_verbosity_error()
        weights = {
            "teacher": case.state.frozen["teacher"],
            "student": case.state.params["student"],
        }
        models = {}
        for role, params in weights.items():
            interop.save(folder / role, case.nets[role], params)
            models[role] = transformers.AutoModelForCausalLM.from_pretrained(
                folder / role,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
            )
        tokens = np.array(case.batch["tokens"])
        length = tokens.shape[1]
        args = GKDConfig(
            output_dir=str(folder / "out"),
            use_cpu=True,
            report_to=[],
            lmbda=on_policy,
            beta=0.5,
            temperature=1.0,
            max_new_tokens=length - PROMPT,
            max_length=length,
            per_device_train_batch_size=len(tokens),
            learning_rate=1e-4,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            disable_tqdm=True,
        )
        rows = datasets.Dataset.from_list(
            [{"input_ids": row.tolist()} for row in tokens]
        )
        self.trainer = GKDTrainer(
            models["student"],
            models["teacher"],
            args=args,
            train_dataset=rows,
            data_collator=lambda rows: rows,
            processing_class=self._tokenizer(transformers),
        )
        self.trainer.create_optimizer()
        # set by TRL's own loop
        self.trainer.current_gradient_accumulation_steps = 1
        for settings in (
            self.trainer.generation_config,
            self.trainer.model.generation_config,
        ):
            settings.eos_token_id = None  # both sides generate full-length texts
        self.torch = torch
        ids = torch.tensor(tokens, dtype=torch.long)
        labels = ids.clone()
        labels[:, 0] = -100
        ones = torch.ones_like(ids)
        self.batch = {"input_ids": ids, "attention_mask": ones, "labels": labels}
        self.batch |= {
            "prompts": ids[:, :PROMPT],
            "prompt_attention_mask": ones[:, :PROMPT],
        }

    def _tokenizer(self, transformers):
        from tokenizers import Tokenizer, models

        inner = Tokenizer(
            models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>")
        )
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=inner, pad_token="<pad>", eos_token="</s>"
        )

    def step(self) -> float:
        """Takes one optimiser step; returns the loss before it."""
        trainer = self.trainer
        trainer.model.train()
        loss = trainer.training_step(trainer.model, dict(self.batch))
        self.torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return float(loss)


def compare(
    steps: int, rounds: int, vocabularies: tuple[int, ...] = (512, 32_000)
) -> list[dict]:
    """Prints and returns a row for each vocabulary and kind of step.

    Raises:
        Refused: TRL is not installed.
    """
    modules()
    rows = []
    for vocab in vocabularies:
        for name, on_policy in (("on-policy", 1.0), ("off-policy", 0.0)):
            method = GKD(beta=0.5, on_policy=on_policy, prompt_length=PROMPT)
            case = Case(language(method, vocab))
            row = {
                "vocab": vocab,
                "step": name,
                **_measured(case, on_policy, steps, rounds),
            }
            rows.append(row)
            print(text_table([row]), flush=True)
    print(f"\n{text_table(rows)}")
    return rows


def _measured(case: Case, on_policy: float, steps: int, rounds: int) -> dict:
    """Times of both sides, and the relative difference of their first losses."""
    experiment = case.experiment

    def step():
        jax.block_until_ready(case.engine(1))

    with (
        tempfile.TemporaryDirectory() as folder,
        sharding.use(experiment.mesh, experiment.settings.rules),
    ):
        theirs = Theirs(case, on_policy, Path(folder))
        loss = float(jax.device_get(case.engine(0)["student/loss"]))
        their_loss = theirs.step()
        sides = {"jaxdistill": step, "trl": theirs.step}
        seconds = {"jaxdistill": [], "trl": []}
        for n in range(rounds):
            order = ("jaxdistill", "trl") if n % 2 else ("trl", "jaxdistill")
            for name in order:
                seconds[name].append(_seconds(sides[name], steps))
    ratios = [b / a for a, b in zip(seconds["jaxdistill"], seconds["trl"])]
    return {
        "jaxdistill_ms": 1e3 * statistics.median(seconds["jaxdistill"]),
        "trl_ms": 1e3 * statistics.median(seconds["trl"]),
        "trl/jaxdistill": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "loss_apart": abs(loss / their_loss - 1),
    }


def _seconds(step, steps: int) -> float:
    """Seconds of one of `steps` steps."""
    started = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - started) / steps


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from launch._command import main, no_command

    main(no_command, __doc__)
