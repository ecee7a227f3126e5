"""AdamW and Lion from the whole history of gradients at once: sums with powers of beta instead of recursions.

Entries don't mix, so every bound is by entry.
"""

from __future__ import annotations

from collections.abc import Sequence

from mpmath import mp

from conformance.certify.matrix_steps import Settings
from conformance.certify.output import Output
from conformance.certify.precise import Matrix, Real, real, underflow
from conformance.certify.primitives import UncleanCaseError

SIGN_GAP = 1e-9
"""A sign that a rule decides by must not come from a sum nearer to zero than this, relative to its terms."""


def _decay_sum(start: Real, terms: Sequence[Real], beta: Real) -> tuple[Real, Real]:
    """``beta^t start + (1 - beta) sum beta^(t-i) x_i``, and the sum of the absolute terms."""
    t = len(terms)
    parts = [beta**t * start, *((1 - beta) * beta ** (t - i) * x for i, x in enumerate(terms, 1))]
    return mp.fsum(parts), mp.fsum(parts, absolute=True)


def _decided(value: Real, size: Real) -> Real:
    """The value, if its sign is exact or beyond doubt.

    Raises:
        UncleanCaseError: it is neither.
    """
    if 0 < abs(value) < SIGN_GAP * size:
        raise UncleanCaseError("a sign hangs on rounding")
    return value


class _Weight:
    """One entry of the parameter along the steps, with the error it may carry."""

    def __init__(self, start: Real, settings: Settings) -> None:
        self.value, self.bound = start, abs(start)
        self.kept = 1 - real(settings["lr"]) * real(settings["weight_decay"])
        self.cautious = bool(settings["cautious"])

    def move(self, direction: Real, step: Real, error: Real) -> None:
        """Decay by the sign of direction and weight, then subtract the step (of that sign)."""
        if self.cautious:
            _decided(self.value, self.bound)
        factor = real(1) if self.cautious and mp.sign(direction) * mp.sign(self.value) < 0 else self.kept
        self.value = factor * self.value - step
        self.bound += abs(self.value) + abs(step) + error


def adamw(
    W: Matrix, gradients: Sequence[Matrix], first: Matrix, second: Matrix, taken: int, settings: Settings
) -> list[Output]:
    """AdamW after all the gradients, from the moments that stood after ``taken`` steps.

    The step's relative error: that of m over m, half that of v, and of the bias corrections ``1 - beta^t``, which
    cancel: ``beta^t / (1 - beta^t)``.

    Args:
        W: the parameter before the first gradient.
        gradients: one a step.
        first, second: exp_avg and exp_avg_sq before the first.
        taken: steps before the first.
        settings: lr, weight_decay, cautious, betas, epsilon.
    """
    beta1, beta2 = (real(beta) for beta in settings["betas"])
    lr, epsilon = real(settings["lr"]), real(settings["epsilon"])
    names = ("param", "exp_avg", "exp_avg_sq")
    values: dict[str, Matrix] = {name: [] for name in names}
    bounds: dict[str, Matrix] = {name: [] for name in names}
    for i, row in enumerate(W):
        columns: dict[str, list[tuple[Real, Real]]] = {name: [] for name in names}
        for j, start in enumerate(row):
            history = [G[i][j] for G in gradients]
            weight = _Weight(start, settings)
            m, m_size, v = first[i][j], mp.zero, second[i][j]
            for t in range(1, len(history) + 1):
                m, m_size = _decay_sum(first[i][j], history[:t], beta1)
                v, _ = _decay_sum(second[i][j], [g * g for g in history[:t]], beta2)
                power1, power2 = beta1 ** (taken + t), beta2 ** (taken + t)
                divisor = mp.sqrt(v / (1 - power2)) + epsilon
                step = lr * m / ((1 - power1) * divisor)
                if weight.cautious:
                    _decided(m, m_size)
                relative = 3 + power1 / (1 - power1) + power2 / (1 - power2)
                weight.move(
                    m, step, lr * (m_size + underflow(1)) / ((1 - power1) * divisor) + abs(step) * relative
                )
            columns["param"].append((weight.value, weight.bound))
            columns["exp_avg"].append((m, m_size))
            columns["exp_avg_sq"].append((v, v))
        for name in names:
            values[name].append([value for value, _ in columns[name]])
            bounds[name].append([bound for _, bound in columns[name]])
    return [Output(name, values[name], bounds[name]) for name in names]


def lion(W: Matrix, gradients: Sequence[Matrix], first: Matrix, settings: Settings) -> list[Output]:
    """Lion after all the gradients, from the momentum before the first.

    Raises:
        UncleanCaseError: a sign hangs on rounding.
    """
    beta1, beta2 = (real(beta) for beta in settings["betas"])
    lr = real(settings["lr"])
    weights: list[list[_Weight]] = []
    momenta: list[list[tuple[Real, Real]]] = []
    for i, row in enumerate(W):
        weights.append([])
        momenta.append([])
        for j, start in enumerate(row):
            history = [G[i][j] for G in gradients]
            weight = _Weight(start, settings)
            for t in range(1, len(history) + 1):
                before, size = _decay_sum(first[i][j], history[: t - 1], beta2)
                mixed = beta1 * before + (1 - beta1) * history[t - 1]
                direction = mp.sign(_decided(mixed, beta1 * size + (1 - beta1) * abs(history[t - 1])))
                weight.move(direction, lr * direction, mp.zero)
            weights[-1].append(weight)
            momenta[-1].append(_decay_sum(first[i][j], history, beta2))
    return [
        Output(
            "param", [[w.value for w in row] for row in weights], [[w.bound for w in row] for row in weights]
        ),
        Output(
            "exp_avg",
            [[m for m, _ in row] for row in momenta],
            [[size for _, size in row] for row in momenta],
        ),
    ]
