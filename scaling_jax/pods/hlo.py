"""FLOPs of the matrix products in a program, from two sources that know nothing of each other.

`dot_flops` reads the text of a compiled XLA program and multiplies what stands inside a loop by the loop's trip count. `jaxpr_dot_flops`
walks the program as it was traced, before any compiler saw it. The first counts one device, the second all of them; where no product is
duplicated,

    dot_flops(compiled.as_text()) * devices == jaxpr_dot_flops(traced.jaxpr)

and a compiled count above the traced one means that devices repeat each other's work. XLA's own `cost_analysis` is of no use here: it
counts the body of a loop once, whatever the number of iterations.

A product costs 2·M·N·K (a multiplication and an addition), a batch of products that many times, a convolution 2 for every pair of an output
element and an input element that meet. Element-wise work, reductions, and kernels that the compiler does not see into (Pallas custom
calls) are not counted by either; add the kernels' arithmetic by hand.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

# One FLOP for each element of the output. Data movement, comparisons, selections and conversions are not arithmetic.
_ARITHMETIC = frozenset(
    "add subtract multiply divide remainder maximum minimum power abs negate sign exponential exponential-minus-one log log-plus-one tanh "
    "logistic sqrt rsqrt cbrt sine cosine tan erf atan2 floor ceil round-nearest-afz round-nearest-even".split()
)
_PASS_THROUGH = frozenset("copy bitcast convert reshape copy-start copy-done optimization-barrier".split())  # a counter survives these
_FLIPPED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "EQ": "EQ", "NE": "NE"}


class Instruction(NamedTuple):
    """One line of a computation. `shape` holds its array's dimensions, or those of the first array where it yields a tuple."""

    name: str
    shape: tuple[int, ...]
    opcode: str
    operands: tuple[str, ...]
    countable: bool  # an integer or truth value without dimensions, or a tuple: what a loop counter travels in
    argument: str  # the text between the opcode's parentheses: a constant's value, a parameter's number
    attributes: str


class Computation(NamedTuple):
    name: str
    instructions: dict[str, Instruction]
    root: str


class Program(NamedTuple):
    computations: dict[str, Computation]
    entry: str


class _Element(NamedTuple):
    """The i-th element of a loop's state at the start of an iteration, plus a constant."""

    index: int
    plus: int = 0


class _Compare(NamedTuple):
    direction: str
    left: Any
    right: Any


# -------------------------------------------------------------------------------------------------------------------------------- the text


def dot_flops(compiled_text: str) -> int:
    """FLOPs of the matrix products that one device carries out in one call of a compiled program.

    Args:
      compiled_text: `jax.jit(f).lower(...).compile().as_text()`, of any backend.

    Returns:
      2·M·N·K summed over `dot` and `convolution` instructions and library products, each times the trip counts of the loops around it. Of a
      conditional's branches the most expensive is counted. The name of the computation they stand in (fusion, call, async) does not matter.

    Raises:
      ValueError: a loop around a product has no trip count that the text determines, or a library product is of an unknown kind.
    """
    return _computation_flops(parse_program(compiled_text), _product_flops)


def loop_weighted_flops(compiled_text: str) -> int:
    """`dot_flops` plus one FLOP per output element of every arithmetic element-wise operation and per input element of every reduction.

    A transcendental function counts as one. Work that a fusion computes twice is counted twice, since it is done twice: this is the
    program's arithmetic and not the model's. Arguments and errors are those of `dot_flops`; here any loop without a trip count is an error.
    """
    return _computation_flops(parse_program(compiled_text), lambda c, i: _product_flops(c, i) + _arithmetic_flops(c, i))


def parse_program(compiled_text: str) -> Program:
    """The computations of a compiled program's text, each with its table of instructions by name."""
    computations: dict[str, Computation] = {}
    entry = name = root = ""
    instructions: dict[str, Instruction] = {}
    for line in compiled_text.splitlines():
        if not name:
            header = re.match(r"(ENTRY )?%?([^ (]+) \(.*\) -> .*\{$", line)
            if header:
                name, instructions, root = header[2], {}, ""
                entry = name if header[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, instructions, root)
            name = ""
        elif " = " in line:
            instruction = _parse_instruction(line)
            instructions[instruction.name] = instruction
            root = instruction.name if line.lstrip().startswith("ROOT ") else root
    if entry not in computations:
        raise ValueError("the text has no ENTRY computation: give the as_text() of a compiled program")
    return Program(computations, entry)


def _parse_instruction(line: str) -> Instruction:
    """`  ROOT %name = f32[8,16]{1,0} opcode(%a, %b), attribute=value, ...`"""
    # The metadata quotes the user's source, where anything may stand.
    line = re.sub(r', metadata=\{(?:[^"}]|"[^"]*")*\}', "", line)
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
    dims = re.search(r"\w\[([\d,<=]*)\]", line[start:type_end])
    shape = tuple(int(d.lstrip("<=")) for d in dims[1].split(",") if d) if dims else ()
    countable = line[start] == "(" or re.match(r"([su]\d+|pred)\[\]", line[start:]) is not None
    return Instruction(head[1], shape, call[1], tuple(re.findall(r"%([\w.\-]+)", argument)), countable, argument, line[close_at:])


def _closing(text: str, start: int) -> int:
    """One past the parenthesis that closes the one at `start`."""
    depth = 0
    for at in re.finditer(r"[()]", text[start:]):
        depth += 1 if at[0] == "(" else -1
        if depth == 0:
            return start + at.end()
    raise ValueError(f"unbalanced parentheses in {text.strip()[:200]!r}")


# ----------------------------------------------------------------------------------------------------------------------- walking the calls


def _computation_flops(program: Program, cost: Callable[[Computation, Instruction], int]) -> int:
    """Sums `cost` over the instructions that run, from the entry down, with trip counts."""
    needs_every_loop = cost is not _product_flops

    def visit(name: str, *arguments: Any) -> int:
        """`arguments`: what is known of the computation's parameters, in `_resolve`'s terms."""
        computation = program.computations[name]
        total = 0
        for i in computation.instructions.values():
            if i.opcode == "while":
                total += loop(computation, i, *arguments)
            elif i.opcode == "conditional":
                branches = _called(i, "branch_computations", "true_computation", "false_computation")
                total += max(visit(*call) for call in zip(branches, known(computation, i, *arguments)[1:], strict=True))
            elif i.opcode in ("fusion", "call", "async-start"):  # async-update and async-done name the computation again, but run nothing
                for called in _called(i, "calls", "to_apply", "called_computation"):
                    total += visit(called, *known(computation, i, *arguments))
            else:
                total += cost(computation, i)
        return total

    def known(computation: Computation, i: Instruction, *arguments: Any) -> list[Any]:
        return [_resolve(program, computation, operand, *arguments) for operand in i.operands]

    def loop(outer: Computation, i: Instruction, *arguments: Any) -> int:
        (condition,), (body,) = _called(i, "condition"), _called(i, "body")
        start = _resolve(program, outer, i.operands[0], *arguments)
        state = _loop_state(program, i, start)
        in_condition, in_body = visit(condition, state), visit(body, state)
        if not (in_condition or in_body or needs_every_loop):
            return 0  # any number of nothings
        trips = _trip_count(program, outer, i, start, state)
        return trips * in_body + (trips + 1) * in_condition

    return visit(program.entry)


def _called(instruction: Instruction, *attributes: str) -> list[str]:
    names = []
    for attribute in attributes:
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", instruction.attributes)
        if found:
            names += re.findall(r"[\w.\-]+", found[1])
    return names


# ----------------------------------------------------------------------------------------------------------------------------- trip counts


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
        called = program.computations[_called(i, "calls", "to_apply")[0]]
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
    body = program.computations[_called(loop, "body")[0]]
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
    condition, body = (program.computations[_called(loop, which)[0]] for which in ("condition", "body"))
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


# ----------------------------------------------------------------------------------------------------------------- cost of one instruction


def _product_flops(computation: Computation, i: Instruction) -> int:
    if i.opcode == "dot":
        lhs = computation.instructions[i.operands[0]].shape
        return 2 * math.prod(i.shape) * math.prod(lhs[d] for d in _dims(i, "lhs_contracting_dims"))
    if i.opcode == "convolution":
        return _convolution_flops(computation, i)
    if i.opcode == "custom-call":
        return _library_flops(computation, i)
    return 0


def _dims(i: Instruction, attribute: str) -> list[int]:
    found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", i.attributes)
    return [int(d) for d in found[1].split(",") if d] if found else []


def _library_flops(computation: Computation, i: Instruction) -> int:
    """A product handed to a library: oneDNN on the CPU, cuBLAS on a GPU."""
    target = re.search(r'custom_call_target="([^"]*)"', i.attributes)
    if target is None or not re.search(r"matmul|gemm|dot|\$conv", target[1].lower()):
        return 0
    lhs = computation.instructions[i.operands[0]].shape
    contracted = re.search(r'"lhs_contracting_dimensions":\["(\d+)"\]', i.attributes)  # cuBLAS writes the whole dot_dimension_numbers
    if contracted:
        return 2 * math.prod(i.shape) * lhs[int(contracted[1])]
    if target[1] == "__onednn$matmul":
        transposed = re.search(r'"transpose_a":true', i.attributes)
        return 2 * math.prod(i.shape) * lhs[-2 if transposed else -1]
    raise ValueError(f"no rule for the FLOPs of custom call {target[1]!r} ({i.name} in {computation.name})")


def _convolution_flops(computation: Computation, i: Instruction) -> int:
    """TPU programs write every product as a convolution; a batched or windowed one as a convolution with dilation or padding.

    Padding and the holes of a dilated input are not multiplied, so only pairs of an output position and a window position that meet an
    input element are counted, as XLA's own HloCostAnalysis does.
    """
    lhs_labels, rhs_labels, out_labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes).groups()
    lhs, rhs = (computation.instructions[operand].shape for operand in i.operands[:2])
    window = dict(re.findall(r"(\w+)=([\w\-]+)", m[1])) if (m := re.search(r"window=\{([^}]*)\}", i.attributes)) else {}
    flops = 2 * i.shape[out_labels.index("b")] * i.shape[out_labels.index("f")] * rhs[rhs_labels.index("i")]
    for d in range(len(lhs_labels) - 2):
        label = str(d)

        def along(key: str, default: str, d: int = d) -> str:
            return window[key].split("x")[d] if key in window else default

        size, stride = int(along("size", "1")), int(along("stride", "1"))
        holes, spread = int(along("lhs_dilate", "1")), int(along("rhs_dilate", "1"))
        padded = int(along("pad", "0_0").split("_")[0])
        at = np.arange(i.shape[out_labels.index(label)])[:, None] * stride + np.arange(size) * spread - padded
        length = lhs[lhs_labels.index(label)]
        flops *= int(np.count_nonzero((at >= 0) & (at <= (length - 1) * holes) & (at % holes == 0)))
    return flops


def _arithmetic_flops(computation: Computation, i: Instruction) -> int:
    if i.opcode in _ARITHMETIC:
        return math.prod(i.shape)
    if i.opcode == "reduce":
        arrays = len(i.operands) // 2  # then as many initial values
        return sum(math.prod(computation.instructions[operand].shape) for operand in i.operands[:arrays])
    if i.opcode == "reduce-window":
        sizes = re.search(r"window=\{size=([\dx]+)", i.attributes)
        return math.prod(i.shape) * (math.prod(int(s) for s in sizes[1].split("x")) if sizes else 1)
    if i.opcode == "scatter":
        return math.prod(computation.instructions[i.operands[-1]].shape)
    return 0


# ------------------------------------------------------------------------------------------------------------------------------- the jaxpr


def jaxpr_dot_flops(jaxpr: Any) -> int:
    """FLOPs of the matrix products of a traced program on all devices together.

    Args:
      jaxpr: `jax.jit(f).trace(...).jaxpr`, or what `jax.make_jaxpr` returns.

    Returns:
      2·M·N·K summed over `dot_general`, times the lengths of the scans and the sizes of the shard_maps around it. Of a conditional's
      branches the most expensive is counted. Pallas kernels are not counted.

    Raises:
      ValueError: a while loop around a product (a jaxpr does not say how often it runs), or a product of another kind than dot_general.
    """
    total = 0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            contracted = params["dimension_numbers"][0][0]
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(equation.invars[0].aval.shape[d] for d in contracted)
        elif name.startswith(("conv_general", "ragged_dot", "scaled_matmul", "scaled_dot")):
            raise ValueError(f"no rule for the FLOPs of {name}: only dot_general is counted")
        elif name == "pallas_call":
            continue
        elif name == "scan":
            total += params["length"] * jaxpr_dot_flops(params["jaxpr"])
        elif name == "cond":
            total += max(jaxpr_dot_flops(branch) for branch in params["branches"])
        elif name == "while":
            if jaxpr_dot_flops(params["body_jaxpr"]) or jaxpr_dot_flops(params["cond_jaxpr"]):
                raise ValueError("a while loop around a matrix product has no static trip count in a jaxpr: use scan")
        elif name == "shard_map":
            # Inside, shapes are one device's along the axes that became manual here, and still the whole's along any other.
            axes = params.get("newly_manual_axes", params.get("manual_axes"))
            total += math.prod(params["mesh"].shape[axis] for axis in axes) * jaxpr_dot_flops(params["jaxpr"])
        else:
            total += sum(jaxpr_dot_flops(value) for value in params.values() if hasattr(getattr(value, "jaxpr", value), "eqns"))
    return total
