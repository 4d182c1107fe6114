"""Energy, latency and area in in-memory computing, a pure function of counts and constants. See docs/hardware.md.

Weights lie in crossbars of R x C cells. A weight of w bits takes ceil(w / b) cells of b bits, and as many again for
negative values. Inputs come in slices of as many bits as a DAC has. A crossbar takes one vector at a time: tokens go
through a model as through a pipeline, except where an operation waits.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.operations import Operation
from utils.errors import FarError, first_line

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

# How products of activations are computed, and what docs/hardware.md calls the ways.
MAPPINGS = ("written", "reordered", "digital")
CONSTANTS = {
    "crossbar_pj": "a read of all cells of a crossbar by one slice of inputs",
    "cycle_ns": "one slice of inputs through a crossbar and its ADCs",
    "dac_pj": "one slice of one input",
    "adc_pj": "one conversion",
    "shift_add_pj": "one conversion joined with the others of its output",
    "write_cell_pj": "one cell written",
    "write_row_ns": "one row of a crossbar written",
    "buffer_bit_pj": "one bit written to a buffer or read from it",
    "mac_pj": "one digital multiply-accumulate of activations",
    "add_pj": "one addition, multiplication or comparison",
    "function_pj": "one exponential, tanh, sigmoid, erf, reciprocal or root",
    "digital_ns": "one digital operation from its operands to its result",
    "endurance_writes": "writes that a cell survives",
}
ENTRY = {"value", "low", "high", "node_nm", "source"}  # of a constant
COMPONENTS = {  # of energy, as figures show them: the constants they are made of
    "crossbars and DACs": ("crossbar_pj", "dac_pj"),
    "ADCs": ("adc_pj", "shift_add_pj"),
    "writing cells": ("write_cell_pj",),
    "products of activations": ("mac_pj",),
    "elementwise": ("add_pj", "function_pj"),
    "buffers": ("buffer_bit_pj",),
}


class Design(NamedTuple):
    """What a designer chooses."""

    rows: int  # R
    columns: int  # C
    cell_bits: int  # b
    weight_bits: int  # w
    input_bits: int
    dac_bits: int
    copies: int  # of every stored matrix: as many tokens pass at once, or, where they wait for one another, images
    multipliers: int  # of each product of activations, beside the crossbars

    @property
    def slices(self) -> int:
        return math.ceil(self.input_bits / self.dac_bits)

    def cells(self, op: Operation) -> int:
        """Cells a value of an operation's matrices, two signs."""
        return 2 * math.ceil((self.weight_bits if op.stored else self.input_bits) / self.cell_bits)


@dataclass(frozen=True)
class Hardware:
    """A profile: its name, the design, and constants as (low, likely, high), in the units that their names end with."""

    name: str
    design: Design
    constants: dict[str, np.ndarray]

    @classmethod
    def read(cls, file: Path) -> "Hardware":
        """Raises FarError where the file is no profile: a key missing or unknown, a negative value, no source."""
        try:
            content = tomllib.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise FarError(f"--hardware {file}: {first_line(error)}; give a file like hardware/isaac.toml") from error
        design, constants = (content.pop(key, None) for key in ("design", "constants"))

        def check(fine: bool, fault: str) -> None:
            if not fine:
                raise FarError(f"--hardware {file}: {fault}; see hardware/isaac.toml")

        for table, known, title in ((design, Design._fields, "design"), (constants, CONSTANTS, "constants")):
            check(isinstance(table, dict), f"lacks [{title}]")
            for key in (*known, *table):
                check(key in table and key in known, f"[{title}] {'lacks' if key in known else 'has an unknown'} {key}")
        for key in content:
            check(key == "name", f"has an unknown {key}")
        for key, value in design.items():
            check(type(value) is int and 1 <= value <= 2**20, f"{key} = {value!r}: must be a whole number from 1")
        ranges = {}
        for key, entry in constants.items():
            check(isinstance(entry, dict) and set(entry) <= ENTRY, f"{key}: may have {', '.join(sorted(ENTRY))} alone")
            check(bool(entry.get("source")), f"{key}: lacks its source")
            value = entry.get("value")
            ranges[key] = entry.get("low", value), value, entry.get("high", value)
            numbers = all(type(x) in (int, float) and 0 <= x < math.inf for x in ranges[key])
            check(numbers and sorted(ranges[key]) == [*ranges[key]], f"{key}: needs 0 <= low <= value <= high")
        return cls(str(content.get("name", file.stem)), Design(**design), {k: np.array(v) for k, v in ranges.items()})


@dataclass(frozen=True)
class Estimate:
    """Of one image. Energies are (low, likely, high)."""

    energy_uj: dict[str, np.ndarray]  # by component
    latency_us: float
    interval_us: float  # between images that follow one another
    crossbars: int
    used: float  # share of their cells
    conversions: int  # by ADCs
    writes: int  # of cells
    lifetime_h: np.ndarray | None  # hours at full rate until cells that every image writes wear out; None without such
    events: Mapping[str, float]  # how often each constant of energy was spent

    @property
    def total_uj(self) -> np.ndarray:
        return sum(self.energy_uj.values())

    def as_json(self) -> dict[str, Any]:
        """Plain data; energies as [low, likely, high]."""
        energy = {name: value.tolist() for name, value in self.energy_uj.items()}
        lifetime = None if self.lifetime_h is None else self.lifetime_h.tolist()
        plain = {"energy_uj": energy, "total_uj": self.total_uj.tolist(), "events": dict(self.events)}
        return {**vars(self), **plain, "lifetime_h": lifetime}


def reorder(operations: Iterable[Operation]) -> Iterator[Operation]:
    """Attention as (Q W_K^T) X^T and (S X) W_V: ReTransformer, eq. 7 (Yang et al., ICCAD 2020).

    The one matrix of activations is the block's input X, written while the queries are computed. All heads read it, one
    after another, and both products do. The keys' bias cancels in softmax, the values' is added behind W_V.
    """
    for op in operations:
        name = op.name.rpartition(".")[2]
        if name == "qkv":
            ((dim, _),) = op.matrices
            yield op._replace(matrices=((dim, dim),), elementwise=op.elementwise // 3, writes=op.writes // 3)
        elif name == "scores":
            (width, tokens), heads = op.matrices[0], len(op.matrices)
            dim = heads * width
            yield Operation(f"{op.name}_keys", tokens, ((width, dim),) * heads, writes=tokens * heads * dim)
            yield op._replace(vectors=tokens * heads, matrices=((dim, tokens),), written=dim * tokens)
        elif name == "values":
            (tokens, width), heads = op.matrices[0], len(op.matrices)
            dim, mixed = heads * width, tokens * heads * heads * width
            yield op._replace(vectors=tokens * heads, matrices=((tokens, dim),), waits="all", written=0, writes=mixed)
            yield Operation(
                f"{op.name}_out", tokens, ((dim, width),) * heads, elementwise=tokens * dim, writes=tokens * dim
            )
        else:
            yield op


def join(operations: Iterable[Operation]) -> Iterator[Operation]:
    """Recurrent cells as [W_ih W_hh] [x h]: what only adds up does so on one column, and is converted once."""
    before = None
    for op in operations:
        added, of = op.added
        if not added:
            if before:
                yield before
            before = op
            continue
        matrices = []
        for (inputs, outputs), (hidden, _) in zip(before.matrices, op.matrices, strict=True):
            both = outputs * added // of
            matrices.append((inputs + hidden, both))
            matrices += [(inputs, outputs - both), (hidden, outputs - both)] * (both < outputs)
        sums = before.writes * added // of  # additions, and values that no buffer sees
        before = op._replace(
            matrices=tuple(matrices),
            elementwise=before.elementwise + op.elementwise - sums,
            operands=op.operands - before.writes,
        )
    if before:
        yield before


def tiles(matrix: tuple[int, int], cells: int, design: Design) -> tuple[int, int]:
    """Crossbars that a matrix (inputs, outputs) of so many cells a value fills, along its inputs and its outputs."""
    inputs, outputs = matrix
    return math.ceil(inputs / design.rows), math.ceil(outputs * cells / design.columns)


def count_events(operations: Iterable[Operation], design: Design, mapping: str) -> Counter[str]:
    """How often each constant of energy is spent on an image."""
    events: Counter[str] = Counter()
    for op in operations:
        events["add_pj"] += op.elementwise
        events["function_pj"] += op.functions
        events["buffer_bit_pj"] += (op.reads + op.writes) * design.input_bits
        if not op.stored and mapping == "digital":
            events["mac_pj"] += op.macs
            continue
        reads, cells = op.vectors * design.slices, design.cells(op)
        for inputs, outputs in op.matrices:
            down, across = tiles((inputs, outputs), cells, design)
            conversions = reads * outputs * cells * down
            events["dac_pj"] += reads * inputs * across
            events["crossbar_pj"] += reads * inputs * outputs * cells / (design.rows * design.columns)
            events["adc_pj"] += conversions
            events["shift_add_pj"] += conversions
            events["add_pj"] += op.vectors * outputs * (down - 1)  # partial sums
        events["write_cell_pj"] += op.written * cells
    return events


def run_pipeline(ready: np.ndarray, latency: float, interval: float) -> np.ndarray:
    """Times of results: vectors start in the order of the times they are ready at, at least an interval apart."""
    order, turns = np.argsort(ready, kind="stable"), np.arange(len(ready)) * interval
    done = np.empty_like(ready)
    done[order] = np.maximum.accumulate(ready[order] - turns) + turns + latency
    return done


def run_chain(ready: np.ndarray, latency: float) -> np.ndarray:
    """Times of results where each vector waits for the one before it; of two directions, the later time."""
    turns = np.arange(len(ready)) * latency
    forward, backward = (np.maximum.accumulate(order - turns) + turns + latency for order in (ready, ready[::-1]))
    return np.maximum(forward, backward[::-1])


def find_times(operations: Iterable[Operation], hardware: Hardware, mapping: str) -> tuple[float, float]:
    """Latency of an image and the interval between images, in ns, by the likely constants.

    Elementwise work has as many units as it needs: it takes one operation's time.
    """
    design, constants = hardware.design, {key: value[1] for key, value in hardware.constants.items()}
    product, digital = design.slices * constants["cycle_ns"], constants["digital_ns"]
    ready, slowest, busy = np.zeros(1), 0.0, 0.0
    for op in operations:
        step = product if op.matrices else 0.0
        interval = step / design.copies if op.stored else step
        shared = busy if not op.stored and not op.written else 0.0  # by products that read one array in turn
        writing = 0.0
        if not op.stored and mapping == "digital":
            step = interval = math.ceil(op.cells / design.multipliers) * digital
        elif op.written:  # row after row, keys and values at once
            writing = min(design.rows, max(op.matrices[0])) * constants["write_row_ns"]
        if op.waits == "all":
            ready = np.full(op.vectors, ready.max())
            if mapping == "written":
                ready += writing
        ready = fit(ready, op.vectors)
        if op.waits == "previous":
            ready = run_chain(ready, step + digital)
            interval = (step + digital) / design.copies
        else:
            ready = run_pipeline(ready, step + digital, interval)
        busy = shared + writing + op.vectors * interval
        slowest = max(slowest, busy)
    return ready.max(), slowest


def fit(ready: np.ndarray, vectors: int) -> np.ndarray:
    """Times at which an operation's vectors are ready, from those of the results before it.

    More vectors than results: each result makes several, or prefix tokens come first, ready at 0. Fewer: a vector needs
    the last of a group of results, or only the first results are read.
    """
    if vectors % len(ready) == 0:
        return np.repeat(ready, vectors // len(ready))
    if vectors > 1 and len(ready) % vectors == 0:
        return ready.reshape(vectors, -1).max(1)
    return np.concatenate([np.zeros(max(0, vectors - len(ready))), ready[:vectors]])


def estimate(operations: Iterable[Operation], hardware: Hardware, mapping: str = MAPPINGS[-1]) -> Estimate:
    """What an image costs.

    Args:
        operations: of a model, `models.operations.operations`.
        hardware: the profile.
        mapping: of products of activations, one of MAPPINGS.
    """
    design = hardware.design
    ops = list(join(reorder(operations) if mapping == "reordered" else operations))
    events = count_events(ops, design, mapping)
    arrays = used = 0
    for op in ops:
        if op.stored or mapping != "digital" and op.written:  # a matrix written once may serve two products
            copies, cells = design.copies if op.stored else 1, design.cells(op)
            arrays += copies * sum(math.prod(tiles(matrix, cells, design)) for matrix in op.matrices)
            used += copies * op.cells * cells
    latency, interval = find_times(ops, hardware, mapping)
    spent = {key: events[key] * hardware.constants[key] / 1e6 for key in events}
    return Estimate(
        energy_uj={name: sum(spent.get(key, np.zeros(3)) for key in keys) for name, keys in COMPONENTS.items()},
        latency_us=latency / 1e3,
        interval_us=interval / 1e3,
        crossbars=arrays,
        used=used / (arrays * design.rows * design.columns),
        conversions=events["adc_pj"],
        writes=events["write_cell_pj"],
        lifetime_h=hardware.constants["endurance_writes"] * interval / 3.6e12 if events["write_cell_pj"] else None,
        events=events,
    )


class Turn(NamedTuple):
    """What a constant of energy decides: a model's energy over the cheapest rival's."""

    now: float
    halved: float
    doubled: float
    even: float | None  # the factor of the constant at which both cost the same; None where no factor does it


def find_turns(model: Estimate, rivals: Sequence[Estimate], hardware: Hardware) -> dict[str, Turn]:
    """By constant of energy: how the verdict over rivals depends on it, all others at their likely values."""
    turns = {}
    for key in (key for keys in COMPONENTS.values() for key in keys):
        # Energies are a + b x, x the factor of this constant.
        lines = []
        for result in (model, *rivals):
            slope = result.events[key] * hardware.constants[key][1] / 1e6
            lines.append((result.total_uj[1] - slope, slope))

        def ratio(x: float, lines=lines) -> float:
            own, *others = (a + b * x for a, b in lines)
            return own / min(others)

        (a, b), *others = lines
        crossings = [(a_other - a) / (b - b_other) for a_other, b_other in others if b != b_other]
        crossings = [x for x in crossings if x > 0 and math.isclose(ratio(x), 1, rel_tol=1e-9)]
        turns[key] = Turn(ratio(1), ratio(0.5), ratio(2), min(crossings, key=lambda x: abs(math.log(x)), default=None))
    return turns
