"""Synthetic languages that can be judged exactly.

A Markov chain has exact logits; answers to additions and to learnt questions are right or wrong.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Literal

import jax.numpy as jnp
import numpy as np

from jaxdistill.core.fields import LARGEST, Range, Share
from jaxdistill.core.net import Net, fixed_net
from jaxdistill.core.types import Array, Refused
from jaxdistill.data.base import Dataset
from jaxdistill.data.tokenizers import characters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Markov(Dataset):
    """A random Markov chain, stationary from the first token: tokens and mask [B length].

    tokens are int32; mask is float32, 1 but on the first token.

    After each context (the last two symbols, or one where `order` is 1) `branch` successors, drawn
    from `seed`, share the probability 1 - smoothing. All symbols share the rest evenly, so that
    every log-probability is finite.
    """

    vocab: int = 32  # symbols; the table has vocab^3 entries
    length: Annotated[int, Range(2, LARGEST)] = 64  # tokens
    order: Literal[1, 2] = 2  # symbols that the next one depends on
    branch: int = 4  # likely successors of a context
    skew: float = 1.0  # standard deviation of their log weights; 0: equally likely
    # Probability that any symbol follows. The stationary distribution is found by iteration, in
    # about 30 / smoothing steps at worst.
    smoothing: Annotated[float, Range(0.001, 1)] = 0.05

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.branch <= self.vocab:
            raise Refused(
                f"data.branch={self.branch}: expected 1 to {self.vocab}, the size of data.vocab"
            )

    @property
    def vocab_size(self):
        return self.vocab

    @functools.cached_property
    def likely(self) -> tuple[np.ndarray, np.ndarray]:
        """The likely successors of each context.

        Returns:
            Successors int [V V branch], and their shares of 1 - smoothing, float64 [V V branch].
        """
        v = self.vocab
        contexts = (v if self.order == 2 else 1, v)
        rng = np.random.default_rng([self.seed, self.vocab, self.branch])
        ranked = rng.random((*contexts, v)).argpartition(self.branch - 1, -1)
        successors = ranked[..., : self.branch]
        weights = np.exp(self.skew * rng.standard_normal(successors.shape))
        shares = weights / weights.sum(-1, keepdims=True)
        shape = (v, v, self.branch)
        return np.broadcast_to(successors, shape), np.broadcast_to(shares, shape)

    @functools.cached_property
    def transitions(self) -> tuple[np.ndarray, np.ndarray]:
        """The chain's distributions in float64.

        Returns:
            Stationary distribution of two neighbours [V V], and distribution of the symbol after
            them [V V V].
        """
        v = self.vocab
        successors, shares = self.likely
        table = np.zeros((v, v, v))
        np.put_along_axis(table, successors, (1 - self.smoothing) * shares, -1)
        table += self.smoothing / v
        pairs = np.full((v, v), v**-2.0)
        change = 1.0
        while change > 1e-12:  # the step is a contraction, since smoothing > 0
            after = np.einsum("ab,abc->bc", pairs, table)
            change = np.abs(after - pairs).sum()
            pairs = after / after.sum()
        return pairs, table

    @functools.cached_property
    def _bounds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tables for sampling by inversion: where a uniform number passes to the next choice.

        Returns:
            Bounds between the first pairs [V^2 - 1]; bounds between the likely successors of each
            context [branch - 1, V^2]; these successors [V^2 branch].
        """
        successors, shares = self.likely
        pairs, _ = self.transitions
        between = (
            self.smoothing + (1 - self.smoothing) * shares.cumsum(-1)[..., :-1]
        )
        by_context = between.reshape(self.vocab**2, -1).T.copy()
        return pairs.ravel().cumsum()[:-1], by_context, successors.ravel()

    def sequences(self, u: np.ndarray) -> dict[str, np.ndarray]:
        """The batch that uniform numbers [B length] select, by inversion."""
        first, between, successors = self._bounds
        u = np.ascontiguousarray(u.T)
        # Where u < smoothing any symbol follows, and u / smoothing chooses it.
        tokens = (u / self.smoothing * self.vocab).astype(np.int32)
        context = first.searchsorted(u[0], side="right")
        tokens[0], tokens[1] = np.divmod(context, self.vocab)
        for t in range(2, self.length):
            choice = (between.take(context, 1) <= u[t]).sum(0)
            likely = successors.take(context * self.branch + choice)
            tokens[t] = np.where(u[t] < self.smoothing, tokens[t], likely)
            context = tokens[t - 1] * self.vocab + tokens[t]
        mask = np.float32(np.arange(self.length) > 0)
        return {
            "tokens": np.ascontiguousarray(tokens.T),
            "mask": np.tile(mask, (u.shape[1], 1)),
        }

    def batch(self, index, samples):
        rng = np.random.default_rng([self.seed, 1, index])
        u = rng.random((self.batch_size, self.length))
        return self.sequences(u[samples])

    def evaluation(self, n):
        rng = np.random.default_rng([self.seed, 2])
        return self.sequences(rng.random((n, self.length)))

    def entropy(self) -> float:
        """Nats per token given the two before it.

        It is the least cross-entropy that a model can reach on tokens from the third on.
        """
        pairs, table = self.transitions
        return float(-np.einsum("ab,abc,abc->", pairs, table, np.log(table)))

    def log_probs(self, tokens: np.ndarray) -> np.ndarray:
        """Exact log-probability of each token of int [B T], T >= 2, given those before it.

        Returns:
            float64 [B T].
        """
        pairs, table = self.transitions
        alone = pairs.sum(1)
        first = tokens[:, 0]
        second = tokens[:, 1]
        start = np.stack([alone[first], (pairs / alone[:, None])[first, second]], 1)
        rest = table[tokens[:, :-2], tokens[:, 1:-1], tokens[:, 2:]]
        return np.log(np.concatenate([start, rest], 1))

    def net(self) -> Net:
        """The exact teacher, a network without weights: tokens [B T] -> logits float32 [B T V]."""
        return fixed_net(self.logits, config=self)

    def logits(self, tokens: Array, **_) -> Array:
        """Log-probabilities of the token after each position, float32 [B T V].

        The other arguments of a language model have no effect.
        """
        pairs, table = self.transitions
        after_one = jnp.asarray(
            np.log(pairs / pairs.sum(1, keepdims=True)), jnp.float32
        )
        after_two = jnp.asarray(np.log(table), jnp.float32)
        first = after_one[tokens[:, :1]]
        rest = after_two[tokens[:, :-1], tokens[:, 1:]]
        return jnp.concatenate([first, rest], 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Carry(Dataset):
    """Additions "a+b=c;" in columns of fixed width, with leading zeros: 3 digits + 4 tokens.

    tokens int32 and mask float32 [B length], 1 on c and ";"; prompt int32 and prompt_mask bool
    [B 2 digits + 2], the tokens before c. Ids 0-9 are the digits, 10 is "+", 11 "=", 12 ";", which
    ends the text, and 13 the padding.

    A pair (a, b) has the number 10^digits a + b. Pairs whose number leaves the remainder `seed`
    modulo 17 are held out.
    """

    # of a and b; c has one more, and fits into 32 bits
    digits: Annotated[int, Range(1, 8)] = 3

    vocab = 14
    plus = 10
    equals = 11
    eos = 12
    pad = 13
    alphabet = "0123456789+=;"  # of ids 0 to 12

    @property
    def vocab_size(self):
        return self.vocab

    @property
    def length(self) -> int:
        """Tokens of a sample."""
        return 3 * self.digits + 4

    def pairs(self, split: str) -> tuple[int, Callable[[np.ndarray], np.ndarray]]:
        """The pairs of a split.

        Returns:
            How many there are, and the function from 0, 1, ... to their numbers.
        """
        total = 100**self.digits
        remainder = self.seed % 17
        heldout = (total - remainder + 16) // 17
        if split == "test":
            return heldout, lambda i: 17 * i + remainder
        return (
            total - heldout,
            lambda i: i // 16 * 17 + i % 16 + (i % 16 >= remainder),
        )

    def write(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The samples of the pairs with these numbers [B]."""
        d = self.digits
        a, b = np.divmod(numbers, 10**d)
        plus = np.full((len(numbers), 1), self.plus, np.int32)
        equals = np.full((len(numbers), 1), self.equals, np.int32)
        end = np.full((len(numbers), 1), self.eos, np.int32)
        prompt = np.concatenate([_digits(a, d), plus, _digits(b, d), equals], 1)
        tokens = np.concatenate([prompt, _digits(a + b, d + 1), end], 1)
        target = np.float32(np.arange(self.length) >= prompt.shape[1])
        return {
            "tokens": tokens,
            "mask": np.tile(target, (len(numbers), 1)),
            "prompt": prompt,
            "prompt_mask": np.ones(prompt.shape, bool),
        }

    def batch(self, index, samples):
        count, number = self.pairs("train")
        rng = np.random.default_rng([self.seed, 1, index])
        drawn = rng.integers(count, size=self.batch_size)
        return self.write(number(drawn[samples]))

    def evaluation(self, n):
        count, number = self.pairs("test")
        rng = np.random.default_rng([self.seed, 2])
        return self.write(number(rng.choice(count, min(n, count), replace=False)))

    def correct(self, tokens: Array) -> Array:
        """Whether each sample [... length], prompt and answer, ends in the right sum and ";".

        Takes numpy arrays and, also inside jit, jax arrays.

        Returns:
            bool [...].
        """
        d = self.digits
        a = tokens[..., :d] @ _powers(d)
        b = tokens[..., d + 1 : 2 * d + 1] @ _powers(d)
        expected = (a + b)[..., None] // _powers(d + 1) % 10
        answer = tokens[..., 2 * d + 2 : -1]
        return (answer == expected).all(-1) & (tokens[..., -1] == self.eos)

    def text(self, tokens: np.ndarray) -> str:
        """The text of one sample's tokens [T]."""
        return "".join(self.alphabet[t] for t in tokens if t != self.pad)

    def tokenizer_files(self):
        end = self.alphabet[self.eos]
        return characters(self.alphabet, {"<pad>": self.pad}, eos=end, pad="<pad>")


@dataclasses.dataclass(frozen=True, kw_only=True)
class JunkCarry(Carry):
    """`Carry` where a share of the training problems cannot be solved.

    Their prompts are random symbols, and their sums random digits. Held-out problems are all sound.
    """

    junk: Share = 0.8  # share of the training problems

    def batch(self, index, samples):
        rng = np.random.default_rng([self.seed, 3, index])
        bad = (rng.random((self.batch_size, 1)) < self.junk)[samples]
        symbols = rng.integers(self.eos, size=(self.batch_size, self.length))
        noise = symbols[samples].astype(np.int32)
        in_answer = np.arange(self.length) > 2 * self.digits + 1
        noise = np.where(in_answer, noise % 10, noise)
        noise[:, -1] = self.eos
        batch = super().batch(index, samples)
        tokens = np.where(bad, noise, batch["tokens"])
        return {
            **batch,
            "tokens": tokens,
            "prompt": tokens[:, : 2 * self.digits + 2],
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall(Dataset):
    """Questions whose answers follow no rule and have to be memorised.

    tokens int32 and mask float32 [B 2 + answer], 1 on the answer; prompt int32 and prompt_mask bool
    [B 2], the question's number in two digits to the base `symbols`. Evaluation asks the questions
    that are trained on.
    """

    questions: int = 16
    answer: int = 6  # tokens of an answer
    symbols: int = 8  # ids, of questions and answers

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.questions <= self.symbols**2:
            raise Refused(
                f"data.questions={self.questions}: expected 1 to {self.symbols**2}, "
                "the square of data.symbols"
            )

    @property
    def vocab_size(self):
        return self.symbols

    @functools.cached_property
    def table(self) -> np.ndarray:
        """Every question with its answer, int32 [questions, 2 + answer]."""
        numbers = np.stack(np.divmod(np.arange(self.questions), self.symbols), 1)
        rng = np.random.default_rng([self.seed, 4])
        answers = rng.integers(self.symbols, size=(self.questions, self.answer))
        return np.concatenate([numbers, answers], 1).astype(np.int32)

    def write(self, which: np.ndarray) -> dict[str, np.ndarray]:
        """The samples of these questions [B]."""
        tokens = self.table[which]
        target = np.float32(np.arange(tokens.shape[1]) >= 2)
        return {
            "tokens": tokens,
            "mask": np.tile(target, (len(tokens), 1)),
            "prompt": tokens[:, :2],
            "prompt_mask": np.ones((len(tokens), 2), bool),
        }

    def batch(self, index, samples):
        rng = np.random.default_rng([self.seed, 1, index])
        drawn = rng.integers(self.questions, size=self.batch_size)
        return self.write(drawn[samples])

    def evaluation(self, n):
        return self.write(np.arange(min(n, self.questions)))

    def correct(self, tokens: Array) -> Array:
        """Whether each sample [... 2 + answer] is a question with its right answer, bool [...].

        Takes numpy arrays and jax arrays.
        """
        which = tokens[..., 0] * self.symbols + tokens[..., 1]
        return (jnp.asarray(self.table)[which] == tokens).all(-1)


def _digits(numbers: np.ndarray, width: int) -> np.ndarray:
    """The last `width` decimal digits of numbers [B], int32 [B width]."""
    return (numbers[:, None] // _powers(width) % 10).astype(np.int32)


def _powers(width: int) -> np.ndarray:
    """10^(width - 1), ..., 10, 1."""
    return 10 ** np.arange(width - 1, -1, -1, dtype=np.int32)
