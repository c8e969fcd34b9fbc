"""What is read off the text of a compiled program: loops, collectives, traffic through memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from zoo import dist
from zoo.commands.hlo import BETWEEN, Collective, Program, replica_groups

pytestmark = pytest.mark.devices8


def program(*lines: str, before: str = "", header: str = "HloModule m") -> Program:
    """A program whose entry holds these lines, with other computations before it."""
    body = "\n".join(f"  {line}" for line in lines)
    return Program(f"{header}\n\n{before}\n\nENTRY %main (x: f32[4]) -> f32[4] {{\n{body}\n}}\n")


def one(*lines: str, before: str = "") -> Collective:
    """The only collective of such a program."""
    (found,) = program(*lines, before=before).collectives()
    return found


# lines


def test_a_program_is_its_computations_and_their_instructions() -> None:
    text = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum.1 = f32[] add(%a, %b), metadata={op_name="x/y(z)" stack_frame_id=3}
}

ENTRY %main.4_spmd (x: f32[8]) -> (f32[8], s32[]) {
  %x.1 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %both = (f32[2,3]{1,0}, (s8[4]{0}, pred[]), /*index=2*/u4[16]) custom-call(%x.1), custom_call_target="f(x)"
  ROOT %all = (f32[8]{0}, s32[]) tuple(%x.1, /*index=1*/%both)
}
"""
    found = Program(text)
    assert list(found.computations) == ["add", "main.4_spmd"]
    assert found.entry == "main.4_spmd"
    assert found.computations["add"].root.name == "sum.1"
    assert [i.op for i in found.computations["add"].instructions] == ["parameter", "parameter", "add"]
    x, both, root = found.computations["main.4_spmd"].instructions
    assert (x.shapes[0].size, x.shapes[0].local) == (8 * 128 * 2, True)
    assert (both.op, both.operands) == ("custom-call", ("x.1",))
    assert [s.size for s in both.shapes] == [24, 4, 1, 8]  # a tuple in a tuple; a pred is a byte, a u4 half of one
    assert [s.local for s in both.shapes] == [False] * 4
    assert (root.operands, root.root) == (("x.1", "both"), True)


def test_a_line_of_closing_braces_does_not_end_a_computation() -> None:
    found = program(
        "%x = f32[4]{0} parameter(0)",
        '%k = f32[4]{0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"note": {"a": {',
        "}} %inside = f32[4]{0} negative(%x)",
    )
    text = "HloModule m\nENTRY %main (x: f32[4]) -> f32[4] {\n  %x = f32[4]{0} parameter(0)\n}}, more\n"
    text += "  ROOT %y = f32[4]{0} negative(%x)\n}\n\n%late = f32[] constant(0)\n"
    assert [i.name for i in Program(text).computations["main"].instructions] == ["x", "y"]
    assert [i.name for i in found.computations["main"].instructions] == ["x", "k"]


# loops


def test_nested_scans_multiply() -> None:
    """In a real program: as often as was written, whatever the compiler made of it."""

    def inner(c: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.sin(c) @ c, None

    def outer(c: jax.Array, _: None) -> tuple[jax.Array, None]:
        c, _ = jax.lax.scan(inner, c, None, length=5)
        return jnp.cos(jax.lax.fori_loop(2, 6, lambda i, c: jnp.tanh(c) * i, c)), None

    text = jax.jit(lambda x: jax.lax.scan(outer, x, None, length=3)[0]).lower(jnp.ones((8, 8))).compile().as_text()
    found = Program(text)
    times = {
        i.op: found.times[name]
        for name, c in found.computations.items()
        for i in c.instructions
        if i.op in ("sine", "dot", "tanh", "cosine")
    }
    assert times == {"sine": 15, "dot": 15, "tanh": 12, "cosine": 3}


LOOP = """%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %p = (s32[], f32[4]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4]{{0}} get-tuple-element(%p), index=1
  %step = s32[] constant({step})
  %next = s32[] add(%i, %step)
  %y = f32[4]{{0}} negative(%x)
  ROOT %both = (s32[], f32[4]{{0}}) tuple(%next, %y)
}}

%condition (q: (s32[], f32[4])) -> pred[] {{
  %q = (s32[], f32[4]{{0}}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %end = s32[] constant({end})
  ROOT %less = pred[] compare(%j, %end), direction={direction}
}}
"""


@pytest.mark.parametrize(
    ("begin", "end", "step", "direction", "told", "times"),
    [
        (0, 7, 1, "LT", None, 7),
        (2, 7, 1, "LT", None, 5),
        (1, 8, 3, "LT", None, 3),
        (9, 7, 1, "LT", None, 0),
        (0, 7, 1, "NE", None, 1),  # what is not understood counts once
        (0, 7, 1, "LT", 12, 12),  # what the compiler says is believed
    ],
)
def test_how_often_a_loop_runs_is_told_or_read_off_its_condition(
    begin: int, end: int, step: int, direction: str, told: int | None, times: float
) -> None:
    config = f', backend_config={{"known_trip_count":{{"n":"{told}"}}}}' if told else ""
    found = program(
        "%a = f32[4]{0} parameter(0)",
        f"%begin = s32[] constant({begin})",
        "%start = (s32[], f32[4]{0}) tuple(%begin, %a)",
        f"%loop = (s32[], f32[4]{{0}}) while(%start), condition=%condition, body=%body{config}",
        "ROOT %out = f32[4]{0} get-tuple-element(%loop), index=1",
        before=LOOP.format(step=step, end=end, direction=direction),
    )
    assert found.times == {"main": 1, "body": times, "condition": times}


def test_a_computation_that_is_called_twice_runs_twice() -> None:
    before = "%half (p: f32[4]) -> f32[4] {\n  %p = f32[4]{0} parameter(0)\n  ROOT %y = f32[4]{0} negative(%p)\n}\n\n"
    before += "%other (p: f32[4]) -> f32[4] {\n  %p = f32[4]{0} parameter(0)\n"
    before += "  ROOT %y = f32[4]{0} call(%p), to_apply=%half\n}"
    found = program(
        "%x = f32[4]{0} parameter(0)",
        "%k = s32[] constant(0)",
        "%a = f32[4]{0} call(%x), to_apply=%half",
        "%b = f32[4]{0} fusion(%a), kind=kLoop, calls=%half",
        "ROOT %c = f32[4]{0} conditional(%k, %b, %b), branch_computations={%half, %other}",
        before=before,
    )
    assert found.times == {"main": 1, "half": 4, "other": 1}  # every branch counts: which one runs is not known


# collectives


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}", ((0, 1, 2, 3),)),
        ("replica_groups=[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}, x=1", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", ((3, 1), (2, 0))),
        ("source_target_pairs={{0,1},{1,2},{2,0}}, metadata={op_name={}}", ((0, 1), (1, 2), (2, 0))),
        ("dimensions={0}, replica_groups={}", ()),
        ("to_apply=%add", ()),
    ],
)
def test_groups_are_read_in_every_notation(text: str, groups: tuple[tuple[int, ...], ...]) -> None:
    assert replica_groups(text) == groups


X = "%x = f32[8,4]{1,0} parameter(0)"  # 128 bytes
FOUR = "channel_id=1, replica_groups=[2,4]<=[8]"


@pytest.mark.parametrize(
    ("line", "kind", "sent"),
    [
        (f"%y = f32[32,4] all-gather(%x), {FOUR}, dimensions={{0}}", "all-gather", 3 * 128),
        (f"%y = (f32[8,4], f32[32,4]) all-gather-start(%x), {FOUR}, dimensions={{0}}", "all-gather", 3 * 128),
        (f"%y = f32[8,4] all-reduce(%x), {FOUR}, to_apply=%add", "all-reduce", 2 * 128 * 3 / 4),
        (f"%y = (f32[8,4], f32[8,4]) all-reduce(%x, %x), {FOUR}, to_apply=%add", "all-reduce", 2 * 256 * 3 / 4),
        (f"%y = f32[2,4] reduce-scatter(%x), {FOUR}, dimensions={{0}}", "reduce-scatter", 128 * 3 / 4),
        (f"%y = f32[8,4] all-to-all(%x), {FOUR}, dimensions={{0}}", "all-to-all", 128 * 3 / 4),
        (f"%y = f32[8,4] ragged-all-to-all(%x), {FOUR}", "ragged-all-to-all", 128 * 3 / 4),
        ("%y = f32[8,4] collective-permute(%x), source_target_pairs={{0,1},{1,0}}", "collective-permute", 128),
        ('%y = (f32[8,4], u32[], token[]) send(%x), channel_id=1, a={b="xla_megascale_runtime"}', BETWEEN, 128),
    ],
)
def test_what_a_collective_sends(line: str, kind: str, sent: float) -> None:
    found = one(X, line, "%z = f32[8,4] negative(%y)")
    assert (found.kind, found.sent, found.times, found.total) == (kind, sent, 1, sent)
    assert [len(g) for g in found.groups] == {"collective-permute": [2, 2], BETWEEN: []}.get(kind, [4, 4])


def test_a_send_to_another_program_is_no_collective() -> None:
    assert not program(X, "%y = (f32[8,4], u32[], token[]) send(%x), channel_id=1").collectives()


def shared(name: str, last: str = "") -> str:
    """A fusion's computation that holds a gather with channel 7."""
    lines = ["%p = f32[8,4]{1,0} parameter(0)", f"%g.{name} = f32[32,4] all-gather(%p), {FOUR.replace('1', '7', 1)}"]
    lines += [f'ROOT %r.{name} = f32[32,4] custom-call(%g.{name}), custom_call_target="{last}"'] if last else []
    return f"%{name} (p: f32[8,4]) -> f32[32,4] {{\n" + "".join(f"  {line}\n" for line in lines) + "}\n\n"


def fusion(name: str, of: str) -> str:
    return f"%{name} = f32[32,4] fusion(%x), kind=kCustom, calls=%{of}"


def test_a_collective_that_is_spread_over_fusions_counts_once() -> None:
    pieces = shared("first", "AsyncCollectiveStart") + shared("middle") + shared("last", "AsyncCollectiveDone")
    loop = (
        LOOP.format(step=1, end=5, direction="LT")
        .replace("negative(%x)", "fusion(%x), kind=kOutput, calls=%middle")
        .replace("f32[4]", "f32[8,4]")
    )
    lines = [
        X,
        "%begin = s32[] constant(0)",
        "%start = (s32[], f32[8,4]) tuple(%begin, %x)",
        fusion("a", "first"),
        "%loop = (s32[], f32[8,4]) while(%start), condition=%condition, body=%body",
        fusion("b", "last"),
    ]
    found = program(*lines, before=pieces + loop)
    assert found.times["middle"] == 5
    assert [(c.kind, c.total) for c in found.collectives()] == [("all-gather", 384)]
    untold = program(*lines, before=pieces.replace("AsyncCollective", "") + loop)  # the channel alone says it
    assert [(c.kind, c.total) for c in untold.collectives()] == [("all-gather", 384)]
    twice = program(*lines, fusion("c", "again"), before=pieces + shared("again", "AsyncCollectiveStart") + loop)
    assert [c.total for c in twice.collectives()] == [384, 384]


def test_copies_of_a_collective_count_each_although_they_share_a_channel() -> None:
    """An unrolled loop holds copies, and transfers between slices are numbered apart."""
    found = program(
        X,
        f"%a = f32[2,4] reduce-scatter(%x), {FOUR}, dimensions={{0}}",
        f"%b = f32[2,4] reduce-scatter(%x), {FOUR}, dimensions={{0}}",
        '%c = (f32[8,4], u32[], token[]) send(%x), channel_id=1, a={b="xla_megascale_runtime"}',
    ).collectives()
    assert sorted((c.kind, c.sent) for c in found) == [(BETWEEN, 128), ("reduce-scatter", 96), ("reduce-scatter", 96)]


def test_a_sum_of_which_a_slice_is_kept_is_a_reduce_scatter() -> None:
    def scatter(name: str) -> str:
        return (
            f"%{name} (p: f32[8,4]) -> f32[2,4] {{\n  %p = f32[8,4]{{1,0}} parameter(0)\n"
            f"  %s = f32[8,4] all-reduce(%p), {FOUR}, to_apply=%add\n  %zero = u32[] constant(0)\n"
            "  ROOT %k = f32[2,4] dynamic-slice(%s, %zero, %zero), dynamic_slice_sizes={2,4}\n}\n\n"
        )

    found = program(
        X,
        "%a = f32[2,4] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1",
        "%b = f32[2,4] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.2.clone.1",
        before=scatter("all-reduce-scatter.1") + scatter("all-reduce-scatter.2.clone.1"),
    ).collectives()
    assert [(c.kind, c.sent) for c in found] == [("reduce-scatter", 96)] * 2


MESH = dist.Mesh(data=2, fsdp=4)
ROWS, COLUMNS = ((0, 1, 2, 3), (4, 5, 6, 7)), ((0, 4), (1, 5), (2, 6), (3, 7))


@pytest.mark.parametrize(
    ("what", "before", "after", "expected"),
    [
        (lambda x: jax.lax.all_gather(x, "fsdp", tiled=True), P("fsdp"), P(), ("all-gather", 3 * 128, ROWS)),
        (lambda x: jax.lax.psum(x, "data"), P("data"), P(), ("all-reduce", 256, COLUMNS)),
        (lambda x: jax.lax.psum(x, ("data", "fsdp")), P(), P(), ("all-reduce", 512 * 7 / 4, (tuple(range(8)),))),
        (
            lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True),
            P(),
            P("fsdp"),
            ("reduce-scatter", 512 * 3 / 4, ROWS),
        ),
        (
            lambda x: jax.lax.all_to_all(x, "fsdp", 1, 0, tiled=True),
            P("fsdp"),
            P(None, "fsdp"),
            ("all-to-all", 96, ROWS),
        ),
        (
            lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]),
            P("data"),
            P("data"),
            ("collective-permute", 256, {(0, 4), (1, 5), (2, 6), (3, 7), (4, 0), (5, 1), (6, 2), (7, 3)}),
        ),
    ],
)
def test_collectives_of_a_real_program(what: Callable[..., Any], before: P, after: P, expected: Any) -> None:
    mesh = MESH.build()
    wrapped = jax.jit(jax.shard_map(what, mesh=mesh, in_specs=before, out_specs=after, check_vma=False))
    (found,) = Program(wrapped.lower(jnp.ones((8, 16))).compile().as_text()).collectives()
    groups = set(found.groups) if isinstance(expected[2], set) else found.groups
    assert (found.kind, found.sent, groups) == expected


def test_layers_that_are_gathered_in_a_scan_are_sent_once_each() -> None:
    mesh = MESH.build()
    kernels = jax.ShapeDtypeStruct((6, 64, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=NamedSharding(mesh, P("data")))

    def layers(kernels: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        def layer(h: jax.Array, kernel: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(h @ jax.lax.with_sharding_constraint(kernel, P())), None

        return kernels * 2, jax.lax.scan(layer, x, kernels)[0]

    with jax.set_mesh(mesh):
        found = Program(jax.jit(layers, donate_argnums=0).lower(kernels, x).compile().as_text())
    (gather,) = [c for c in found.collectives() if c.kind == "all-gather"]
    assert (gather.times, gather.sent, gather.groups) == (6, 64 * 64 * 4 * 3 / 4, ROWS)
    assert found.aliased == 1
    once, all_of_it = found.moved(loops=False), found.moved()
    assert 64 * 64 * 4 * 6 / 4 < once < all_of_it  # the kernels of this device are read at least once


# outputs where arguments lay


def test_outputs_written_where_an_argument_lay_are_counted() -> None:
    header = (
        "HloModule jit_step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias), {1}: (3, {}, must-alias), "
        "{2, 1}: (4, {}, may-alias) }, entry_computation_layout={(f32[4]{0}, f32[])->f32[4]{0}}"
    )
    assert program("ROOT %x = f32[4]{0} parameter(0)", header=header).aliased == 3
    assert program("ROOT %x = f32[4]{0} parameter(0)").aliased == 0


# traffic through memory

BIG = "%x = f32[1024,4]{1,0} parameter(0)"  # 16384 bytes
AT = "%at = s32[] parameter(1)"
SMALL = "%u = f32[2,4]{1,0} parameter(2)"  # 32 bytes


@pytest.mark.parametrize(
    ("lines", "moved"),
    [
        ([BIG], 0),
        ([BIG, "%y = f32[1024,4] negative(%x)"], 2 * 16384),
        ([BIG, "%y = f32[1024,4] add(%x, %x)"], 3 * 16384),
        ([BIG, "%y = f32[1024,4]{1,0:S(1)} negative(%x)"], 16384),  # written to the chip
        ([BIG.replace("}", ":T(8,128)S(1)}"), "%y = f32[1024,4] negative(%x)"], 16384),  # read from the chip
        ([BIG, AT, "%y = f32[2,4] dynamic-slice(%x, %at, %at), dynamic_slice_sizes={2,4}"], 32 + 2 * 4 + 32),
        ([BIG, AT, SMALL, "%y = f32[1024,4] dynamic-update-slice(%x, %u, %at, %at)"], 32 + 2 * 4 + 32),
        ([BIG, "%y = (f32[1024,4], f32[2,4]) custom-call(%x)"], 16384 + 16384 + 32),
        ([BIG, "%y = f32[4096] bitcast(%x)", "%z = (f32[4096]) tuple(%y)"], 0),
        ([BIG, "%y = (f32[1024,4], f32[1024,4]) copy-start(%x)", "%z = f32[1024,4] copy-done(%y)"], 2 * 16384),
    ],
)
def test_what_an_instruction_moves(lines: list[str], moved: float) -> None:
    assert program(*lines).moved() == moved


def test_of_what_a_fusion_only_slices_the_slices_count() -> None:
    before = """%slices (p: f32[1024,4], i: s32[], u: f32[2,4]) -> (f32[2,4], f32[1024,4]) {
  %p = f32[1024,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %u = f32[2,4]{1,0} parameter(2)
  %s = f32[2,4]{1,0} dynamic-slice(%p, %i, %i), dynamic_slice_sizes={2,4}
  %d = f32[1024,4]{1,0} dynamic-update-slice(%p, %u, %i, %i)
  ROOT %t = (f32[2,4]{1,0}, f32[1024,4]{1,0}) tuple(%s, %d)
}"""
    found = program(
        BIG, AT, SMALL, "%y = (f32[2,4], f32[1024,4]) fusion(%x, %at, %u), kind=kLoop, calls=%slices", before=before
    )
    # read: 32 of the slice, the index (no more than it is), the update; written: the slice and the update
    assert found.moved() == 32 + 4 + 32 + 32 + 32
    assert found.times["slices"] == 1  # what happens inside a fusion moves nothing more


def test_a_slice_may_be_taken_in_a_fusion_within_a_fusion() -> None:
    before = """%inner (p: f32[1024,4], i: s32[]) -> f32[2,4] {
  %p = f32[1024,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %s = f32[2,4]{1,0} dynamic-slice(%p, %i, %i), dynamic_slice_sizes={2,4}
}

%outer (q: f32[1024,4], j: s32[]) -> f32[2,4] {
  %q = f32[1024,4]{1,0} parameter(0)
  %j = s32[] parameter(1)
  %f = f32[2,4]{1,0} fusion(%q, %j), kind=kLoop, calls=%inner
  ROOT %n = f32[2,4]{1,0} negate(%f)
}"""
    found = program(BIG, AT, "%y = f32[2,4] fusion(%x, %at), kind=kOutput, calls=%outer", before=before)
    assert found.moved() == 32 + 4 + 32


@pytest.mark.parametrize("loops", [True, False])
def test_a_loop_moves_as_much_as_it_runs_or_once(loops: bool) -> None:
    found = program(
        "%a = f32[4]{0} parameter(0)",
        "%begin = s32[] constant(0)",
        "%start = (s32[], f32[4]{0}) tuple(%begin, %a)",
        "%loop = (s32[], f32[4]{0}) while(%start), condition=%condition, body=%body",
        before=LOOP.format(step=1, end=10, direction="LT"),
    )
    body = (4 + 4 + 4) + (16 + 16)  # add and negative
    condition = 4 + 4 + 1
    assert found.moved(loops=loops) == (10 if loops else 1) * (body + condition)
