"""A row that attends to a root of an earlier row equals the same row with the root in it.

What these tests do not cover: CUDA kernels, and the Megatron modules around the function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_prefix.attention.function import prefix_attention
from megatron_prefix.attention.kernels import Kernel, select_kernel
from megatron_prefix.attention.root_keys import RootKeys
from megatron_prefix.layout import RowStages
from megatron_prefix.layout.packing import PackedLayout, pack
from megatron_prefix.layout.tree import PrefixTree
from tests.attention.oracle import (
    assert_close,
    dense_attention,
    gradients,
    group,
    in_window,
    random_qkv,
    random_tree,
    stages_of,
    visible_keys,
)
from tests.attention.test_prefix_attention import (
    KERNELS,
    TOLERANCES,
    SharesThatBfloat16WouldLose,
)

SCALE = 0.2
LAYER = 3


@dataclass(kw_only=True, eq=False)
class Row:
    """A row of a series, and which of its tokens are which of the row with everything in it."""

    stages: RowStages[Tensor]
    own: Tensor
    """[n] rows of its tokens, without padding."""
    whole: Tensor
    """[n] where they are in the row with everything in it."""

    @property
    def queries(self) -> Tensor:
        """[N] its tokens that attend."""
        return (
            torch.arange(self.stages.num_tokens)
            if self.stages.queries is None
            else (self.stages.queries)
        )


def tree_below_a_root(rng: np.random.Generator) -> PrefixTree:
    """A root of some tokens, below which random trees go on, three levels deep."""
    below = PrefixTree.concat([random_tree(rng, num_nodes=5, max_depth=3) for _ in range(4)])
    return PrefixTree(
        parents=(-1, *(parent + 1 for parent in below.parents)),
        tokens=(rng.integers(0, 1000, 45), *below.tokens),
        sequences=tuple((0, *(node + 1 for node in path)) for path in below.sequences),
    )


def parts_of(tree: PrefixTree, count: int) -> list[list[int]]:
    """The sequences in so many parts, none of which runs a node of another but the root."""
    second = sorted({path[1] for path in tree.sequences})
    part_of = {node: place * count // len(second) for place, node in enumerate(second)}
    parts: list[list[int]] = [[] for _ in range(count)]
    for i, path in enumerate(tree.sequences):
        parts[part_of[path[1]]].append(i)
    return [part for part in parts if part]


def series_of(
    tree: PrefixTree,
    whole: PackedLayout,
    *,
    parts: int,
    multiple: int = 1,
    trim: float | None,
    window: int | None = None,
) -> list[Row]:
    """The root's row, then those of the parts; with `trim`, that much of them is needed."""

    def stages(layout: PackedLayout, density: float | None) -> RowStages[Tensor]:
        if density is None:
            return stages_of(layout, window=window)
        needed = np.flatnonzero(np.random.default_rng(0).random(layout.num_tokens) < density)
        return stages_of(layout, needed=needed, multiple=multiple, window=window)

    num_root = int(tree.packed_lengths[0])
    root = pack(PrefixTree.from_sequences([tree.tokens[0]]), pad_to_multiple=multiple)
    rows = [
        Row(
            stages=stages(root, None if trim is None else 0.0),
            own=torch.arange(num_root),
            whole=torch.arange(num_root),
        )
    ]
    for part in parts_of(tree, parts):
        layout = pack(tree.subset(part), root_elsewhere=True, pad_to_multiple=multiple)
        places = {
            own: in_whole
            for j, i in enumerate(part)
            for own, in_whole in zip(
                layout.sequence_positions(j), whole.sequence_positions(i)[num_root:], strict=True
            )
        }
        rows.append(
            Row(
                stages=stages(layout, trim),
                own=torch.tensor(list(places)),
                whole=torch.tensor(list(places.values())),
            )
        )
    return rows


def run_series(
    rows: Sequence[Row],
    inputs: Sequence[tuple[Tensor, Tensor, Tensor]],
    douts: Sequence[Tensor],
    kernel: Kernel,
    *,
    deterministic: bool = False,
    windowed: bool = False,
) -> tuple[list[Tensor], list[tuple[Tensor, ...]]]:
    """out of each row, and its dq, dk, dv; backward of the root last."""
    root = RootKeys(len(rows[0].own))
    leaves = [tuple(x.detach().clone().requires_grad_() for x in of_row) for of_row in inputs]
    outs, grads = [], []
    with root.held():
        for index, (row, (q, k, v)) in enumerate(zip(rows, leaves, strict=True)):
            if index == 0:
                k, v = root.keep(LAYER, k, v)
            out = prefix_attention(
                q,
                k,
                v,
                row.stages,
                scale=SCALE,
                kernel=kernel,
                deterministic=deterministic,
                root=root.of_layer(LAYER) if index else None,
                windowed=windowed,
            )
            outs.append(out)
            if index:
                grads.append(gradients(out, douts[index], leaves[index]))
        grads.insert(0, gradients(outs[0], douts[0], leaves[0]))
    return outs, grads


def inputs_of(
    rows: Sequence[Row], qkv: tuple[Tensor, Tensor, Tensor]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q [N, ...], k and v [T, ...] of each row; padding has numbers of its own."""
    found = []
    for row in rows:
        of_row = []
        for x in qkv:
            own = torch.randn(row.stages.num_tokens, *x.shape[1:], dtype=x.dtype)
            own[row.own] = x[row.whole]
            of_row.append(own)
        found.append((of_row[0][row.queries], *of_row[1:]))
    return found


def check_against_oracle(
    tree: PrefixTree,
    *,
    kernel: str,
    dtype: torch.dtype = torch.float64,
    heads: tuple[int, int] = (4, 2),
    parts: int = 3,
    multiple: int = 1,
    trim: float | None = None,
    deterministic: bool = False,
    window: int | None = None,
) -> None:
    """All rows of a series in o, dq, dk and dv, against the dense row with the root in it."""
    whole = pack(tree)
    rows = series_of(tree, whole, parts=parts, multiple=multiple, trim=trim, window=window)
    assert len(rows) == parts + 1
    qkv = random_qkv(whole.num_tokens, *heads, 32, dtype)
    inputs = inputs_of(rows, qkv)
    douts = [torch.randn(len(row.queries), heads[0], 32).to(dtype) for row in rows]

    # What each row's tokens that attend are in the whole one; -1 on padding.
    places = []
    dout = torch.zeros(whole.num_tokens, heads[0], 32, dtype=torch.float64)
    for row, of_row in zip(rows, douts, strict=True):
        place = torch.full((row.stages.num_tokens,), -1)
        place[row.own] = row.whole
        place = place[row.queries]
        dout[place[place >= 0]] = of_row[place >= 0].double()
        places.append(place)
    exact = tuple(x.double().requires_grad_() for x in qkv)
    visible = visible_keys(whole) if window is None else in_window(whole, window)
    expected = dense_attention(*exact, visible, SCALE)
    dq, dk, dv = gradients(expected, dout, exact)

    windowed = window is not None
    chosen = select_kernel(
        kernel,
        device="cpu",
        dtype=dtype,
        head_dim=32,
        deterministic=deterministic,
        windows=windowed,
    )
    outs, grads = run_series(
        rows, inputs, douts, chosen, deterministic=deterministic, windowed=windowed
    )
    tolerance = TOLERANCES[dtype]
    found = [torch.zeros_like(x) for x in (dq, dk, dv)]
    out = torch.zeros_like(expected)
    for row, place, of_row, (row_dq, *row_dk) in zip(rows, places, outs, grads, strict=True):
        real = place >= 0
        assert of_row.dtype == dtype
        out[place[real]] = of_row[real].double()
        found[0][place[real]] = row_dq[real].double()
        for sums, of_keys in zip(found[1:], row_dk, strict=True):
            assert of_keys.dtype == dtype
            sums[row.whole] = of_keys[row.own].double()
    attended = torch.cat([place[place >= 0] for place in places])
    assert_close(out[attended], expected[attended], tolerance, "out")
    for name, actual, wanted in zip(("dq", "dk", "dv"), found, (dq, dk, dv), strict=True):
        assert_close(actual, wanted, tolerance, name)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("multiple", [1, 8])
def test_rows_after_their_root(rng, kernel, heads, multiple):
    tree = tree_below_a_root(rng)
    check_against_oracle(tree, kernel=kernel, heads=heads, multiple=multiple)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("density", [0.02, 0.5])
def test_trimmed_rows_and_a_trimmed_root(rng, kernel, density):
    check_against_oracle(tree_below_a_root(rng), kernel=kernel, multiple=4, trim=density)


@pytest.mark.parametrize("trim", [None, 0.2])
@pytest.mark.parametrize("window", [1, 7, 50])
def test_a_window_reaches_into_the_root(rng, window, trim):
    tree = tree_below_a_root(rng)
    check_against_oracle(tree, kernel="torch_cpu", multiple=4, trim=trim, window=window)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_group_with_a_response_per_row(rng, kernel):
    tree = PrefixTree.from_groups([group(300, [1, 90, 3, 200])])
    check_against_oracle(tree, kernel=kernel, parts=4)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(rng, kernel, dtype):
    check_against_oracle(tree_below_a_root(rng), kernel=kernel, dtype=dtype)


@pytest.mark.parametrize("kernel", KERNELS)
def test_uninitialised_memory_is_never_read(rng, kernel):
    torch.use_deterministic_algorithms(True)  # every torch.empty is now full of NaN
    try:
        assert torch.empty(4).isnan().all()
        for trim in (None, 0.1):
            check_against_oracle(tree_below_a_root(rng), kernel=kernel, multiple=8, trim=trim)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bits(rng, set_threads, dtype):
    set_threads(2)
    tree = tree_below_a_root(rng)
    whole = pack(tree)
    rows = series_of(tree, whole, parts=3, trim=None)
    inputs = inputs_of(rows, random_qkv(whole.num_tokens, 4, 2, 32, dtype))
    douts = [torch.randn(len(row.queries), 4, 32).to(dtype) for row in rows]
    kernel = select_kernel(None, device="cpu", dtype=dtype, head_dim=32, deterministic=True)
    runs = [run_series(rows, inputs, douts, kernel, deterministic=True) for _ in range(2)]
    (outs, grads), (outs_again, grads_again) = runs
    assert all(torch.equal(a, b) for a, b in zip(outs, outs_again, strict=True))
    for of_row, again in zip(grads, grads_again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(of_row, again, strict=True))


def test_half_precision_shares_of_later_rows_add_up_in_float32(rng):
    tree = PrefixTree.from_groups([group(9, [8, 12, 5, 20])])
    whole = pack(tree)
    rows = series_of(tree, whole, parts=4, trim=None)
    inputs = inputs_of(rows, random_qkv(whole.num_tokens, 1, 1, 8, torch.bfloat16))
    douts = [torch.ones(len(row.queries), 1, 8, dtype=torch.bfloat16) for row in rows]
    _, grads = run_series(rows, inputs, douts, SharesThatBfloat16WouldLose())
    # 1 of its own and 2^-9 of each of four rows, of which bfloat16 would have kept none.
    assert all((dx == 1 + 2**-7).all() for dx in grads[0][1:])


def test_a_root_that_nobody_attends_to_has_its_own_gradient():
    root = RootKeys(4)
    k, v = (torch.randn(6, 1, 8, requires_grad=True) for _ in range(2))
    with root.held():
        kept_k, kept_v = root.keep(LAYER, k, v)
        dk, dv = torch.autograd.grad((kept_k * 2 + kept_v * 3).sum(), (k, v))
    assert (dk == 2).all() and (dv == 3).all()


def test_forward_that_runs_again_keeps_the_gradients_that_are_there():
    """As activation recompute does before backward of the root."""
    root = RootKeys(4)
    k, v = (torch.randn(6, 1, 8, requires_grad=True) for _ in range(2))
    with root.held():
        with torch.no_grad():
            root.keep(LAYER, k, v)
        sums = root.of_layer(LAYER).gradients(torch.float32)
        for given in sums:
            given += 5
        dk, dv = torch.autograd.grad(sum(root.keep(LAYER, k, v)).sum(), (k, v))
    for dx in (dk, dv):
        assert (dx[:4] == 6).all() and (dx[4:] == 1).all()


def test_a_copy_is_kept_of_the_root_alone():
    """A view would keep a layer's whole projection, and the padding."""
    root = RootKeys(4)
    mixed = torch.randn(6, 3, 8)
    with root.held():
        root.keep(LAYER, mixed[:, 1:2], mixed[:, 2:])
        layer = root.of_layer(LAYER)
        for kept in (layer.keys, layer.values):
            assert kept.untyped_storage().nbytes() == 4 * 8 * 4
        assert root.layers == (LAYER,)
    assert root.layers == ()


def test_nothing_is_kept_after_an_error():
    root = RootKeys(4)
    k, v = (torch.randn(4, 1, 8) for _ in range(2))
    with pytest.raises(RuntimeError, match="in the middle"), root.held():
        root.keep(LAYER, k, v)
        raise RuntimeError("in the middle")
    assert root.layers == ()
    with root.held():
        root.keep(LAYER, k, v)
        assert root.layers == (LAYER,)


def test_stages_of_a_trimmed_row_without_queries_below_the_root_have_no_stage_of_it():
    """What is kept to fill a row up is padding here, which sees no root."""
    tree = PrefixTree.from_groups([group(9, [5])])
    layout = pack(tree, root_elsewhere=True, pad_to_multiple=8)
    stages = stages_of(layout, needed=np.zeros(0, dtype=np.int64), multiple=2)
    assert stages.num_queries == 2 and stages.root is None
