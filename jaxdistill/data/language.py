"""Synthetic languages whose law is known: a Markov chain with exact logits, and additions that can
be checked.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from jaxdistill.core.net import Net, fixed_net
from jaxdistill.core.types import Array, Refused
from jaxdistill.data.base import Dataset
from jaxdistill.data.tokenizers import characters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Markov(Dataset):
    """tokens int32 [length], mask float32 [length]: a random chain, in its stationary law from the
    start.

    After each pair of symbols (each symbol, where `order` is 1) `branch` successors, drawn from
    `seed`, share the probability 1 - smoothing, and all symbols share the rest evenly, so that
    every log probability is finite. mask is 1 but on the first token.
    """

    vocab: int = 32  # the table has vocab^3 entries
    length: int = 64  # tokens
    order: int = 2  # symbols that the next one depends on
    branch: int = 4  # likely successors of a context
    skew: float = 1.0  # standard deviation of their log weights; 0: equally likely
    smoothing: float = 0.05  # probability that any symbol follows

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.branch <= self.vocab:
            raise Refused(
                f"data.branch={self.branch}: expected 1 to {self.vocab}, the size of data.vocab"
            )
        if self.order not in (1, 2):
            raise Refused(f"data.order={self.order}: expected 1 or 2")
        if self.length < 2:
            raise Refused(f"data.length={self.length}: expected at least 2 tokens")
        if (
            not 0.001 <= self.smoothing <= 1
        ):  # the stationary law is iterated for about 30 / smoothing steps at worst
            raise Refused(f"data.smoothing={self.smoothing}: expected 0.001 to 1")

    @functools.cached_property
    def likely(self) -> tuple[np.ndarray, np.ndarray]:
        """(successors int [V, V, branch], their shares of 1 - smoothing, float64 [V, V, branch]) of
        each context.
        """
        v = self.vocab
        rng = np.random.default_rng([self.seed, self.vocab, self.branch])
        successors = rng.random((v if self.order == 2 else 1, v, v)).argpartition(
            self.branch - 1, -1
        )[..., : self.branch]
        weights = np.exp(self.skew * rng.standard_normal(successors.shape))
        every = lambda x: np.broadcast_to(x, (v, v, self.branch))
        return every(successors), every(weights / weights.sum(-1, keepdims=True))

    @functools.cached_property
    def transitions(self) -> tuple[np.ndarray, np.ndarray]:
        """(pairs [V, V], next [V, V, V]) in float64: stationary law of two neighbours, and of what
        follows them.
        """
        v, (successors, shares) = self.vocab, self.likely
        table = np.zeros((v, v, v))
        np.put_along_axis(table, successors, (1 - self.smoothing) * shares, -1)
        table += self.smoothing / v
        pairs = np.full((v, v), v**-2.0)
        change = 1.0
        while change > 1e-12:  # a contraction, since smoothing > 0
            after = np.einsum("ab,abc->bc", pairs, table)
            pairs, change = after / after.sum(), np.abs(after - pairs).sum()
        return pairs, table

    @functools.cached_property
    def _bounds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where a uniform number changes its choice, of the first pair [V^2 - 1] and of the likely
        successors [branch - 1, V^2]; and those successors [V^2 branch].
        """
        successors, shares = self.likely
        steps = self.smoothing + (1 - self.smoothing) * shares.cumsum(-1)[..., :-1]
        return (
            self.transitions[0].ravel().cumsum()[:-1],
            steps.reshape(self.vocab**2, -1).T.copy(),
            successors.ravel(),
        )

    def walk(self, u: np.ndarray) -> dict[str, np.ndarray]:
        """The sequences that uniform numbers u [B, length] select, by inversion."""
        first, steps, successors = self._bounds
        u = np.ascontiguousarray(u.T)
        tokens = (u / self.smoothing * self.vocab).astype(
            np.int32
        )  # the choice where u < smoothing
        context = first.searchsorted(u[0], side="right")
        tokens[0], tokens[1] = np.divmod(context, self.vocab)
        for t in range(2, self.length):
            likely = successors.take(
                context * self.branch + (steps.take(context, 1) <= u[t]).sum(0)
            )
            tokens[t] = np.where(u[t] < self.smoothing, tokens[t], likely)
            context = tokens[t - 1] * self.vocab + tokens[t]
        mask = np.float32(np.arange(self.length) > 0)
        return {"tokens": np.ascontiguousarray(tokens.T), "mask": np.tile(mask, (u.shape[1], 1))}

    def batch(self, index, rows):
        return self.walk(
            np.random.default_rng([self.seed, 1, index]).random((self.batch_size, self.length))[
                rows
            ]
        )

    def evaluation(self, n):
        return self.walk(np.random.default_rng([self.seed, 2]).random((n, self.length)))

    def entropy(self) -> float:
        """Nats per token, given the two before it: the least cross-entropy that a model can reach
        on later tokens.
        """
        pairs, table = self.transitions
        return float(-np.einsum("ab,abc,abc->", pairs, table, np.log(table)))

    def log_probs(self, tokens: np.ndarray) -> np.ndarray:
        """Exact log probability of each token given those before it: float64 [B, T] of int [B, T],
        T >= 2.
        """
        pairs, table = self.transitions
        first = tokens[:, 0]
        second = tokens[:, 1]
        start = [pairs.sum(1)[first], (pairs / pairs.sum(1, keepdims=True))[first, second]]
        rest = table[tokens[:, :-2], tokens[:, 1:-1], tokens[:, 2:]]
        return np.log(np.concatenate([np.stack(start, 1), rest], 1))

    def net(self) -> Net:
        """The exact teacher as a network without weights: tokens [B, T] -> logits float32 [B, T,
        V].
        """
        return fixed_net(self.logits, config=self)

    def logits(self, tokens: Array, **_) -> Array:
        """Log law of the token after each position. A language model's other arguments change
        nothing here.
        """
        pairs, table = self.transitions
        after_one = jnp.asarray(np.log(pairs / pairs.sum(1, keepdims=True)), jnp.float32)
        after_two = jnp.asarray(np.log(table), jnp.float32)
        return jnp.concatenate(
            [after_one[tokens[:, :1]], after_two[tokens[:, :-1], tokens[:, 1:]]], 1
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Carry(Dataset):
    """Additions "a+b=c;" in columns of fixed width, all with leading zeros: 3 digits + 4 tokens.

    tokens int32 and mask float32 [length], 1 on c and ";"; prompt int32 and prompt_mask bool [2
    digits + 2]: what stands before c. Ids 0-9 are the digits, 10 "+", 11 "=", 12 ";" (ends the
    text), 13 pads. Of all pairs, those whose number 10^digits a + b leaves the remainder `seed`
    modulo 17 are kept for evaluation and never trained on.
    """

    digits: int = 3  # of a and b; c has one more

    vocab = 14
    plus = 10
    equals = 11
    eos = 12
    pad = 13
    alphabet = "0123456789+=;"  # of ids 0 to 12

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.digits <= 8:
            raise Refused(
                f"data.digits={self.digits}: expected 1 to 8, so that a sum fits into 32 bits"
            )

    @property
    def length(self) -> int:
        """Tokens a row."""
        return 3 * self.digits + 4

    def pairs(self, split: str) -> tuple[int, Callable[[np.ndarray], np.ndarray]]:
        """How many pairs `split` has, and the function from 0, 1, ... to their numbers 10^digits a
        + b.
        """
        total = 100**self.digits
        kept = self.seed % 17
        held = (total - kept + 16) // 17
        if split == "test":
            return held, lambda i: 17 * i + kept
        return total - held, lambda i: i // 16 * 17 + i % 16 + (i % 16 >= kept)

    def write(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The rows of these pairs."""
        d = self.digits
        a, b = np.divmod(numbers, 10**d)
        columns = lambda n, width: (n[:, None] // _powers(width) % 10).astype(np.int32)
        sign = lambda symbol: np.full((len(numbers), 1), symbol, np.int32)
        prompt = np.concatenate(
            [columns(a, d), sign(self.plus), columns(b, d), sign(self.equals)], 1
        )
        tokens = np.concatenate([prompt, columns(a + b, d + 1), sign(self.eos)], 1)
        mask = np.tile(np.float32(np.arange(self.length) >= prompt.shape[1]), (len(numbers), 1))
        return {
            "tokens": tokens,
            "mask": mask,
            "prompt": prompt,
            "prompt_mask": np.ones(prompt.shape, bool),
        }

    def batch(self, index, rows):
        count, number = self.pairs("train")
        return self.write(
            number(
                np.random.default_rng([self.seed, 1, index]).integers(count, size=self.batch_size)[
                    rows
                ]
            )
        )

    def evaluation(self, n):
        count, number = self.pairs("test")
        return self.write(
            number(
                np.random.default_rng([self.seed, 2]).choice(count, min(n, count), replace=False)
            )
        )

    def correct(self, tokens: Array) -> Array:
        """Whether each row [..., length], prompt and answer, ends in exactly the right sum and ";":
        bool [...].

        Takes numpy and, inside jit too, jax arrays.
        """
        d = self.digits
        a = tokens[..., :d] @ _powers(d)
        b = tokens[..., d + 1 : 2 * d + 1] @ _powers(d)
        want = (a + b)[..., None] // _powers(d + 1) % 10
        return (tokens[..., 2 * d + 2 : -1] == want).all(-1) & (tokens[..., -1] == self.eos)

    def text(self, tokens: np.ndarray) -> str:
        """One row as it reads."""
        return "".join(self.alphabet[t] for t in tokens if t != self.pad)

    def tokenizer_files(self):
        return characters(
            self.alphabet, {"<pad>": self.pad}, eos=self.alphabet[self.eos], pad="<pad>"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class JunkCarry(Carry):
    """`Carry` of which a share of the training problems cannot be solved: random symbols for a
    prompt, a random sum.

    What is kept for evaluation has none.
    """

    junk: float = 0.8  # their share

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.junk <= 1:
            raise Refused(f"data.junk={self.junk}: expected 0 to 1")

    def batch(self, index, rows):
        rng = np.random.default_rng([self.seed, 3, index])
        bad = (rng.random((self.batch_size, 1)) < self.junk)[rows]
        noise = rng.integers(self.eos, size=(self.batch_size, self.length))[rows].astype(np.int32)
        answers = np.arange(self.length) > 2 * self.digits + 1
        noise = np.where(answers, noise % 10, noise)
        noise[:, -1] = self.eos
        batch = super().batch(index, rows)
        tokens = np.where(bad, noise, batch["tokens"])
        return {**batch, "tokens": tokens, "prompt": tokens[:, : 2 * self.digits + 2]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall(Dataset):
    """Questions whose answers follow no rule, to be learnt by heart: tokens int32 and mask float32
    [2 + answer], 1 on the answer; prompt int32 and prompt_mask bool [2], the question's number in
    two digits to the base `symbols`.

    Evaluation asks the questions that are trained on.
    """

    questions: int = 16
    answer: int = 6  # tokens of it
    symbols: int = 8  # ids, of questions and answers

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.questions <= self.symbols**2:
            raise Refused(
                f"data.questions={self.questions}: expected 1 to {self.symbols**2}, the square of data.symbols"
            )

    @property
    def vocab_size(self):
        return self.symbols

    @functools.cached_property
    def table(self) -> np.ndarray:
        """int32 [questions, 2 + answer]"""
        number = np.stack(np.divmod(np.arange(self.questions), self.symbols), 1)
        answers = np.random.default_rng([self.seed, 4]).integers(
            self.symbols, size=(self.questions, self.answer)
        )
        return np.concatenate([number, answers], 1).astype(np.int32)

    def write(self, which: np.ndarray) -> dict[str, np.ndarray]:
        """The rows of these questions."""
        tokens = self.table[which]
        mask = np.tile(np.float32(np.arange(tokens.shape[1]) >= 2), (len(tokens), 1))
        return {
            "tokens": tokens,
            "mask": mask,
            "prompt": tokens[:, :2],
            "prompt_mask": np.ones((len(tokens), 2), bool),
        }

    def batch(self, index, rows):
        return self.write(
            np.random.default_rng([self.seed, 1, index]).integers(
                self.questions, size=self.batch_size
            )[rows]
        )

    def evaluation(self, n):
        return self.write(np.arange(min(n, self.questions)))

    def correct(self, tokens: Array) -> Array:
        """Whether each row [..., 2 + answer] is a question with exactly its answer: bool [...];
        numpy or jax arrays.
        """
        which = tokens[..., 0] * self.symbols + tokens[..., 1]
        return (jnp.asarray(self.table)[which] == tokens).all(-1)


def _powers(width: int) -> np.ndarray:
    """10^(width - 1), ..., 10, 1."""
    return 10 ** np.arange(width - 1, -1, -1, dtype=np.int32)
