"""The types that every method uses.

A *role* is the name of a network ("student", "teacher", "fake", "disc").
A *step* (engine step) is one call of the train step. It takes one or more turns.
A *turn* is one optimiser update: the roles that are trained, their loss, the steps that take it.
A *stage* is a training run inside a method. *Surgery* may change networks and weights before
it starts.
A *method* is a frozen dataclass of hyper-parameters that lists its turns.
"""

from __future__ import annotations

import dataclasses
import difflib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np

Array = jax.Array | np.ndarray  # arguments may be either; results are jax.Array
# nested dict of arrays; the only format of weights in the library
Params = dict[str, Any]
Batch = Mapping[str, Array]
# name -> scalar, or (sum, count) if a metric has its own count
Metrics = dict[str, Any]
Nets = SimpleNamespace  # role -> network as a callable with its weights bound


class Refused(ValueError):
    """Bad input; commands print the message and exit with code 2.

    The message is one line: what, where, and what was expected. Line breaks in it become blanks,
    and characters that cannot be printed become U+FFFD, since names in files may hold both.
    """

    def __init__(self, message: object):
        super().__init__(printable(" ".join(str(message).splitlines())))


def printable(text: str) -> str:
    """`text` with U+FFFD for every character that cannot be printed."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def one_line(value: object, most: int = 300) -> str:
    """A text from outside (an exception, a name in a file), shortened for a message.

    Returns its first line, printable, with at most `most` characters; the name of its type where
    the text is empty.
    """
    lines = str(value).strip().splitlines()
    first = lines[0] if lines else type(value).__name__
    return printable(first)[:most]


def quoted(value: object, most: int = 120) -> str:
    """A value as a message quotes it: as Python writes it, on one line and cut."""
    text = " ".join(repr(value).split())
    return text if len(text) <= most else text[: most - 3] + "..."


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: "; did you mean 'x'?".

    Where no name is near it lists all of them. Empty names are left out.
    """
    known = sorted(filter(None, names))
    close = difflib.get_close_matches(name, known, 1)
    if close:
        return f"; did you mean {close[0]!r}?"
    one_of = "one of " if len(known) > 1 else ""
    return f"; expected {one_of}{', '.join(known)}"


def lookup(table: Mapping[str, Any], name: str, what: str) -> Any:
    """table[name]. If `name` is no key, raises Refused; the message suggests the nearest one."""
    if name not in table:
        raise Refused(f"{what}={name!r}: {nearest(name, table).removeprefix('; ')}")
    return table[name]


def named_key(key: Array, name: str) -> Array:
    """The random key of a name: `key` folded with the CRC-32 of the name."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)


@jax.tree_util.register_pytree_node_class
class Means(dict):
    """The metrics of one step: name -> mean, float32 [].

    `counts` holds the number of valid tokens or samples behind a mean (float32 []), for the
    metrics whose loss counts them. Averages over several steps weigh these means by their counts,
    and all others equally.
    """

    def __init__(self, means: Mapping[str, Array], counts: Mapping[str, Array]):
        super().__init__(means)
        self.counts = dict(counts)

    def tree_flatten(self):
        names = tuple(sorted(self))
        counted = tuple(sorted(self.counts))
        means = [self[name] for name in names]
        counts = [self.counts[name] for name in counted]
        return (means, counts), (names, counted)

    @classmethod
    def tree_unflatten(cls, keys, children):
        names, counted = keys
        means, counts = children
        return cls(zip(names, means), zip(counted, counts))


@flax.struct.dataclass
class State:
    """Everything that changes during training, and the frozen networks beside it.

    The weights of a trained role are in three parts (core/parts.py): `params`, `rest` and
    `statistics`. A role without a part is no key of it.
    """

    step: Array  # int32 []: engine steps so far in this stage
    # role -> int32 []: optimiser updates of the role so far
    count: dict[str, Array]
    params: dict[str, Params]  # trained roles: what the optimiser moves, float32
    opt: dict[str, Any]  # role -> optax state
    ema: dict[str, Params]  # role -> averages of its `params`
    # roles that this stage does not train; not checkpointed
    frozen: dict[str, Params]
    # a method's own state: histograms, queues, running statistics
    memory: dict[str, Any]
    # trained role -> its weights that the method does not move; not checkpointed
    rest: dict[str, Params] = dataclasses.field(default_factory=dict)
    # trained role -> running statistics of its batch norms
    statistics: dict[str, Params] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Ctx:
    """The input of a loss besides the networks."""

    batch: Batch
    rng: Array
    step: Array
    memory: Mapping[str, Any]

    def key(self, name: str) -> Array:
        """The random key of a name. Adding another draw to a loss does not change this one."""
        return named_key(self.rng, name)


class Out(NamedTuple):
    """The result of a loss.

    Without `count`, loss and metrics are means over the (micro-)batch. With `count` they are sums
    over that many valid tokens or samples. The engine then divides them by the sum of all counts,
    over micro-batches and shards. A metric with a count of its own is a pair (sum, count).

    A loss such as mean over tokens + mean over samples has no single count. Its turn's `gather`
    sees the full batch, and can add to it a weight per sample, [B], such as B / (tokens of the
    batch): with it each term becomes a mean over samples, and the loss returns no count.
    """

    loss: Array
    metrics: Metrics = {}
    memory: dict[str, Any] = {}  # new values of these keys of State.memory
    count: Array | None = None
    # trained role -> its new running statistics (`nets.<role>.training`)
    statistics: dict[str, Params] = {}


LossFn = Callable[[Nets, Ctx], Out]


def always(step: int) -> bool:
    """True at every step."""
    return True


@dataclasses.dataclass(frozen=True)
class Turn:
    """One optimiser update of the roles in `moves` on `loss`.

    Metrics are named `<first role of moves>/<name>`. With `moves=()` nothing is trained: the turn
    measures, its metrics are named `measured/<name>`, and it may write to the memory.
    """

    moves: tuple[str, ...]
    loss: LossFn
    # Whether a step takes the turn. Called in Python, outside of jit: each combination of turns is
    # its own XLA program.
    when: Callable[[int], bool] = always
    # Runs before the loss on the whole batch, without gradient, and returns the batch that the loss
    # gets: roll-outs, teacher trajectories.
    gather: Callable[[Nets, Ctx], Batch] | None = None
    # After the update: (weights of all roles, step) -> new weights of some trained roles. Averages
    # have the names that losses know (`ema_student`). Optimiser states and averages stay. Used to
    # mix one network into another, or to keep a copy of old weights.
    after: Callable[[Mapping[str, Params], Array], Mapping[str, Params]] | None = (
        None
    )
    # decay(k): the weight of the old average at the role's k-th update, k >= 1, in place of the
    # decay in the config.
    decay: Callable[[Array], Array] | None = None


@dataclasses.dataclass(frozen=True)
class Collect:
    """Data that is generated and stored before a stage.

    `batches` calls of `make(nets, ctx) -> batch`, without gradient, give arrays with the batch axis
    first. Their samples are stored in the run's folder, and the stage trains on them, shuffled, in
    place of the data set. A resumed run generates only what is missing.
    """

    make: Callable[[Nets, Ctx], Batch]
    batches: int


@dataclasses.dataclass(frozen=True)
class Calibrate:
    """Fields of the run's method that are measured before a stage, and stored in the run's folder.

    `measure(nets, params, batches) -> method` gets networks (core.net.Net) and weights by role as
    they are before the stage's surgery, and an iterator of training batches on the mesh. It returns
    the run's method with these fields set; the run goes on with that method, whose stages must be
    as many and as long. `core.sums.summed` adds up what it measures.

    `fields` are the names, each with a value that stands in for it where programs are traced
    without weights. A field that the config sets (that is not None) is not measured.
    """

    measure: Callable[
        [Mapping[str, Any], Mapping[str, Params], Iterator[Batch]], Any
    ]
    fields: Mapping[str, Any]

    def missing(self, method: Method) -> dict[str, Any]:
        """The fields that `method` lacks, with their stand-ins."""
        return {k: v for k, v in self.fields.items() if getattr(method, k) is None}


def spec_of(data: Any) -> Mapping[str, Any]:
    """The shapes of a data set's batches."""
    return data.spec()


@dataclasses.dataclass(frozen=True)
class Pool:
    """Records that are made on the host before a stage: any number from each item.

    An item is stored as one file in the run's folder; a resumed run makes only the items that are
    missing. Every process calls `make` for every item, in the same order, since networks may span
    processes; one of them writes its records.
    """

    # data set -> names of the items, which are names of files
    items: Callable[[Any], Sequence[str]]
    # (bound networks, data set, item) -> its records, dicts of numpy arrays
    make: Callable[[Nets, Any, str], Iterable[Mapping[str, np.ndarray]]]
    # (data set, folder of the records) -> the data set of the stage
    read: Callable[[Any, Path], Any]
    # data set -> shapes of the batches of that data set, for plans without records
    spec: Callable[[Any], Mapping[str, Any]] = spec_of


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training run of a multi-stage method.

    In this order: calibration, surgery, collection of data, the pool of records, then steps.

    `surgery(nets, params, batch) -> (nets, params)` changes networks and weights before the stage.
    `params` has the frozen roles and the results of the previous stage (averaged weights, if a role
    has an average); `batch` is the first training batch. Surgery must be deterministic, because a
    resumed run calls it again.
    """

    method: Method
    steps: int
    surgery: Callable[..., tuple[dict[str, Any], dict[str, Params]]] | None = None
    collect: Collect | None = None
    calibrate: Calibrate | None = None
    pool: Pool | None = None
    # Roles whose last weights are handed on, too, as `last_<role>`; what a stage hands on as <role>
    # is averaged where the role has an average.
    last: tuple[str, ...] = ()


def stage_lengths(steps: int, shares: int | Sequence[float]) -> tuple[int, ...]:
    """Lengths of stages with the sum `steps`.

    `shares` is the number of equally long stages, or the relative length of each stage. If a
    number of stages does not divide `steps`, the first ones are longer by one (10 steps, 3 stages:
    4, 3, 3). Relative lengths are rounded.
    """
    if isinstance(shares, int):
        return tuple((steps + i) // shares for i in reversed(range(shares)))
    ends = [
        round(steps * sum(shares[: i + 1]) / sum(shares))
        for i in range(len(shares))
    ]
    return tuple(end - start for start, end in zip([0, *ends], ends))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """Base of all methods. A method overrides `loss` or `turns`; everything else has a default.

    The attributes without a type are no fields of configs: a method's class states them.
    """

    # Trained role -> the role whose weights it starts from, or None for fresh weights.
    inits = {"student": "teacher"}
    # Trained role -> regular expression of the paths "a/b/c" of its weights that move; a role that
    # is no key moves as a whole. The other weights of the role stay as they started. The path of an
    # adapter is that of the matrix it is on; adapters on other matrices stay as they started.
    trains = {}
    # Roles that this method does not train.
    frozen = ("teacher",)
    # Roles with averaged weights; losses see them as `ema_<role>`.
    ema = ("student",)
    # How `sample` goes from one time to the next. True: with fresh noise; False: with the predicted
    # noise (DDIM).
    renoises = True
    # Roles that make up the trained generator. If there are several, each is exported to its own
    # folder.
    exports = ("student",)
    # Batch key -> its typed shape (core/needs.py). A batch may hold more.
    needs = {}

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The updates of a step, in order. By default the student is updated on `loss`."""
        return (Turn(("student",), self.loss),)

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        """The loss of the default turn."""
        raise NotImplementedError

    @property
    def cycle(self) -> int:
        """Steps of one repeat of the schedule of turns, with one update of the student."""
        return 1

    def settled(self) -> Method:
        """This method without its warm-up (critics alone, say), for cost estimates."""
        return self

    def memory(self) -> dict[str, Any]:
        """Initial content of State.memory."""
        return {}

    def check(self, nets: Mapping[str, Any], data: Any) -> None:
        """Raises Refused where networks (role -> core.net.Net) or data set do not fit the method.

        Called before anything is trained or written.
        """

    def stages(self, steps: int) -> tuple[Stage, ...]:
        """The training runs that `steps` engine steps are divided into."""
        return (Stage(self, steps),)

    def controller(self) -> Controller | None:
        """The part in Python that changes the data during training (mixtures, curricula)."""
        return None

    def exported(self, net: Any, params: Params) -> tuple[Any, Params]:
        """Network and weights of a role in the form that is exported."""
        return net, params

    def generator(self, net: Nets, null: Any = None) -> Callable:
        """The network that `sample` calls. Methods with several experts route between them here.

        `null` is the null condition, as many samples as the noise has, for methods that guide while
        they sample; None where the networks have none.
        """
        return net.student

    def initial(self, noise: Array) -> Array:
        """The noise that sampling starts from, given unit Gaussian noise.

        `Process.start` scales it to a state at t_max.
        """
        return noise

    def sampling_times(self, steps: int) -> Array:
        """The times at which `sample` calls the network, falling, [steps].

        Raises Refused where `sample` does more than predict x0 at fixed times.
        """
        name = type(self).__name__
        raise Refused(
            f"{name}: its sampler is more than a chain of x0 at fixed times"
        )

    def sample(
        self, net: Callable, noise: Array, cond: Any, key: Array, steps: int
    ) -> Array:
        """Samples of the trained generator, with `steps` network evaluations each.

        Args:
          net: what `generator` returns.
          noise: unit Gaussian, in the shape of the samples.
        """
        raise NotImplementedError


class Controller:
    """State of a method, in Python, that changes the data. It is part of every checkpoint."""

    def update(self, metrics: Mapping[str, float]) -> Mapping[str, Any]:
        """Called at each logging interval; returns hints for the data pipeline.

        `metrics` are means over the interval: over its tokens or samples where the loss counts
        them, else over its steps.
        """
        return {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores; JSON-serialisable."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes back what `state` returned."""
