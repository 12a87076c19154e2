"""The vocabulary of the whole library: six types and one base class.

A *role* is the name of a network ("student", "teacher", "fake", "disc").
A *turn* is one optimiser update: which roles move, on which loss, at which steps.
A *stage* is a training run inside a method, with optional surgery before it.
A *method* is a frozen dataclass of hyper-parameters that lists its turns.
"""

from __future__ import annotations

import dataclasses
import difflib
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np

Array = jax.Array | np.ndarray  # functions take both; what they compute is jax's
Params = dict[str, Any]  # nested plain dict of arrays; the only weight format in the library
Batch = Mapping[str, Array]
Metrics = dict[str, Any]  # name -> scalar, or (sum, count) where a metric has a count of its own
Nets = SimpleNamespace  # role -> callable with its weights already bound


class Refused(ValueError):
    """Bad input. The message is one printable line (what, where, what was expected); commands exit
    with code 2.

    Line ends in it become blanks, and characters that cannot be printed U+FFFD: names in files hold
    both.
    """

    def __init__(self, message: object):
        super().__init__(printable(" ".join(str(message).splitlines())))


def printable(text: str) -> str:
    """`text` with U+FFFD for every character that cannot be printed."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def one_line(value: object, most: int = 300) -> str:
    """The first line of what others say (an exception, a name in a file), printable and cut: a part
    of a refusal.
    """
    first = (str(value).strip().splitlines() or [type(value).__name__])[0]
    return printable(first)[:most]


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a message: "; did you mean 'x'?", or the list of names where none is near. Unnamed
    ones ("") are left out.
    """
    names = sorted(filter(None, names))
    close = difflib.get_close_matches(name, names, 1)
    return (
        f"; did you mean {close[0]!r}?"
        if close
        else f"; expected {'one of ' * (len(names) > 1)}{', '.join(names)}"
    )


def lookup(table: Mapping[str, Any], name: str, what: str) -> Any:
    """table[name]. Raises Refused, naming the nearest key, where there is none."""
    if name not in table:
        raise Refused(f"{what}={name!r}: {nearest(name, table)[2:]}")
    return table[name]


def named_key(key: Array, name: str) -> Array:
    """The key that belongs to a name."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)


@jax.tree_util.register_pytree_node_class
class Means(dict):
    """What a step reports: name -> mean, float32 []. `counts` has, by name, how many valid tokens
    or samples the mean is over (float32 []), where the loss counts them: means over several steps
    weigh each token alike. The others count by step.
    """

    def __init__(self, means: Mapping[str, Array], counts: Mapping[str, Array]):
        super().__init__(means)
        self.counts = dict(counts)

    def tree_flatten(self):
        names = tuple(sorted(self))
        counted = tuple(sorted(self.counts))
        return ([self[name] for name in names], [self.counts[name] for name in counted]), (
            names,
            counted,
        )

    @classmethod
    def tree_unflatten(cls, names, values):
        return cls(*(zip(keys, held) for keys, held in zip(names, values)))


@flax.struct.dataclass
class State:
    """Everything that changes during training, plus the frozen nets that ride along."""

    step: Array  # int32 []: engine steps done
    count: dict[str, Array]  # role -> int32 []: optimiser updates that the role has had
    params: dict[str, Params]  # roles that move, in float32
    opt: dict[str, Any]  # role -> optax state
    ema: dict[str, Params]  # role -> averaged params
    frozen: dict[str, Params]  # roles that never move; not checkpointed
    memory: dict[str, Any]  # what a method remembers: histograms, queues, running statistics


@dataclasses.dataclass(frozen=True)
class Ctx:
    """What a loss may look at besides the networks."""

    batch: Batch
    rng: Array
    step: Array
    memory: Mapping[str, Any]

    def key(self, name: str) -> Array:
        """A key that depends on the name only, so that adding a draw never shifts another one."""
        return named_key(self.rng, name)


class Out(NamedTuple):
    """What a loss returns.

    Without `count`, loss and metrics are means over the (micro-)batch. With it they are sums over
    `count` valid tokens or samples, and the engine divides by the global count: over all
    micro-batches and all shards. A loss that adds up means over different counts needs the whole
    batch's, which a `gather` can put into it.
    """

    loss: Array
    metrics: Metrics = {}
    memory: dict[str, Any] = {}  # replaces the same keys of State.memory
    count: Array | None = None


LossFn = Callable[[Nets, Ctx], Out]


def always(step: int) -> bool:
    return True


@dataclasses.dataclass(frozen=True)
class Turn:
    """Update `moves` by descending `loss`, at the steps where `when(step)` holds.

    A turn that moves nothing measures: its metrics are named `measured/...`, and it may write to
    the memory.
    `when` is asked on the host: each pattern of active turns is its own XLA program. `gather` runs
    first, without gradient, on the whole batch, and returns the batch that `loss` will see
    (roll-outs, teacher trajectories). `after(weights, step)` follows the update: from every role's
    weights (under the names that losses know) it makes new ones of some trained roles (couplings
    between networks, recordings), and returns these by role. `decay(k)`, where there is one, is the
    weight of the old average at a role's update number k, from 1, in place of the config's.
    """

    moves: tuple[str, ...]
    loss: LossFn
    when: Callable[[int], bool] = always
    gather: Callable[[Nets, Ctx], Batch] | None = None
    after: Callable[[Mapping[str, Params], Array], Mapping[str, Params]] | None = None
    decay: Callable[[Array], Array] | None = None


@dataclasses.dataclass(frozen=True)
class Collect:
    """Data that is made before a stage and stored: `batches` calls of `make(nets, ctx) -> batch`,
    without gradient.

    The arrays (batch axis first) become records in the run's folder, and the stage reads these
    instead of the data set, shuffled. A resumed run makes only what is missing.
    """

    make: Callable[[Nets, Ctx], Batch]
    batches: int


@dataclasses.dataclass(frozen=True)
class Stage:
    """A training run inside a multi-stage method: surgery, then collection of data, then steps.

    `surgery(nets, params, batch) -> (nets, params)` rewrites networks and weights before it: a
    stage hands its result (averaged weights where a role has them) to the next one's surgery. It
    must be deterministic, because a resumed run calls it again.
    """

    method: Method
    steps: int
    surgery: Callable[..., tuple[dict[str, Any], dict[str, Params]]] | None = None
    collect: Collect | None = None


def stage_lengths(steps: int, shares: int | Sequence[float]) -> tuple[int, ...]:
    """How many of `steps` each stage gets, with the sum `steps`.

    `shares`: the number of stages, equally long (the first ones longer by one where they cannot
    be), or the relative length of each.
    """
    if isinstance(shares, int):
        return tuple((steps + i) // shares for i in reversed(range(shares)))
    ends = [round(steps * sum(shares[: i + 1]) / sum(shares)) for i in range(len(shares))]
    return tuple(end - start for start, end in zip([0, *ends], ends))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """Base of all methods. Override `turns`; the rest has defaults."""

    inits = {
        "student": "teacher"
    }  # trained role -> role it is copied from, or None for fresh weights
    frozen = ("teacher",)
    ema = ("student",)  # roles with averaged weights, bound as `ema_<role>`
    # whether `sample` goes from one of its times to the next with fresh noise, or with its own
    # predicted noise (DDIM)
    renoises = True
    exports = (
        "student",
    )  # roles that make up the trained generator: where several, each leaves in a folder of its own

    needs = {}  # batch key -> its typed shape (core/needs.py); what else a batch has, it may use

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The updates of a step, in order: here one of the student, by `loss`."""
        return (Turn(("student",), self.loss),)

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        """What the student's turn descends, where `turns` is not overridden."""
        raise NotImplementedError

    @property
    def cycle(self) -> int:
        """Steps in which every turn is taken, the student's once."""
        return 1

    def settled(self) -> Method:
        """The method with the turns that it takes most of the time: without its first phase."""
        return self

    def memory(self) -> dict[str, Any]:
        """Initial content of State.memory."""
        return {}

    def check(self, nets: Mapping[str, Any], data: Any) -> None:
        """Raises Refused where these networks (role -> core.net.Net) or this data set do not fit;
        asked before anything runs.
        """

    def stages(self, steps: int) -> tuple[Stage, ...]:
        """How `steps` engine steps are spent."""
        return (Stage(self, steps),)

    def controller(self) -> Controller | None:
        """The host-side part: data mixtures, pass rates, curricula."""
        return None

    def exported(self, net: Any, params: Params) -> tuple[Any, Params]:
        """A role of `exports` as it leaves for PyTorch: (net, params)."""
        return net, params

    def generator(self, net: Nets) -> Callable:
        """The trained generator that `sample` takes; experts by time or by condition are routed
        here.
        """
        return net.student

    def initial(self, noise: Array) -> Array:
        """Unit Gaussian noise as `sample` is given it; `process.start` makes a state at t_max of
        it.
        """
        return noise

    def sampling_times(self, steps: int) -> Array:
        """Where `sample` asks the network, falling [steps]. Raises Refused where `sample` is no
        such chain.
        """
        raise Refused(
            f"{type(self).__name__}: its sampler is more than a chain of x0 at fixed times"
        )

    def sample(self, net: Callable, noise: Array, cond: Any, key: Array, steps: int) -> Array:
        """Samples of a trained `net` (from `generator`) at `steps` network evaluations, from unit
        Gaussian noise.
        """
        raise NotImplementedError


class Controller:
    """Host-side state that steers the data. `state`/`restore` make it part of every checkpoint."""

    def update(self, metrics: Mapping[str, float]) -> Mapping[str, Any]:
        """Called with each logging interval's mean metrics (over its tokens or samples, where the
        loss counts them; else over its steps); returns hints that the data pipeline receives.
        """
        return {}

    def state(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass
