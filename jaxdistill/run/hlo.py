"""Traffic of a compiled program, read from its HLO text: bytes through memory and between chips.

The body of a loop counts as often as it runs; XLA's own cost analysis counts it once.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping

BITS = {
    "pred": 8,
    "s4": 4,
    "u4": 4,
    "s8": 8,
    "u8": 8,
    "s16": 16,
    "u16": 16,
    "bf16": 16,
    "f16": 16,
    "s32": 32,
    "u32": 32,
    "f32": 32,
    "s64": 64,
    "u64": 64,
    "f64": 64,
    "c64": 64,
    "c128": 128,
}
ARRAY = re.compile(r"\b(pred|bf16|f8\w*|[suf]\d+|c\d+)\[([\d,]*)\]")
# "%name = type opcode(operands), attributes"
LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
# "ENTRY %name (parameters) -> type {"
HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)
# Opcodes that move no bytes themselves.
FREE = {
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "after-all",
    "while",
    "conditional",
    "call",
    "partition-id",
    "replica-id",
    "iota",
    "opt-barrier",
    "optimization-barrier",
}


@dataclasses.dataclass(frozen=True)
class Op:
    """One instruction of a computation."""

    name: str
    bytes: int  # of the result
    opcode: str
    operands: tuple[str, ...]  # their names
    rest: str  # the line from the operands on: "operands), attributes"


Computation = Mapping[str, Op]  # name of an instruction -> instruction


@dataclasses.dataclass(frozen=True)
class Moved:
    """Bytes of one chip in one call of the program."""

    memory: float  # read and written by instructions; values inside a fusion do not count
    # Collective -> bytes that leave (or reach) the chip, with ring algorithms.
    sent: dict[str, float]


def size(text: str) -> int:
    """Bytes of all arrays in a type; those of a tuple are summed."""
    total = 0
    for kind, dims in ARRAY.findall(text):
        count = math.prod(int(d) for d in dims.split(",") if d)
        total += BITS.get(kind, 8) * count // 8
    return total


def parse(text: str) -> tuple[dict[str, dict[str, Op]], str]:
    """(name -> computation, name of the entry computation) of an HLO module's text."""
    computations = {}
    entry = ""
    current = None
    for line in text.splitlines():
        head = HEAD.match(line)
        if head is not None:
            name = head.group(1)
            current = computations.setdefault(name, {})
            if line.startswith("ENTRY"):
                entry = name
            continue
        instruction = LINE.match(line)
        if current is not None and instruction is not None:
            name, definition = instruction.groups()
            current[name] = _parse_op(name, definition)
    return computations, entry


def _parse_op(name: str, definition: str) -> Op:
    """The instruction `name = definition`."""
    if definition.startswith("("):
        kind, call = _split_bracket(definition)
    else:
        kind, call = definition.split(" ", 1)
    opcode, arguments = call.strip().split("(", 1)
    inside, rest = _split_bracket("(" + arguments)
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Op(name, size(kind), opcode, operands, inside[1:-1] + rest)


def _split_bracket(text: str) -> tuple[str, str]:
    """Splits `text`, which begins with a bracket, behind the bracket that closes it."""
    depth = 0
    for i, character in enumerate(text):
        if character == "(":
            depth += 1
        elif character == ")":
            depth -= 1
        if depth == 0:
            return text[: i + 1], text[i + 1 :]
    return text, ""


def moved(text: str) -> Moved:
    """The traffic of the program with this text (`compiled.as_text()`)."""
    computations, entry = parse(text)
    traffic = _Traffic(computations)
    traffic.add(entry, 1.0)
    return Moved(traffic.memory, dict(traffic.sent))


class _Traffic:
    """Sums the bytes of computations and of those that they call."""

    def __init__(self, computations: Mapping[str, Computation]):
        self.computations = computations
        self.memory = 0.0
        self.sent = collections.Counter()

    def add(self, name: str, times: float) -> None:
        """Adds `times` the traffic of the computation `name`."""
        ops = self.computations.get(name, {})
        for op in ops.values():
            kind = op.opcode.removesuffix("-start")
            if op.opcode == "while":
                body = re.search(r"body=%?([\w.\-]+)", op.rest)
                self.add(body.group(1), times * _trips(op, self.computations))
            elif op.opcode in ("call", "async-start", "conditional"):
                for inner in _called(op.rest):
                    self.add(inner, times)
            elif kind in COLLECTIVES:
                self.sent[kind] += times * _bytes_sent(kind, op, ops)
            free = (
                kind in FREE
                or op.opcode == "async-start"
                or op.opcode.endswith("-done")
            )
            if not free:
                self.memory += times * _bytes_touched(op, ops, self.computations)


def _called(rest: str) -> list[str]:
    """Names of the computations that an instruction calls."""
    found = re.findall(
        r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", rest
    )
    branches = re.search(r"branch_computations=\{([^}]*)\}", rest)
    if branches is not None:
        found += [name.strip().lstrip("%") for name in branches.group(1).split(",")]
    return found


def _trips(op: Op, computations: Mapping[str, Computation]) -> int:
    """How often the body of a while loop runs.

    XLA writes it down where it knows it; else it is the largest constant in the condition.
    """
    known = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', op.rest)
    if known:
        return int(known.group(1))
    condition = re.search(r"condition=%?([\w.\-]+)", op.rest)
    limits = []
    for inner in computations.get(condition.group(1), {}).values():
        if inner.opcode == "constant":
            limits += re.findall(r"^(\d+)\b", inner.rest)
    return max(map(int, limits), default=1)


def _group(rest: str) -> int:
    """The number of chips that take part in one collective."""
    # mesh['a'=4,'b'=2], device_ids=(...) {'a'}
    over_axes = re.search(
        r"replica_groups=\w*\[([^\]]*'[^\]]*)\][^{]*\{([^}]*)\}", rest
    )
    if over_axes:
        mesh, axes = over_axes.groups()
        sizes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", mesh)}
        return math.prod(sizes[axis] for axis in re.findall(r"'(\w+)'", axes))
    # [groups, chips of each]<=[...]
    regular = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest)
    if regular:
        return int(regular.group(2))
    # {{0,1,2},{3,4,5}}
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    if listed:
        return len(listed.group(1).split(","))
    return 2


def _bytes_sent(kind: str, op: Op, ops: Computation) -> float:
    """Bytes that one collective sends from (or brings to) each chip, on a ring."""
    given = sum(ops[name].bytes for name in op.operands if name in ops)
    n = _group(op.rest)
    if kind == "collective-permute":
        return given
    if kind == "all-gather":
        return given * (n - 1)  # each chip receives the shards of all others
    if kind == "all-reduce":
        return 2 * given * (n - 1) / n
    return given * (n - 1) / n


def _bytes_touched(
    op: Op, ops: Computation, computations: Mapping[str, Computation]
) -> float:
    """Bytes that one instruction reads and writes.

    Of an operand that is only sliced, or updated in place, only the slice counts.
    """
    if op.opcode == "dynamic-slice":
        return 2 * op.bytes
    if op.opcode == "dynamic-update-slice":
        in_place = len(op.operands) > 1 and op.operands[1] in ops
        return 2 * ops[op.operands[1]].bytes if in_place else op.bytes
    fused = {}
    if op.opcode == "fusion":
        name = next(iter(_called(op.rest)), "")
        fused = computations.get(name, {})
    parameters = {}  # position -> name
    for inner in fused.values():
        if inner.opcode == "parameter":
            position = re.match(r"\d+", inner.rest).group()
            parameters[int(position)] = inner.name
    read = 0.0
    result = op.bytes
    for i, operand in enumerate(op.operands):
        size_read = ops[operand].bytes if operand in ops else 0
        name = parameters.get(i)
        users = [inner for inner in fused.values() if name in inner.operands]
        if users and _all_first(users, "dynamic-slice", name):
            size_read = sum(user.bytes for user in users)
        elif users and _all_first(users, "dynamic-update-slice", name):
            updates = [
                user.operands[1] for user in users if user.operands[1] in fused
            ]
            written = sum(fused[update].bytes for update in updates)
            result = result - size_read + written
            size_read = written
        read += size_read
    return read + max(result, 0)


def _all_first(users: list[Op], opcode: str, name: str) -> bool:
    """Whether all of `users` are of this opcode and have `name` as their first operand."""
    return all(user.opcode == opcode and user.operands[0] == name for user in users)
