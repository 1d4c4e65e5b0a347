"""FLOPs of the matrix products in a program, from two sources that know nothing of each other.

`dot_flops` reads the text of a compiled XLA program and multiplies what stands inside a loop by the loop's trip count. `jaxpr_dot_flops`
walks the program as it was traced, before any compiler saw it. The first counts one device, the second all of them; where no product is
duplicated,

    dot_flops(compiled.as_text()) * devices == jaxpr_dot_flops(traced.jaxpr)

and a compiled count above the traced one means that devices repeat each other's work.

A product costs 2·M·N·K (a multiplication and an addition), a batch of products that many times, a convolution 2 for every pair of an output
element and an input element that meet. Element-wise work, reductions, and kernels that the compiler does not see into (Pallas custom
calls, which `pods.hlo.pallas_kernels` counts) are not counted by either; add the kernels' arithmetic by hand.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from scaling_jax.pods.hlo import Computation, Instruction, parse_program, walk

# One FLOP for each element of the output. Data movement, comparisons, selections and conversions are not arithmetic.
_ARITHMETIC = frozenset(
    "add subtract multiply divide remainder maximum minimum power abs negate sign exponential exponential-minus-one log log-plus-one tanh "
    "logistic sqrt rsqrt cbrt sine cosine tan erf atan2 floor ceil round-nearest-afz round-nearest-even".split()
)


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
    return _total(compiled_text, _product_flops)


def loop_weighted_flops(compiled_text: str) -> int:
    """`dot_flops` plus one FLOP per output element of every arithmetic element-wise operation and per input element of every reduction.

    A transcendental function counts as one. Work that a fusion computes twice is counted twice, since it is done twice: this is the
    program's arithmetic and not the model's. Arguments and errors are those of `dot_flops`.
    """
    return _total(compiled_text, lambda c, i: _product_flops(c, i) + _arithmetic_flops(c, i))


def _total(compiled_text: str, cost: Callable[[Computation, Instruction], int]) -> int:
    def read(computation: Computation, i: Instruction, callers: tuple[Instruction, ...]) -> int | None:
        return cost(computation, i) or None

    return sum(run.times * run.found for run in walk(parse_program(compiled_text), read, weight=lambda flops: flops))


# ------------------------------------------------------------------------------------------------------------------ cost of one instruction


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


# -------------------------------------------------------------------------------------------------------------------------------- the jaxpr


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
