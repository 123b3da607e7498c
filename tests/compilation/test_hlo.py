"""Counts of compiled programs: products inside loops, collectives by axis, bytes; on CPU programs and on TPU text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from npedit_jax import chips, flops
from npedit_jax.compilation import collectives, hlo, hlo_text, report
from npedit_jax.models import positions
from npedit_jax.models.denoiser import Denoiser
from npedit_jax.training import networks

ONE = {"data": 1, "fsdp": 1, "tensor": 1}
# ruff: noqa: E501
TPU = """HloModule jit_f, is_scheduled=true

%fused (param_0: bf16[30,8,16], param_1: s32[]) -> bf16[8,16] {
  %param_0 = bf16[30,8,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %slice = bf16[1,8,16]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param_0, %param_1, %zero), dynamic_slice_sizes={1,8,16}
  ROOT %out = bf16[8,16]{1,0:T(8,128)(2,1)} bitcast(%slice)
}

%outer (param_0.1: bf16[30,8,16], param_1.1: s32[]) -> bf16[8,16] {
  %param_0.1 = bf16[30,8,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.1 = s32[]{:T(128)} parameter(1)
  %renamed = bf16[30,8,16]{2,1,0:T(8,128)(2,1)} bitcast(%param_0.1)
  ROOT %inner = bf16[8,16]{1,0:T(8,128)(2,1)} fusion(%renamed, %param_1.1), kind=kLoop, calls=%fused
}

%body (p: (s32[], bf16[30,8,16], bf16[4,64])) -> (s32[], bf16[30,8,16], bf16[4,64]) {
  %p = (s32[]{:T(128)}, bf16[30,8,16]{2,1,0}, bf16[4,64]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %stack = bf16[30,8,16]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %x = bf16[4,64]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=2
  %layer = bf16[8,16]{1,0:T(8,128)(2,1)} fusion(%stack, %i), kind=kLoop, calls=%outer
  %whole = bf16[64,16]{1,0:T(8,128)(2,1)} all-gather(%layer), channel_id=3, replica_groups=[1,8]<=[8], dimensions={0}, use_global_device_ids=true, metadata={op_name="jit(f)/gather"}
  %y = bf16[4,16]{1,0:T(8,128)(2,1)} convolution(%x, %whole), dim_labels=bf_io->bf
  %k = bf16[4,64]{1,0:T(8,128)(2,1)} custom-call(%y), custom_call_target="tpu_custom_call", backend_config={"custom_call_config": {"body": "abc",
"xprof_metadata":"{}"}}, metadata={op_name="jit(f)/kernel"}
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  ROOT %t = (s32[]{:T(128)}, bf16[30,8,16]{2,1,0}, bf16[4,64]{1,0}) tuple(%next, %stack, %k)
}

%condition (c: (s32[], bf16[30,8,16], bf16[4,64])) -> pred[] {
  %c = (s32[]{:T(128)}, bf16[30,8,16]{2,1,0}, bf16[4,64]{1,0}) parameter(0)
  %n = s32[]{:T(128)} constant(7)
  %j = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %less = pred[]{:T(512)} compare(%j, %n), direction=LT
}

ENTRY %main (a: bf16[30,8,16], b: bf16[4,64]) -> bf16[4,64] {
  %a = bf16[30,8,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[4,64]{1,0:T(8,128)(2,1)} parameter(1)
  %start = s32[]{:T(128)} constant(0)
  %tuple = (s32[]{:T(128)}, bf16[30,8,16]{2,1,0}, bf16[4,64]{1,0}) tuple(%start, %a, %b)
  %loop = (s32[]{:T(128)}, bf16[30,8,16]{2,1,0}, bf16[4,64]{1,0}) while(%tuple), condition=%condition, body=%body
  ROOT %result = bf16[4,64]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=2
}
"""


def test_a_loop_of_the_tpu_compiler_is_counted_by_its_length():
    """From 0 in steps of 2 below 7: four times; the stack is read a layer at a time."""
    work = hlo.Program(TPU).work({"data": 1, "fsdp": 8, "tensor": 1})
    assert work.flops == 4 * 2 * 4 * 64 * 16
    (gather,) = work.collectives
    assert (gather.kind, gather.axes, gather.group, gather.times) == ("all-gather", ("fsdp",), 8, 4)
    assert gather.bytes == 64 * 16 * 2 and gather.moved == pytest.approx(4 * 64 * 16 * 2 * 7 / 8)
    layer, whole, x, y = 8 * 16 * 2, 64 * 16 * 2, 4 * 64 * 2, 4 * 16 * 2
    scalars = 4 + 3 * 4 + 2 * 4 + 1  # the layer's number, the addition; the comparison runs once more
    products = (layer + whole) + (x + whole + y) + (y + x)
    assert work.traffic == pytest.approx(4 * (2 * layer + products + scalars), abs=4 * 16)


def test_a_loop_whose_first_round_stands_before_it_is_one_shorter():
    peeled = TPU.replace(
        "%start = s32[]{:T(128)} constant(0)", "%one = s32[]{:T(128)} constant(1)\n  %start = s32[]{:T(128)} copy(%one)"
    )
    (gather,) = hlo.Program(peeled).work({"data": 1, "fsdp": 8, "tensor": 1}).collectives
    assert gather.times == 3  # 1, 3, 5
    with pytest.raises(hlo_text.Unreadable, match="no known trip count"):
        hlo.Program(TPU.replace("tuple(%start, %a, %b)", "tuple(%b, %a, %b)")).work({"data": 1, "fsdp": 8, "tensor": 1})


def test_arguments_are_among_the_largest_arrays():
    named = TPU.replace(
        "%a = bf16[30,8,16]{2,1,0:T(8,128)(2,1)} parameter(0)",
        '%a = bf16[30,8,16]{2,1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="params"}',
    )
    largest = hlo.Program(named).work({"data": 1, "fsdp": 8, "tensor": 1}).largest
    assert largest[0] == (30 * 8 * 16 * 2, "bf16[30, 8, 16] argument params")


def test_a_computation_of_another_core_ends_too():
    apart = TPU.replace("(2,1)} bitcast(%slice)\n}", '(2,1)} bitcast(%slice)\n}, execution_thread="sparsecore"')
    assert apart != TPU
    mesh = {"data": 1, "fsdp": 8, "tensor": 1}
    assert hlo.Program(apart).work(mesh) == hlo.Program(TPU).work(mesh)


EXCHANGED = """HloModule jit_f, is_scheduled=true

ENTRY %main (a: bf16[64,8,128]) -> bf16[64,8,128] {
  %a = bf16[64,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %after = token[] after-all()
  %send = (bf16[64,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) send(%a, %after), channel_id=4, is_host_transfer=true, frontend_attributes={ATTRIBUTES}
  %recv = (bf16[RECEIVED,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) recv(%after), channel_id=3, is_host_transfer=true, frontend_attributes={ATTRIBUTES}
  %sent = token[] send-done(%send), channel_id=4, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %received = (bf16[RECEIVED,8,128]{2,1,0:T(8,128)(2,1)}, token[]) recv-done(%recv), channel_id=3, is_host_transfer=true
  ROOT %out = bf16[RECEIVED,8,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%received), index=0
}
"""
ATTRIBUTES = (
    '_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.6_0",'
    '_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{TARGET}x{0:3}",_xla_megascale_transfer_type="TYPE"'
)


@pytest.mark.parametrize(
    ("type", "target", "received", "kind", "slices"),
    [
        ("ALL_REDUCE", "{1,2}", 64, "all-reduce", 2),
        ("ALL_REDUCE", "{0:3}", 64, "all-reduce", 4),
        ("REDUCE_SCATTER", "{1,2}", 32, "reduce-scatter", 2),
    ],
)
def test_what_slices_exchange_goes_over_the_network(type, target, received, kind, slices):
    """The compiler leaves it to the runtime, as a pair of transfers to the host: one exchange, counted once."""
    attributes = ATTRIBUTES.replace("{TARGET}", target).replace("TYPE", type)
    text = EXCHANGED.replace("ATTRIBUTES", attributes).replace("RECEIVED", str(received))
    (found,) = hlo.Program(text).work({"data": slices, "fsdp": 4, "tensor": 1}).collectives
    assert (found.kind, found.axes, found.group, found.between_slices) == (kind, ("data",), slices, True)
    assert found.bytes == 64 * 8 * 128 * 2 and found.times == 1
    chip = chips.CHIPS["v5e"]
    times = report._times(hlo.Work(0.0, 0.0, (found,), ()), chip)
    assert times["network"] == found.moved / chip.network and times["interconnect"] == 0.0


STARTED = """HloModule jit_f, is_scheduled=true

ENTRY %main (a: s8[1024], b: f32[64,64], c: s32[32]) -> f32[64,64] {
  %a = s8[1024]{0:T(1024)(128)(4,1)} parameter(0)
  %b = f32[64,64]{1,0:T(8,128)} parameter(1)
  %c = s32[32]{0:T(128)} parameter(2)
  INSTRUCTION
  ROOT %copy = f32[64,64]{1,0:T(8,128)S(1)} copy-done(%start)
}
"""


@pytest.mark.parametrize(
    ("instruction", "moved"),
    [
        # Into the vector memory: a part of an array, and a whole one.
        ("((s8[1024]{0:T(1024)}), s8[256]{0:T(1024)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:256]}", 256),
        ("(f32[64,64]{1,0:T(8,128)S(1)}, f32[64,64]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%b)", 64 * 64 * 4),
        ("(f32[64,64]{0,1:T(8,128)}, f32[64,64]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%b)", 2 * 64 * 64 * 4),
        ("(s32[32]{0}, s32[32]{0:S(1)}, u32[], u32[]) collective-permute-start(%c), source_target_pairs={{0,1}}", 128),
        ("(s32[32]{0}, s32[256]{0}) all-gather-start(%c), replica_groups={{0,1,2,3,4,5,6,7}}", 128 + 1024),
        ('f32[64,64]{1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"', 0),
        ('f32[64,64]{1,0:T(8,128)} custom-call(%b), custom_call_target="tpu_custom_call"', 2 * 64 * 64 * 4),
        ("s32[32]{0} all-reduce-start(%c), replica_groups={{0,1}}, to_apply=%add", 128 + 128),
    ],
)
def test_what_runs_beside_the_computation_counts_what_it_reads_and_writes(instruction, moved):
    """Its results name its operands too, and hold counters."""
    text = STARTED.replace("INSTRUCTION", f"%start = {instruction}")
    assert hlo.Program(text).work({"data": 1, "fsdp": 8, "tensor": 1}).traffic == moved


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [("s8", 8), ("s32", 32), ("u4", 4), ("bf16", 16), ("f8e4m3fn", 8), ("pred", 8), ("c64", 64), ("token", 0)],
)
def test_sizes_of_elements(dtype, bits):
    assert hlo_text.Array(dtype, (16,), "").bytes == 16 * bits // 8


def test_a_loop_without_an_end_is_an_error():
    with pytest.raises(ValueError, match="loop loop has no known trip count"):
        hlo.Program(TPU.replace("direction=LT", "direction=NE")).work(ONE)
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.Program("HloModule empty\n")


@pytest.mark.parametrize(
    ("attributes", "devices", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, dimensions={0}", 4, [[0, 1], [2, 3]]),
        ("replica_groups=[2,4]<=[8], x", 8, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", 8, [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, x", 8, [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", 8, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("source_target_pairs={{0,1},{1,0}}", 2, [[0, 1], [1, 0]]),
        ("replica_groups={}", 3, [[0, 1, 2]]),
    ],
)
def test_groups_of_devices_are_read(attributes, devices, groups):
    assert collectives.groups_of(attributes, devices) == groups


def test_axes_are_those_along_which_a_group_differs():
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    assert collectives.axes_of([[0, 2], [1, 3]], mesh) == ("fsdp",)
    assert collectives.axes_of([[0, 4, 1, 5]], mesh) == ("data", "tensor")


def compiled(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return hlo.Program(jax.jit(function).lower(*arguments).compile().as_text()).work(ONE), arguments


def scanned(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def convolved(x, w):
    return jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def conditional(x, w):
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w.T, lambda x: x @ w @ w.T @ w @ w.T, x)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (scanned, [(8, 16), (5, 16, 16)]),
        (jax.grad(lambda x, w: jnp.sum(scanned(x, w)), argnums=(0, 1)), [(8, 16), (5, 16, 16)]),
        (lambda x, w: jnp.einsum("bkst,btka->bska", x, w), [(2, 3, 4, 5), (2, 5, 3, 7)]),
        (conditional, [(8, 16), (16, 8)]),
    ],
)
def test_executed_products_are_those_that_are_needed(function, shapes):
    """Without rematerialisation the compiler's program runs what the traced one asks for."""
    work, arguments = compiled(function, *shapes)
    assert work.flops == flops.useful(function, *arguments) > 0


def test_convolutions_count_what_meets_the_picture():
    """The needed count takes padding for input; the executed one does not: at most the border's share less."""
    work, arguments = compiled(convolved, (1, 16, 16, 4), (3, 3, 4, 8))
    assert 0.85 * flops.useful(convolved, *arguments) < work.flops <= flops.useful(convolved, *arguments)


def test_rematerialisation_shows():
    gradient = lambda f: jax.value_and_grad(lambda x, w: jnp.sum(f(x, w)), argnums=(0, 1))  # noqa: E731
    work, arguments = compiled(gradient(jax.checkpoint(scanned)), (8, 16), (5, 16, 16))
    needed = flops.useful(gradient(scanned), *arguments)
    assert 1.2 * needed < work.flops < 1.5 * needed


def test_what_no_result_needs_is_not_counted():
    assert flops.useful(lambda x: (x @ x, x + 1)[1], jax.ShapeDtypeStruct((8, 8), jnp.float32)) == 0


def test_putting_numbers_in_another_order_is_not_needed():
    """Neither forward nor backward, nor inside a loop."""
    x = jax.ShapeDtypeStruct((5, 8, 16), jnp.bfloat16)
    layer = lambda x: jnp.sin(positions.swap(x))  # noqa: E731
    looped = lambda x: jnp.sum(jax.lax.scan(lambda c, x: (c + layer(x), None), x[0], x)[0])  # noqa: E731
    assert flops.useful(jax.grad(looped), x) == 0
    np.testing.assert_array_equal(positions.swap(jnp.arange(6.0)), [1, 0, 3, 2, 5, 4])


def test_the_full_size_denoiser_needs_what_its_layers_add_up_to():
    """At 1024 x 1024 pixels, 64 x 64 patches and a caption of 512 tokens."""
    module, width, hidden = Denoiser(), 3840, 10240
    inputs = [(1, 128, 128, 16), (1,), (1, 512, 2560), (1, 512)]
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in inputs]
    found = flops.useful(
        lambda params, *x: module.apply({"params": params}, *x), networks.shapes("zimage", module), *shapes
    )
    layer = lambda n: 2 * n * (4 * width**2 + 3 * width * hidden) + 4 * n**2 * width  # noqa: E731
    around = 2 * 512 * 2560 * width + 2 * 2 * 64**2 * 64 * width
    modulation = 2 * 256 * (32 * 4 * width + width + 1024) + 2 * 256 * 1024
    assert found == 30 * layer(64**2 + 512) + 2 * layer(64**2) + 2 * layer(512) + around + modulation
