"""The text of compiled programs: how often each instruction runs, where what runs stands, and Pallas kernels."""

import jax
import jax.numpy as jnp
import pytest

from scaling_jax.pods.hlo import ArrayType, Run, pallas_kernels, parse_program, walk


def runs_of(opcode: str, program: str) -> list[Run]:
    return walk(parse_program(program), lambda computation, i, callers: i if i.opcode == opcode else None)


def times(opcode: str, program: str) -> int:
    return sum(run.times for run in runs_of(opcode, program))


def scan_of_scan(x):
    def inner(h, w):
        return jnp.tanh(h) * w, None

    def outer(h, ws):
        return jnp.sin(jax.lax.scan(inner, h, ws)[0]), None

    return jnp.cos(jax.lax.scan(outer, x, jnp.ones((5, 3)))[0])


@pytest.mark.parametrize("note", ["known_trip_count", "nothing"])
def test_loops_multiply(note):
    program = jax.jit(scan_of_scan).lower(jnp.ones(64)).compile().as_text()
    assert "known_trip_count" in program
    program = program.replace("known_trip_count", note)
    assert [times(opcode, program) for opcode in ("tanh", "sine", "cosine")] == [15, 5, 1]
    (tanh,) = runs_of("tanh", program)
    assert [loop.trips for loop in tanh.loops] == [5, 3]
    assert all("while" in loop.op_name for loop in tanh.loops)
    assert tanh.found.op_name == "jit(scan_of_scan)/while/body/closed_call/while/body/closed_call/tanh"
    assert tanh.found.arrays == (ArrayType("f32", (64,)),)


@pytest.mark.parametrize("first", [True, False])
def test_conditional_takes_its_heaviest_branch(first):
    def once(x):
        return jnp.tanh(jnp.sin(x))

    def often(x):
        return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x), x)

    def f(p, x):
        return jax.lax.cond(p, *((once, often) if first else (often, once)), x)

    program = jax.jit(f).lower(True, jnp.ones(64)).compile().as_text()
    assert times("tanh", program) == 3
    weights = {"sine": 9, "tanh": 1}
    heaviest = walk(parse_program(program), lambda c, i, callers: i.opcode if i.opcode in weights else None, weights.get)
    assert sorted(run.found for run in heaviest) == ["sine", "tanh"]


TPU_LOOP = """
HloModule step, is_scheduled=true

%fused_computation (param_0: bf16[16,32], param_1: bf16[32,8]) -> bf16[16,8] {
  %param_0 = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = bf16[32,8]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} convolution(%param_0, %param_1), dim_labels=bf_io->bf, metadata={op_name="a } b"}
}

%body (state: (s32[], bf16[16,32], bf16[32,8], s32[])) -> (s32[], bf16[16,32], bf16[32,8], /*index=3*/s32[]) {
  %state = (s32[]{:T(128)}, bf16[16,32]{1,0:T(8,128)(2,1)}, bf16[32,8]{1,0}, /*index=3*/s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %limit = s32[]{:T(128)} get-tuple-element(%state), index=3
  %x = bf16[16,32]{1,0} get-tuple-element(%state), index=1
  %w = bf16[32,8]{1,0} get-tuple-element(%state), index=2
  %fusion = bf16[16,8]{1,0} fusion(%x, %w), kind=kOutput, calls=%fused_computation, backend_config={"estimated_cycles":"1"}
  %step = s32[]{:T(128)} constant(STEP)
  %next = s32[]{:T(128)} add(%i, %step)
  ROOT %out = (s32[], bf16[16,32], bf16[32,8], /*index=3*/s32[]) tuple(%next, %x, %w, /*index=3*/%limit)
}

%condition (state.1: (s32[], bf16[16,32], bf16[32,8], /*index=3*/s32[])) -> pred[] {
  %state.1 = (s32[], bf16[16,32]{1,0}, bf16[32,8]{1,0}, /*index=3*/s32[]) parameter(0)
  %limit.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=3
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %test = pred[]{:T(512)} compare(%i.1, %limit.1), direction=DIRECTION
}

ENTRY %main (x.1: bf16[16,32], w.1: bf16[32,8], n: s32[]) -> bf16[16,32] {
  %x.1 = bf16[16,32]{1,0} parameter(0)
  %w.1 = bf16[32,8]{1,0} parameter(1)
  %n = s32[] parameter(2)
  %first = s32[] constant(FIRST)
  %bound = s32[] constant(BOUND)
  %start = (s32[], bf16[16,32], bf16[32,8], /*index=3*/s32[]) tuple(%first, %x.1, %w.1, /*index=3*/%bound)
  %while = (s32[], bf16[16,32], bf16[32,8], /*index=3*/s32[]) while(%start), condition=%condition, body=%body
  ROOT %result = bf16[16,32]{1,0} get-tuple-element(%while), index=1
}
"""


def tpu_loop(first, bound, step, direction="LT"):
    return TPU_LOOP.replace("STEP", str(step)).replace("FIRST", str(first)).replace("BOUND", str(bound)).replace("DIRECTION", direction)


@pytest.mark.parametrize(
    "first, bound, step, direction, trips",
    [(0, 8, 1, "LT", 8), (1, 80, 1, "LT", 79), (0, 8, 2, "LT", 4), (0, 7, 2, "LT", 4), (0, 8, 2, "LE", 5), (9, 0, -3, "GT", 3)]
    + [(9, 0, -3, "GE", 4), (0, 6, 3, "NE", 2), (5, 5, 1, "LT", 0)],
)
def test_trip_count_from_start_step_and_bound(first, bound, step, direction, trips):
    program = tpu_loop(first, bound, step, direction)
    assert (times("convolution", program), times("compare", program)) == (trips, trips + 1)


def test_a_bound_or_step_that_is_not_constant_is_refused():
    for program in (
        tpu_loop(0, 8, 1).replace("tuple(%first, %x.1, %w.1, /*index=3*/%bound)", "tuple(%first, %x.1, %w.1, %n)"),
        tpu_loop(0, 8, 1).replace("%next = s32[]{:T(128)} add", "%next = s32[]{:T(128)} multiply"),
        tpu_loop(0, 8, 0),
    ):
        with pytest.raises(ValueError, match="trip count"):
            times("convolution", program)


KERNEL = """, custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128, \\"of\\": \\"(\\"}"
}}, metadata={op_name="a/b"}, backend_config={"custom_call_config":{"body":"TUzv"}}"""


def test_pallas_kernels_are_counted_by_name():
    """What a kernel says of itself breaks its line; the instructions after it must not be lost."""
    program = tpu_loop(0, 6, 1).replace(
        "  %step = ",
        f"  %flash_fwd.3 = bf16[16,8]{{1,0}} custom-call(%x, %w){KERNEL}\n"
        f"  %flash_fwd.12 = (bf16[16,8]{{1,0}}, f32[8]{{0}}) custom-call(%x, %w){KERNEL}\n  %step = ",
    )
    program = program.replace("  ROOT %result", f"  %flash_dq = bf16[16,8]{{1,0}} custom-call(%x.1, %w.1){KERNEL}\n  ROOT %result")
    assert pallas_kernels(program) == {"flash_fwd": 12, "flash_dq": 1}
    assert times("convolution", program) == 6
    assert {run.found.op_name for run in runs_of("custom-call", program)} == {"a/b"}
    assert pallas_kernels(tpu_loop(0, 6, 1)) == {}


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="ENTRY"):
        parse_program("module @jit_f {}")
