"""Times generation with a cache against transformers' `generate`, greedily on the same weights.

python tools/bench_generate.py [--dim=256] [--depth=6] [--batch=8] [--prompt=16] [--new=64] \\
    [--rounds=5]

Prints the time per token of both, the median of the ratios, and the share of equal tokens. Needs
the extra [torch]. Compilation is not counted. Each side takes the accelerator that it finds:
JAX_PLATFORMS=cpu runs both on the CPU.
"""

from __future__ import annotations

import functools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

from jaxdistill.core.types import Refused
from launch._command import arguments, main, whole

KNOWN = {"dim": 256, "depth": 6, "batch": 8, "prompt": 16, "new": 64, "rounds": 5}


def seconds(call) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def bench_generate(argv: list[str]) -> None:
    values, _ = arguments(
        argv, {name: str(default) for name, default in KNOWN.items()}
    )
    args = SimpleNamespace(**{name: whole(values, name, 1) for name in KNOWN})
    if args.dim % 16:
        raise Refused(
            f"--dim={args.dim}: expected a multiple of 16, for 8 heads of even width"
        )
    try:
        import torch
        import transformers
    except ImportError as error:
        raise Refused(
            f"bench_generate: needs torch ({error}); pip install 'jaxdistill[torch]'"
        ) from None
    import jax
    import numpy as np

    from jaxdistill import interop
    from jaxdistill.samplers.text import generate

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=args.dim,
        intermediate_size=3 * args.dim,
        num_hidden_layers=args.depth,
        num_attention_heads=8,
        num_key_value_heads=4,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        net, params = interop.load(folder)
    prompt = np.random.default_rng(0).integers(0, 1024, (args.batch, args.prompt))

    @jax.jit
    def generated(params, prompt):
        bound = functools.partial(net.apply, params)
        length = args.prompt + args.new
        tokens, *_ = generate(
            bound, prompt, length, jax.random.key(0), temperature=0.0
        )
        return tokens

    inputs = {
        "input_ids": torch.tensor(prompt),
        "attention_mask": torch.ones(prompt.shape, dtype=torch.int64),
    }
    lengths = {"max_new_tokens": args.new, "min_new_tokens": args.new}

    def ours():
        return np.asarray(generated(params, prompt))

    def theirs():
        return model.generate(**inputs, **lengths, do_sample=False).numpy()

    same = float(np.mean(ours() == theirs()))
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(args.rounds)]
    per_token = [
        1e6 * statistics.median(column) / args.new for column in zip(*pairs)
    ]
    ratio = statistics.median(b / a for a, b in pairs)
    print(
        f"{jax.default_backend()}: dim {args.dim}, depth {args.depth}, batch {args.batch},"
        f" {args.new} tokens, {args.rounds} rounds"
    )
    print(
        f"jaxdistill {per_token[0]:.0f} us a token, transformers {per_token[1]:.0f} us a token:"
        f" {ratio:.1f} times as fast"
    )
    print(f"{100 * same:.1f} % of the tokens agree")


if __name__ == "__main__":
    main(bench_generate)
