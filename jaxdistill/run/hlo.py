"""What a compiled program moves, read from its text: bytes through memory and bytes between chips,
loops multiplied in.

XLA's own cost analysis counts the body of a loop once.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re

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
LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)
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
    """One instruction: result bytes, opcode, operand names, and its line from the operands on."""

    name: str
    bytes: int
    opcode: str
    operands: tuple[str, ...]
    rest: str


@dataclasses.dataclass(frozen=True)
class Moved:
    """Bytes of one chip in one call of the program."""

    memory: float  # read and written by instructions; what stays in a fusion does not count
    sent: dict[
        str, float
    ]  # collective -> bytes that leave (or reach) the chip, ring algorithms assumed


def size(text: str) -> int:
    """Bytes of all arrays in a type, tuples summed."""
    total = 0
    for kind, dims in ARRAY.findall(text):
        total += BITS.get(kind, 8) * math.prod(int(d) for d in dims.split(",") if d) // 8
    return total


def parse(text: str) -> tuple[dict[str, dict[str, Op]], str]:
    """Computations by name (each its instructions by name), and the entry's name."""
    computations = {}
    entry = ""
    current = None
    for line in text.splitlines():
        if head := HEAD.match(line):
            current = computations.setdefault(head.group(1), {})
            entry = head.group(1) if line.startswith("ENTRY") else entry
        elif current is not None and (found := LINE.match(line)):
            name, line = found.groups()
            kind, line = _bracket(line) if line.startswith("(") else line.split(" ", 1)
            opcode, line = line.strip().split("(", 1)
            inside, rest = _bracket("(" + line)
            current[name] = Op(
                name,
                size(kind),
                opcode,
                tuple(re.findall(r"%([\w.\-]+)", inside)),
                inside[1:-1] + rest,
            )
    return computations, entry


def _bracket(text: str) -> tuple[str, str]:
    """`text`, which opens with a bracket, up to its match, and what follows."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if not depth:
            return text[: i + 1], text[i + 1 :]
    return text, ""


def moved(text: str) -> Moved:
    """Reads `compiled.as_text()`."""
    computations, entry = parse(text)
    memory = 0.0
    sent = collections.Counter()

    def walk(name: str, times: float) -> None:
        nonlocal memory
        ops = computations.get(name, {})
        for op in ops.values():
            kind = op.opcode.removesuffix("-start")
            if op.opcode == "while":
                body = re.search(r"body=%?([\w.\-]+)", op.rest)
                trips = _trips(op, computations)
                walk(body.group(1), times * trips)
            elif op.opcode in ("call", "async-start") or op.opcode == "conditional":
                for inner in _called(op.rest):
                    walk(inner, times)
            elif kind in COLLECTIVES:
                sent[kind] += times * _on_the_wire(kind, op, ops)
            if kind not in FREE and not op.opcode.endswith("-done") and op.opcode != "async-start":
                memory += times * _touched(op, ops, computations)

    walk(entry, 1.0)
    return Moved(memory, dict(sent))


def _called(rest: str) -> list[str]:
    found = re.findall(r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", rest)
    branches = re.search(r"branch_computations=\{([^}]*)\}", rest)
    return found + (
        [b.strip().lstrip("%") for b in branches.group(1).split(",")] if branches else []
    )


def _trips(op: Op, computations) -> int:
    known = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', op.rest)
    if known:
        return int(known.group(1))
    condition = re.search(r"condition=%?([\w.\-]+)", op.rest)
    limits = [
        int(n)
        for o in computations.get(condition.group(1), {}).values()
        if o.opcode == "constant"
        for n in re.findall(r"^(\d+)\b", o.rest)
    ]
    return max(limits, default=1)


def _group(rest: str) -> int:
    """Chips that take part in one collective."""
    if found := re.search(
        r"replica_groups=\w*\[([^\]]*'[^\]]*)\][^{]*\{([^}]*)\}", rest
    ):  # mesh['a'=4,'b'=2], device_ids=(...) {'a'}
        sizes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", found.group(1))}
        return math.prod(sizes[axis] for axis in re.findall(r"'(\w+)'", found.group(2)))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(found.group(2))
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(found.group(1).split(","))
    return 2


def _on_the_wire(kind: str, op: Op, ops) -> float:
    given = sum(ops[o].bytes for o in op.operands if o in ops)
    n = _group(op.rest)
    if kind == "all-gather":
        return given * (n - 1)  # every chip receives the others' shards
    if kind == "all-reduce":
        return 2 * given * (n - 1) / n
    return given if kind == "collective-permute" else given * (n - 1) / n


def _touched(op: Op, ops, computations) -> float:
    """Bytes that one instruction reads and writes; of an operand that is only sliced, or written in
    place, the slice.
    """
    if op.opcode == "dynamic-slice":
        return 2 * op.bytes
    if op.opcode == "dynamic-update-slice":
        return (
            2 * ops[op.operands[1]].bytes
            if len(op.operands) > 1 and op.operands[1] in ops
            else op.bytes
        )
    total = 0.0
    result = op.bytes
    inner = computations.get((_called(op.rest) or [""])[0], {}) if op.opcode == "fusion" else {}
    parameters = {
        int(re.match(r"\d+", o.rest).group()): o.name
        for o in inner.values()
        if o.opcode == "parameter"
    }
    for i, operand in enumerate(op.operands):
        whole = ops[operand].bytes if operand in ops else 0
        name = parameters.get(i)
        users = [o for o in inner.values() if name in o.operands] if name else []
        if users and all(o.opcode == "dynamic-slice" and o.operands[0] == name for o in users):
            whole = sum(o.bytes for o in users)
        elif users and all(
            o.opcode == "dynamic-update-slice" and o.operands[0] == name for o in users
        ):
            written = sum(inner[o.operands[1]].bytes for o in users if o.operands[1] in inner)
            result = result - whole + written
            whole = written
        total += whole
    return total + max(result, 0)
