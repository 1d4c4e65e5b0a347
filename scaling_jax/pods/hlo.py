"""The text of a compiled XLA program: its computations, and every instruction that one call of it carries out, with trip counts.

`parse_program` reads `jax.jit(f).lower(...).compile().as_text()` of any backend. `walk` goes down from the entry through fusions, calls,
asynchronous wrappers, branches and loops, and says how often each instruction that the caller asks for runs. XLA's own `cost_analysis`
is of no use for this: it counts the body of a loop once, whatever the number of iterations. A trip count is the compiler's note where it
left one (the CPU's compiler does, the TPU's does not) and otherwise follows from the start, step and bound of the loop's counter.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

_PASS_THROUGH = frozenset("copy bitcast convert reshape copy-start copy-done optimization-barrier".split())  # a counter survives these
_FLIPPED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "EQ": "EQ", "NE": "NE"}


class ArrayType(NamedTuple):
    dtype: str  # as XLA writes it: f32, bf16, s32, pred, token
    shape: tuple[int, ...]


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[ArrayType, ...]  # what it yields: one array, or all the arrays of its tuple
    operands: tuple[str, ...]
    countable: bool  # an integer or truth value without dimensions, or a tuple: what a loop counter travels in
    argument: str  # the text between the opcode's parentheses: a constant's value, a parameter's number
    attributes: str
    op_name: str  # the operation of the traced program that it comes from, with its scopes; empty where the compiler made it up

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions of its array, or of the first array of its tuple."""
        return self.arrays[0].shape if self.arrays else ()


class Computation(NamedTuple):
    name: str
    instructions: dict[str, Instruction]
    root: str


class Program(NamedTuple):
    computations: dict[str, Computation]
    entry: str
    header: str  # the HloModule line


class Loop(NamedTuple):
    name: str
    body: str  # name of the computation that it repeats
    op_name: str
    trips: int


class Run(NamedTuple):
    """An instruction that runs, and what the caller of `walk` has read from it."""

    found: Any
    times: int  # in one call of the program: the product of the trip counts
    loops: tuple[Loop, ...]  # those it stands in, outermost first


class _Element(NamedTuple):
    """The i-th element of a loop's state at the start of an iteration, plus a constant."""

    index: int
    plus: int = 0


class _Compare(NamedTuple):
    direction: str
    left: Any
    right: Any


# --------------------------------------------------------------------------------------------------------------------------------- the text


def parse_program(compiled_text: str) -> Program:
    """The computations of a compiled program's text, each with its table of instructions by name."""
    computations: dict[str, Computation] = {}
    entry = name = header = ""
    lines: list[str] = []
    for line in compiled_text.splitlines():
        if not name:
            header = line if line.startswith("HloModule ") else header
            opening = re.match(r"(ENTRY )?%?([^ (]+) \(.*\) -> .*\{$", line)
            if opening:
                name, lines = opening[2], []
                entry = name if opening[1] else entry
        elif re.match(r"\}($|, \w+=)", line):
            computations[name] = _parse_computation(name, lines)
            name = ""
        elif re.match(r"\s+(ROOT )?%?[^\s=]+ = ", line):
            lines.append(line)
        elif lines:
            lines[-1] += line  # what a Pallas kernel says of itself is printed over several lines
    if entry not in computations:
        raise ValueError("the text has no ENTRY computation: give the as_text() of a compiled program")
    return Program(computations, entry, header)


def _parse_computation(name: str, lines: list[str]) -> Computation:
    instructions = [_parse_instruction(line) for line in lines]
    roots = [i.name for i, line in zip(instructions, lines, strict=True) if line.lstrip().startswith("ROOT ")]
    return Computation(name, {i.name: i for i in instructions}, roots[-1] if roots else "")


def _parse_instruction(line: str) -> Instruction:
    """`  ROOT %name = f32[8,16]{1,0} opcode(%a, %b), attribute=value, ...`"""
    # The metadata quotes the user's source, where anything may stand.
    op_name = ""
    metadata = re.search(r', metadata=\{(?:[^"}]|"(?:[^"\\]|\\.)*")*\}', line)
    if metadata:
        named = re.search(r'op_name="((?:[^"\\]|\\.)*)"', metadata[0])
        op_name = named[1] if named else ""
        line = line[: metadata.start()] + line[metadata.end() :]
    head = re.match(r"\s*(?:ROOT )?%?(\S+) = ", line)
    if head is None:
        raise ValueError(f"not an instruction: {line.strip()[:200]!r}")
    start = head.end()
    type_end = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    call = re.match(r"\s*([\w\-]+)\(", line[type_end:])
    if call is None:
        raise ValueError(f"no opcode in instruction {line.strip()[:200]!r}")
    open_at = type_end + call.end() - 1
    close_at = _closing(line, open_at)
    argument = line[open_at + 1 : close_at - 1]
    countable = line[start] == "(" or re.match(r"([su]\d+|pred)\[\]", line[start:]) is not None
    operands = tuple(re.findall(r"%([\w.\-]+)", argument))
    return Instruction(head[1], call[1], _array_types(line[start:type_end]), operands, countable, argument, line[close_at:], op_name)


def _array_types(text: str) -> tuple[ArrayType, ...]:
    found = re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", text)
    return tuple(ArrayType(dtype, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)) for dtype, dims in found)


def _closing(text: str, start: int) -> int:
    """One past the parenthesis that closes the one at `start`."""
    depth = 0
    for at in re.finditer(r"[()]", text[start:]):
        depth += 1 if at[0] == "(" else -1
        if depth == 0:
            return start + at.end()
    raise ValueError(f"unbalanced parentheses in {text.strip()[:200]!r}")


# ------------------------------------------------------------------------------------------------------------------------ walking the calls


def walk(
    program: Program,
    read: Callable[[Computation, Instruction, tuple[Instruction, ...]], Any],
    weight: Callable[[Any], float] = lambda found: 1.0,
) -> list[Run]:
    """Every instruction of interest that one call of the program runs, with the number of times.

    Args:
      program: from `parse_program`.
      read: is given an instruction, the computation it stands in and the fusions, calls, branches and loops around it, outermost first;
        what it returns is kept, and None is left out.
      weight: of what `read` returned. Of a conditional's branches only the heaviest is taken, each weight times how often it runs.

    Raises:
      ValueError: a loop around something of interest has no trip count that the text determines.
    """

    def visit(name: str, callers: tuple[Instruction, ...], *arguments: Any) -> list[Run]:
        """`arguments`: what is known of the computation's parameters, in `_resolve`'s terms."""
        computation = program.computations[name]
        runs = []
        for i in computation.instructions.values():
            if i.opcode == "while":
                runs += loop(computation, i, callers, *arguments)
            elif i.opcode == "conditional":
                branches = called_by(i, "branch_computations", "true_computation", "false_computation")
                known_arguments = known(computation, i, *arguments)[1:]
                taken = [visit(branch, (*callers, i), given) for branch, given in zip(branches, known_arguments, strict=True)]
                runs += max(taken, key=lambda branch: sum(run.times * weight(run.found) for run in branch))
            elif i.opcode in ("fusion", "call", "call-start", "async-start"):  # -update and -done name it again, but run nothing
                for called in called_by(i, "calls", "to_apply", "called_computation"):
                    runs += visit(called, (*callers, i), *known(computation, i, *arguments))
            else:
                found = read(computation, i, callers)
                runs += [] if found is None else [Run(found, 1, ())]
        return runs

    def known(computation: Computation, i: Instruction, *arguments: Any) -> list[Any]:
        return [_resolve(program, computation, operand, *arguments) for operand in i.operands]

    def loop(outer: Computation, i: Instruction, callers: tuple[Instruction, ...], *arguments: Any) -> list[Run]:
        (condition,), (body,) = called_by(i, "condition"), called_by(i, "body")
        start = _resolve(program, outer, i.operands[0], *arguments)
        state = _loop_state(program, i, start)
        in_condition, in_body = (visit(name, (*callers, i), state) for name in (condition, body))
        if not in_condition and not in_body:
            return []  # any number of nothings
        trips = _trip_count(program, outer, i, start, state)
        around = Loop(i.name, body, i.op_name, trips)

        def repeated(runs: list[Run], times: int) -> list[Run]:
            return [Run(run.found, run.times * times, (around, *run.loops)) for run in runs]

        return repeated(in_body, trips) + repeated(in_condition, trips + 1)

    return visit(program.entry, ())


def pallas_kernels(compiled_text: str) -> dict[str, int]:
    """How often one call of a TPU program runs each Pallas kernel, by the kernel's name. The compiler does not count their FLOPs."""

    def kernel(computation: Computation, i: Instruction, callers: tuple[Instruction, ...]) -> str | None:
        is_kernel = i.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in i.attributes
        return re.sub(r"(\.\d+|\.clone|\.remat\d*)+$", "", i.name) if is_kernel else None

    counts: dict[str, int] = {}
    for run in walk(parse_program(compiled_text), kernel):
        counts[run.found] = counts.get(run.found, 0) + run.times
    return counts


def called_by(instruction: Instruction, *attributes: str) -> list[str]:
    """Names of the computations that these attributes of an instruction name."""
    names = []
    for attribute in attributes:
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", instruction.attributes)
        if found:
            names += re.findall(r"[\w.\-]+", found[1])
    return names


# ------------------------------------------------------------------------------------------------------------------------------ trip counts


def _resolve(program: Program, computation: Computation, name: str, *arguments: Any) -> Any:
    """What is known of a value: an int, an _Element, a _Compare, a list for a tuple, or None. `arguments`: the same of the parameters."""
    i = computation.instructions[name]
    if not i.countable:
        return None
    if i.opcode == "constant":
        return int(i.argument) if re.fullmatch(r"-?\d+", i.argument) else None
    if i.opcode == "parameter":
        return arguments[int(i.argument)] if int(i.argument) < len(arguments) else None
    if i.opcode in _PASS_THROUGH:
        return _resolve(program, computation, i.operands[0], *arguments)
    if i.opcode == "tuple":
        return [_resolve(program, computation, operand, *arguments) for operand in i.operands]
    if i.opcode == "get-tuple-element":
        elements = _resolve(program, computation, i.operands[0], *arguments)
        index = int(re.search(r"index=(\d+)", i.attributes)[1])
        return elements[index] if isinstance(elements, list) else None
    if i.opcode in ("fusion", "call"):
        called = program.computations[called_by(i, "calls", "to_apply")[0]]
        return _resolve(program, called, called.root, *(_resolve(program, computation, operand, *arguments) for operand in i.operands))
    if i.opcode == "compare":
        left, right = (_resolve(program, computation, operand, *arguments) for operand in i.operands)
        return _Compare(re.search(r"direction=(\w+)", i.attributes)[1], left, right)
    if i.opcode in ("add", "subtract"):
        left, right = (_resolve(program, computation, operand, *arguments) for operand in i.operands)
        sign = 1 if i.opcode == "add" else -1
        if isinstance(right, int) and isinstance(left, int):
            return left + sign * right
        if isinstance(right, int) and isinstance(left, _Element):
            return _Element(left.index, left.plus + sign * right)
        if isinstance(left, int) and isinstance(right, _Element) and sign == 1:
            return _Element(right.index, right.plus + left)
    return None


def _loop_state(program: Program, loop: Instruction, start: Any) -> list[Any]:
    """A loop's state as its body sees it: a constant where the body hands a constant on unchanged, otherwise the element itself."""
    body = program.computations[called_by(loop, "body")[0]]
    elements = [_Element(k) for k in range(len(start) if isinstance(start, list) else 0)]
    after = _resolve(program, body, body.root, elements)
    if not isinstance(start, list) or not isinstance(after, list):
        return elements
    return [s if isinstance(s, int) and a == e else e for s, a, e in zip(start, after, elements, strict=True)]


def _trip_count(program: Program, outer: Computation, loop: Instruction, start: Any, state: list[Any]) -> int:
    """From the compiler's note where it left one, otherwise from start, step and bound of the counter that the condition compares."""
    note = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if note:
        return int(note[1])
    condition, body = (program.computations[called_by(loop, which)[0]] for which in ("condition", "body"))
    after = _resolve(program, body, body.root, state)
    test = _resolve(program, condition, condition.root, state)
    if isinstance(test, _Compare) and isinstance(test.right, _Element):
        test = _Compare(_FLIPPED[test.direction], test.right, test.left)
    if isinstance(test, _Compare) and isinstance(test.left, _Element) and isinstance(test.right, int):
        counter = test.left.index
        first, step = start[counter], after[counter] if isinstance(after, list) else None
        if isinstance(first, int) and isinstance(step, _Element) and step.index == counter:
            distance = test.right - (first + test.left.plus)
            trips = _steps(test.direction, distance, step.plus)
            if trips is not None:
                return trips
    raise ValueError(f"loop {loop.name} in {outer.name}: no trip count can be told from the text (start, step or bound is not constant)")


def _steps(direction: str, distance: int, step: int) -> int | None:
    """How often a counter that starts `distance` below its bound passes the test. None: not known, or never ends."""
    if direction in ("GT", "GE"):
        direction, distance, step = _FLIPPED[direction], -distance, -step
    if direction == "NE":
        return distance // step if step and distance % step == 0 and distance // step >= 0 else None
    distance += 1 if direction == "LE" else 0
    if direction not in ("LT", "LE") or (step <= 0 and distance > 0):
        return None
    return max(0, math.ceil(distance / step)) if distance > 0 else 0
