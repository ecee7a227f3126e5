"""Logical matrices on one device, against the oracle; `test_on_ranks.py` compares every layout with one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dion_dtensor import Dion, Dion2, Dion3, Muon
from dion_dtensor.matrices import Flatten
from dion_dtensor.split_text import parse_split
from dion_ref import ALGORITHMS
from dion_ref import matrices as oracle
from tests.dtensor.split_programs import SHAPES, split_steps, tensors

ORACLE_SPLITS: dict[str, Any] = {
    "rows(9, 5, 5)": oracle.Rows((9, 5, 5)),
    "columns(9, 5, 5)": oracle.Columns((9, 5, 5)),
    "heads(4)": oracle.Heads(4),
    "interleaved_rows((3, 1, 1), 3)": oracle.InterleavedRows((3, 1, 1), 3),
    "interleaved_rows((3, 2, 1), 2, True)": oracle.InterleavedRows((3, 2, 1), 2, stacked=True),
    "rows(13, 3, 4)": oracle.Rows((13, 3, 4)),
    "heads(2)": oracle.Heads(2),
    "rows(3, 2)": oracle.Rows((3, 2)),
    "columns(8, 3)": oracle.Columns((8, 3)),
    "experts": oracle.Experts(),
    "experts(rows(5, 3))": oracle.Experts(oracle.Rows((5, 3))),
    "experts(heads(2))": oracle.Experts(oracle.Heads(2)),
    "experts(columns(7))": oracle.Experts(oracle.Columns((7,))),
    "experts(interleaved_columns((1, 1), 4))": oracle.Experts(oracle.InterleavedColumns((1, 1), 4)),
    "flatten": oracle.Flatten(),
    "flatten(heads(4))": oracle.Flatten(oracle.Heads(4)),
    "flatten(rows(5, 3))": oracle.Flatten(oracle.Rows((5, 3))),
    "flatten(interleaved_rows((9, 2, 2), 2))": oracle.Flatten(oracle.InterleavedRows((9, 2, 2), 2)),
}
HYPERS: dict[str, dict[str, Any]] = {
    "muon": {},
    "normuon": {},
    "dion": {"rank_fraction": 0.5},
    "orth_dion": {"rank_fraction": 0.5},
    "dion2": {"fraction": 0.4},
    "dion3": {"fraction": 0.4},
}


@pytest.mark.parametrize("name", HYPERS)
@pytest.mark.parametrize("split", SHAPES)
def test_a_split_parameter_steps_as_the_oracle_says(split: str, name: str) -> None:
    ours = split_steps(name, split, None, {"compile": False})
    assert ours is not None
    rule, cut = ALGORITHMS[name], ORACLE_SPLITS[split]
    drawn = tensors(SHAPES[split], 6)
    for index, parameter in enumerate(("first", "second")):
        weight = drawn[index]
        hyper = rule.Hyper(lr=0.05, weight_decay=0.1, **HYPERS[name])
        state = rule.init(weight, hyper, name=parameter, seed=0, split=cut)
        for step in (1, 2):
            weight, state = rule.step(weight, drawn[2 * step + index], state, hyper, split=cut)
        error = (ours["weight"][index] - weight).norm() / weight.norm()
        assert error < 1e-12
        momenta = cut.merge([one.momentum for one in state], SHAPES[split])
        torch.testing.assert_close(ours["momentum"][index], momenta, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("split", SHAPES)
def test_a_split_is_read_back_from_its_text(split: str) -> None:
    assert str(parse_split(split)).replace(",)", ")") == str(split).replace(",)", ")")
    assert parse_split(str(parse_split(split))) == parse_split(split)


@pytest.mark.parametrize("split", SHAPES)
def test_merge_undoes_split(split: str) -> None:
    cut = parse_split(split)
    assert cut is not None
    stack = torch.randn(2, *SHAPES[split])
    pieces = cut.split(stack)
    assert torch.equal(cut.merge(pieces, SHAPES[split]), stack)
    expected = [(2 * p.count, p.m, p.n) for p in cut.pieces(SHAPES[split])]
    assert [tuple(piece.shape) for piece in pieces] == expected


@pytest.mark.parametrize(
    ("split", "shape", "message"),
    [
        ("rows(3, 4)", (8, 5), "needs a matrix of 7 rows, not the shape \\[8, 5\\]"),
        ("heads(3)", (8, 5), "rows divide by 3"),
        ("experts", (8, 5), "three dims"),
        ("experts(rows(3, 4))", (2, 8, 5), "needs a matrix of 7 rows, not the shape \\[8, 5\\]"),
        ("experts(flatten)", (2, 8, 5), "experts are cut into blocks"),
        ("experts(stripes(3))", (2, 8, 5), "experts are cut into blocks"),
        ("experts(4, 4)", (2, 8, 5), "as in experts\\(rows\\(gate, up\\)\\)"),
        ("rows(4, 4)", (2, 8, 5), "cut by 'experts\\(rows\\(4, 4\\)\\)'"),
        ("interleaved_columns(1, 4)", (8, 4), "needs positive integers for sizes, not 1"),
        ("interleaved_rows((1, 1), 0)", (8, 4), "needs positive integers for groups, not 0"),
        ("heads(0)", (8, 5), "needs positive integers for count"),
        ("flatten", (8, 5), "three to five dims"),
        ("heads(4)", (8, 5, 3, 3), "cut by 'flatten\\(heads\\(4\\)\\)'"),
        ("heads(4)", (8, 5, 3), "a stack are cut by 'experts.*; a convolution is cut by 'flatten"),
        ("columns(8)", (8, 5, 3, 3), "a matrix of 8 columns, not the shape \\[8, 5, 3, 3\\]$"),
        ("flatten(columns(8))", (8, 5, 3, 3), "a convolution is cut into blocks of rows"),
        ("flatten(experts)", (8, 5, 3, 3), "as in flatten\\(heads\\(groups\\)\\)"),
        ("columns(3, 4)", (5, 8), "needs a matrix of 7 columns, not the shape \\[5, 8\\]"),
        ("stripes(3)", (8, 5), "is unknown; write rows"),
        ("rows(a)", (8, 5), "cannot be read"),
        (None, (2, 8, 5), "split='experts' or 'flatten'"),
    ],
)
def test_a_split_that_does_not_fit_is_refused_by_name(
    split: str | None, shape: tuple[int, ...], message: str
) -> None:
    group = {"params": [("fused.weight", torch.nn.Parameter(torch.ones(shape)))], "split": split}
    with pytest.raises(ValueError, match=message):
        Muon([group])


def test_one_group_is_the_whole_convolution() -> None:
    assert str(parse_split("flatten(heads(1))")) == "flatten"
    with pytest.raises(TypeError, match="takes a split such as Heads"):  # a text, which types forbid
        Flatten("heads(4)")  # type: ignore[arg-type]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_groups_of_a_convolution_step_like_convolutions_of_their_own(
    memory_format: torch.memory_format,
) -> None:
    """Compiled, in both memory formats."""
    weight, grad = tensors((12, 2, 3, 3), 2, torch.float32)

    def stepped(group: dict[str, Any], grads: list[torch.Tensor]) -> list[torch.Tensor]:
        parameters = [p for _, p in group["params"]]
        for parameter, own in zip(parameters, grads, strict=True):
            parameter.grad = own.clone(memory_format=memory_format)
        Muon([group], lr=0.05, weight_decay=0.1).step()
        return [p.detach() for p in parameters]

    def named(values: list[torch.Tensor]) -> list[tuple[str, torch.nn.Parameter]]:
        return [
            (str(i), torch.nn.Parameter(v.clone(memory_format=memory_format))) for i, v in enumerate(values)
        ]

    (together,) = stepped({"params": named([weight]), "split": "flatten(heads(4))"}, [grad])
    apart = stepped({"params": named(list(weight.chunk(4))), "split": "flatten"}, list(grad.chunk(4)))
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["dion", "orth_dion"])
@pytest.mark.parametrize("split", ["rows(9, 5, 5)", "rows(13, 3, 4)", "columns(9, 5, 5)"])
def test_blocks_of_low_rank_are_those_of_the_oracle(split: str, name: str) -> None:
    """The first block's gradient has rank one, the second's is zero: most columns are dead."""
    rule, cut, shape = ALGORITHMS[name], ORACLE_SPLITS[split], SHAPES[split]
    hyper = rule.Hyper(lr=0.05, mu=0.5, rank_fraction=0.5, weight_decay=0.0)
    weight, *grads = tensors(shape, 4)
    parameter = torch.nn.Parameter(weight.clone())
    group = {"params": [("first", parameter)], "algorithm": "dion", "split": split}
    factor = "orthonormalize" if name == "orth_dion" else "normalize"
    optimizer = Dion(
        [group], lr=0.05, mu=0.5, rank_fraction=0.5, right_factor=factor, weight_decay=0.0, compile=False
    )
    expected, state = weight, rule.init(weight, hyper, name="first", seed=0, split=cut)
    for grad in grads:
        first, second, third = cut.split(grad)
        grad = cut.merge([first[:, :1] @ first[:1], torch.zeros_like(second), third], shape)
        parameter.grad = grad.clone()
        optimizer.step()
        expected, state = rule.step(expected, grad, state, hyper, split=cut)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-10, atol=1e-12)
    for index, of_piece in enumerate(state):
        torch.testing.assert_close(
            optimizer.state[parameter][f"Q.{index}"], of_piece.Q, rtol=1e-9, atol=1e-10
        )


@pytest.mark.parametrize(("name", "split"), [("dion3", "rows(9, 5, 5)"), ("dion2", "rows(13, 3, 4)")])
def test_a_block_far_smaller_than_the_others_chooses_as_if_it_were_alone(name: str, split: str) -> None:
    rule, cut, shape = ALGORITHMS[name], ORACLE_SPLITS[split], SHAPES[split]
    hyper = rule.Hyper(lr=0.05, **HYPERS[name])
    weight, grad = tensors(shape, 2)
    sizes = (1.0, 1e12, 1e36)
    grad = cut.merge([size * block for size, block in zip(sizes, cut.split(grad), strict=True)], shape)
    parameter = torch.nn.Parameter(weight.clone())
    parameter.grad = grad.clone()
    group = {"params": [("first", parameter)], "algorithm": name, "split": split, **HYPERS[name]}
    optimizer = {"dion2": Dion2, "dion3": Dion3}[name]([group], lr=0.05, compile=False)
    optimizer.step()
    expected, _ = rule.step(weight, grad, rule.init(weight, hyper, name="first", split=cut), hyper, split=cut)
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-9, atol=1e-12)
