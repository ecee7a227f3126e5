"""The mistakes of the mutants: functions that turn a function of the oracle into a wrong one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dion_ref import linalg, philox, update


def changed_digit(table: str, step: int, position: int, change: float) -> Callable[[Any], Any]:
    """The tables with one coefficient changed."""

    def wrong(tables: Mapping[str, Any]) -> Mapping[str, Any]:
        known = tables[table]
        rows = [list(row) for row in known.coefficients]
        rows[step][position] += change
        return {**tables, table: replace(known, coefficients=tuple((a, b, c) for a, b, c in rows))}

    return wrong


def with_hyper(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function of (M, G, hyper, t) that sees changed hyperparameters."""

    def wrong(original: Any) -> Any:
        return lambda M, G, hyper, t: original(M, G, change(hyper), t)

    return wrong


def step_of(name: str, change: Callable[..., tuple[Tensor, Any]]) -> Callable[[Any], Any]:
    """The registry with another step for one algorithm; ``change(step, param, grad, state, hyper)``."""

    def wrong(algorithms: Mapping[str, Any]) -> Mapping[str, Any]:
        known = algorithms[name]

        def step(param: Tensor, grad: Tensor, state: Any, hyper: Any) -> tuple[Tensor, Any]:
            return change(known.step, param, grad, state, hyper)

        return {**algorithms, name: replace(known, step=step)}

    return wrong


def adamw_weight(divisor: Callable[[Tensor, float, float], Tensor], first: bool) -> Callable[..., Any]:
    """AdamW with the right moments and another formula for the step, or no correction of the first moment."""

    def change(step: Any, param: Tensor, grad: Tensor, state: Any, hyper: Any) -> tuple[Tensor, Any]:
        _, new = step(param, grad, state, hyper)
        correction = 1 - hyper.betas[0] ** new.step if first else 1.0
        U = new.exp_avg / divisor(new.exp_avg_sq, 1 - hyper.betas[1] ** new.step, hyper.epsilon)
        return update.decay(param, U, hyper) - hyper.lr / correction * U, new

    return change


def swapped_feedback(step: Any, param: Tensor, grad: Tensor, state: Any, hyper: Any) -> tuple[Tensor, Any]:
    """Dion with 1 - mu for mu."""
    return step(param, grad, state, replace(hyper, mu=1 - hyper.mu))  # type: ignore[no-any-return]


def averaged_gradient(step: Any, param: Tensor, grad: Tensor, state: Any, hyper: Any) -> tuple[Tensor, Any]:
    """Dion with (1 - mu) G for G."""
    return step(param, (1 - hyper.mu) * grad, state, hyper)  # type: ignore[no-any-return]


def damped_everywhere(step: Any, param: Tensor, grad: Tensor, state: Any, hyper: Any) -> tuple[Tensor, Any]:
    """Dion2 with mu on all of the momentum."""
    param, new = step(param, grad, state, hyper)
    return param, replace(new, momentum=hyper.mu * (state.momentum + grad))


def swapped_betas(step: Any, param: Tensor, grad: Tensor, state: Any, hyper: Any) -> tuple[Tensor, Any]:
    """Lion with the two betas exchanged."""
    return step(param, grad, state, replace(hyper, betas=hyper.betas[::-1]))  # type: ignore[no-any-return]


def selection(
    length: Callable[[Tensor], Tensor], *, ties_to_last: bool = False, smallest: bool = False
) -> Any:
    """Another choice of slices."""

    def top_slices(M: Tensor, count: int, dim: int) -> Tensor:
        lengths = length(M if dim == 0 else M.mT)
        if ties_to_last:
            order = len(lengths) - 1 - torch.sort(lengths.flip(0), descending=True, stable=True).indices
        else:
            order = torch.sort(lengths, descending=not smallest, stable=True).indices
        return order[:count].sort().values

    return lambda _: top_slices


def column_divisor(divisor: Callable[[Tensor, float], Tensor]) -> Any:
    """Columns divided by something else."""
    return lambda _: lambda R, epsilon: R / divisor(R, epsilon)


def row_normalization(*, mean: bool = True, inside: bool = False, rescale: bool = True) -> Any:
    """NorMuon's rows with one line changed."""

    def normalize_rows(U: Tensor, v: Tensor, beta2: float, epsilon: float) -> tuple[Tensor, Tensor]:
        squares = U.square()
        v = beta2 * v + (1 - beta2) * (
            squares.mean(1, keepdim=True) if mean else squares.sum(1, keepdim=True)
        )
        rows = U / ((v + epsilon).sqrt() if inside else v.sqrt() + epsilon)
        return (rows * (linalg.norm(U) / linalg.norm(rows).clamp(min=epsilon)) if rescale else rows), v

    return lambda _: normalize_rows


def decay_last(_: Any) -> Any:
    """The update first, then the decay."""

    def apply_update(W: Tensor, U: Tensor, hyper: Any) -> Tensor:
        rows, columns = W.shape
        step = hyper.lr * update.scale_factor(hyper.scale, rows, columns, hyper.weight_storage)
        moved: Tensor = (W - step * U) * (1 - hyper.lr * hyper.weight_decay)
        return moved

    return apply_update


def decay_factor(factor: Callable[[Any], float], strict: bool = False) -> Any:
    """Another decay."""

    def decay(W: Tensor, U: Tensor, hyper: Any) -> Tensor:
        agree = U * W > 0 if strict else U * W >= 0
        return torch.where(agree, W * factor(hyper), W) if hyper.cautious else W * factor(hyper)

    return lambda _: decay


def input_divisor(divisor: Callable[[Tensor, float, str, float], Tensor]) -> Any:
    """The input of Newton-Schulz divided by something else."""

    def normalize_input(M: Tensor, *, epsilon: float, epsilon_rule: str, norm_factor: float) -> Tensor:
        return M / divisor(M, epsilon, epsilon_rule, norm_factor)

    return lambda _: normalize_input


def polar_without_threshold(_: Any) -> Any:
    """The polar factor with no singular value dropped."""

    def polar_factor(M: Tensor) -> Tensor:
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        factor: Tensor = (U * (S > 0)) @ Vh
        return factor

    return polar_factor


def polar_for_basis(original: Any) -> Any:
    """A polar factor where an ordered basis is due."""

    def ordered_basis(A: Tensor, negligible: Tensor) -> tuple[Tensor, Tensor]:
        _, kept = original(A, negligible)
        return linalg.polar_factor(A * kept), kept

    return ordered_basis


def in_float32(original: Any) -> Any:
    """Newton-Schulz in single precision."""

    def newton_schulz(X: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
        result: Tensor = original(X.float(), coefficients)
        return result.to(X.dtype)

    return newton_schulz


def column_normalized(_: Any) -> Any:
    """Orth-Dion with Dion's right factor."""

    def right_factor(R: Tensor, Q: Tensor, kept: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        return linalg.normalize_columns(torch.where(kept, R, Q), epsilon), kept

    return right_factor


def swapped_sides(original: Any) -> Any:
    """The scale of the transposed matrix."""

    def scale_factor(scale: str | None, rows: int, columns: int, weight_storage: str = "out_in") -> float:
        factor: float = original(scale, columns, rows, weight_storage)
        return factor

    return scale_factor


def words_without_half(original: Any) -> Any:
    """u = v / 2^32 in place of (v + 1/2) / 2^32, by shifting the words that the oracle adds one half to."""
    return lambda counter, key: tuple(word.double() - 0.5 for word in original(counter, key))


def sine_first(original: Any) -> Any:
    """Normal values with the pairs of Box and Muller exchanged."""

    def normal(rows: int, columns: int, **key: Any) -> Tensor:
        pairs = original(rows, columns + columns % 2, **key).reshape(rows, -1, 2)
        exchanged: Tensor = pairs.flip(2).reshape(rows, -1)[:, :columns]
        return exchanged

    return normal


def first_matrix_only(original: Any) -> Any:
    """Normal values that forget which matrix they are for."""
    return lambda rows, columns, **key: original(rows, columns, **{**key, "matrix": 0})


def nine_rounds(original: Any) -> Any:
    """Philox with one round less."""

    def philox4x32(counter: Any, key: tuple[int, int]) -> Any:
        rounds = philox._ROUNDS
        philox._ROUNDS = rounds - 1
        try:
            return original(counter, key)
        finally:
            philox._ROUNDS = rounds

    return philox4x32
