"""The cases of the oracle's primitives."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from conformance.certify import generator, inputs
from conformance.certify.cases import PrimitiveCase, whole
from conformance.certify.conditions import basis_turns, hypot, newton_schulz_bound, polar_bound
from conformance.certify.matrix_steps import scale_of
from conformance.certify.output import Output
from conformance.certify.precise import (
    EPS,
    column_norms,
    frobenius,
    from_tensor,
    real,
    scaled,
    singular_values,
    underflow,
)
from conformance.certify.primitives import (
    ceiling,
    newton_schulz,
    normalize_columns,
    ordered_basis,
    polar,
    top_slices,
)
from conformance.certify.tables import NORM_FACTOR, TABLES, coefficients
from dion_ref import linalg, philox, polynomials, update

F64 = torch.float64


def matrices(group: str) -> dict[str, Tensor]:
    """The inputs that every matrix primitive meets, by name."""
    shapes = ((1, 1), (1, 7), (7, 1), (2, 2), (5, 5), (8, 12), (12, 8), (3, 20), (20, 3))
    found = {f"gaussian {m}x{n}": inputs.gaussian(f"{group}/{m}x{n}", m, n) for m, n in shapes}
    found["gaussian 24x40"] = inputs.gaussian(f"{group}/24x40", 24, 40)
    found["gaussian 40x24"] = inputs.gaussian(f"{group}/40x24", 40, 24)
    for m, n, decades in ((6, 6, 4), (9, 6, 8), (6, 9, 8), (7, 7, 12), (10, 6, 12)):
        found[f"condition 1e{decades} {m}x{n}"] = inputs.conditioned(
            f"{group}/{m}x{n}/{decades}", m, n, decades
        )
    for m, n, rank in ((6, 6, 1), (8, 8, 5), (10, 7, 4), (7, 10, 3)):
        found[f"rank {rank} {m}x{n}"] = inputs.deficient(f"{group}/{m}x{n}/{rank}", m, n, rank)
    found["zero 4x6"] = torch.zeros(4, 6, dtype=F64)
    for exponent in (-1060, -520, 520, 1000):
        found[f"scale 2^{exponent} 6x4"] = inputs.powers(
            inputs.gaussian(f"{group}/{exponent}", 6, 4), exponent
        )
    return found


def polar_cases() -> Iterator[PrimitiveCase]:
    """Exact polar factors."""
    for name, M in matrices("polar").items():

        def expected(M: Tensor = M) -> list[Output]:
            A = from_tensor(M)
            factor, kept = polar(A)
            return [Output("polar factor", factor, polar_bound(kept, 0, frobenius(A)))]

        def actual(M: Tensor = M) -> dict[str, Tensor]:
            return {"polar factor": linalg.polar_factor(M)}

        yield PrimitiveCase(f"polar/{name}", "polar factor", expected, actual)


def basis_cases() -> Iterator[PrimitiveCase]:
    """Ordered bases; what counts as nothing is 8 eps of the whole matrix."""
    found = {name: M for name, M in matrices("basis").items() if M.shape[0] >= M.shape[1]}
    dead = inputs.integers("basis/dead", 9, 6)
    dead[:, 0], dead[:, 3] = 0, dead[:, 1] - 2 * dead[:, 2]
    found["dead columns 9x6"] = dead
    found["all dead 5x3"] = torch.zeros(5, 3, dtype=F64)
    found["columns of all sizes 8x5"] = inputs.gaussian("basis/sizes", 8, 5) * torch.logspace(
        0, -8, 5, dtype=F64
    )
    for name, A in found.items():

        def expected(A: Tensor = A) -> list[Output]:
            M = from_tensor(A)
            basis = ordered_basis(M, [8 * EPS * frobenius(M)] * A.shape[1])
            turns = basis_turns(basis, [length + underflow(A.shape[0]) for length in column_norms(M)])
            kept = [int(j in basis.kept) for j in range(A.shape[1])]
            bound = hypot(*turns) * real(2) ** 0.5
            return [Output("basis", basis.vectors, bound), whole(kept, "kept")]

        def actual(A: Tensor = A) -> dict[str, Tensor]:
            negligible = (8 * EPS * linalg.norm(A)).expand(A.shape[1])
            basis, kept = linalg.ordered_basis(A, negligible)
            return {"basis": basis, "kept": kept.to(F64)}

        yield PrimitiveCase(f"basis/{name}", "ordered basis", expected, actual)


def newton_schulz_cases() -> Iterator[PrimitiveCase]:
    """Every table on a few spectra, the first table on all."""
    everything = matrices("newton-schulz")
    few = ("gaussian 1x1", "gaussian 8x12", "gaussian 12x8", "condition 1e8 9x6", "rank 5 8x8", "zero 4x6")
    large = ("gaussian 24x40", "scale 2^1000 6x4")
    for table in TABLES:
        for name, M in everything.items():
            if not (table == "polar_express" or name in few or (table == "keller" and name in large)):
                continue

            def expected(M: Tensor = M, table: str = table) -> list[Output]:
                A, steps = from_tensor(M), coefficients(table)
                unit = scaled(1 / (real(NORM_FACTOR.get(table, 1.0)) * frobenius(A) + real(1e-8)), A)
                error = float(2 * frobenius(unit) + underflow(*M.shape))
                bound = newton_schulz_bound(singular_values(unit), steps, error)
                return [Output("iterate", newton_schulz(unit, steps), bound)]

            def actual(M: Tensor = M, table: str = table) -> dict[str, Tensor]:
                known = polynomials.POLYNOMIALS[table]
                X = linalg.normalize_input(M, epsilon=1e-8, epsilon_rule="add", norm_factor=known.norm_factor)
                return {"iterate": linalg.newton_schulz(X, known.coefficients)}

            yield PrimitiveCase(f"newton-schulz/{table}/{name}", f"Newton-Schulz {table}", expected, actual)


def column_cases() -> Iterator[PrimitiveCase]:
    """Columns of all sizes, normalized."""
    chosen = (
        "gaussian 1x1",
        "gaussian 12x8",
        "rank 4 10x7",
        "zero 4x6",
        "scale 2^-1060 6x4",
        "scale 2^1000 6x4",
    )
    everything = matrices("columns")
    found = {name: everything[name] for name in chosen}
    found["near epsilon 6x5"] = inputs.gaussian("columns/epsilon", 6, 5) * torch.logspace(
        -6, -10, 5, dtype=F64
    )
    for name, R in found.items():

        def expected(R: Tensor = R) -> list[Output]:
            value = normalize_columns(from_tensor(R), real(1e-8))
            return [Output("columns", value, frobenius(value))]

        def actual(R: Tensor = R) -> dict[str, Tensor]:
            return {"columns": linalg.normalize_columns(R, 1e-8)}

        yield PrimitiveCase(f"columns/{name}", "column normalization", expected, actual)


def selection_cases() -> Iterator[PrimitiveCase]:
    """Top slices: exact ties, clean gaps, all scales."""
    found: dict[str, tuple[Tensor, int, int]] = {
        "one of one": (inputs.gaussian("top/1", 1, 4), 1, 0),
        "rows": (inputs.gaussian("top/rows", 9, 5), 3, 0),
        "columns": (inputs.gaussian("top/columns", 5, 9), 4, 1),
        "all": (inputs.gaussian("top/all", 6, 3), 6, 0),
        "zero": (torch.zeros(6, 3, dtype=F64), 2, 0),
        "equal": (torch.ones(8, 4, dtype=F64), 3, 0),
        "tied rows": (inputs.tied_rows("top/tied", 12, 6, 2), 5, 0),
        "tied columns": (inputs.tied_rows("top/tied columns", 10, 5, 3).mT, 4, 1),
        "many tied": (inputs.tied_rows("top/many", 40, 8, 3), 17, 0),
        "denormal": (inputs.powers(inputs.integers("top/denormal", 8, 5), -1074), 3, 0),
        "huge": (inputs.powers(inputs.gaussian("top/huge", 8, 5), 1015), 3, 0),
        # L1 and L2 rank these rows oppositely
        "flat or peaked": (
            torch.tensor([[4.0, 0, 0, 0], [2, 2, 2, 2], [1.5, 1.5, 1.5, 1.5]], dtype=F64),
            2,
            0,
        ),
    }
    for name, (M, count, dim) in found.items():

        def expected(M: Tensor = M, count: int = count, dim: int = dim) -> list[Output]:
            return [whole(top_slices((M if dim == 0 else M.mT).tolist(), count), "indices")]

        def actual(M: Tensor = M, count: int = count, dim: int = dim) -> dict[str, Tensor]:
            return {"indices": linalg.top_slices(M, count, dim).to(F64)}

        yield PrimitiveCase(f"top/{name}", "top slices", expected, actual)


def generator_cases() -> Iterator[PrimitiveCase]:
    """Philox words at the corners of the counter and the key, and normal values."""
    most = 2**32 - 1
    corners = (
        ((0, 0, 0, 0), (0, 0)),
        ((most,) * 4, (most,) * 2),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)),
        ((1, 2, 3, 0), generator.key_of(5, "layers.0.weight")),
    )
    for index, (counter, key) in enumerate(corners):

        def words(counter: tuple[int, ...] = counter, key: tuple[int, int] = key) -> dict[str, Tensor]:
            a, b, c, d = (torch.tensor([word]) for word in counter)
            return {"words": torch.cat(philox.philox4x32((a, b, c, d), key)).to(F64)}

        def known(counter: tuple[int, int, int, int] = counter, key: tuple[int, int] = key) -> list[Output]:
            return [whole(generator.philox(counter, key), "words")]

        yield PrimitiveCase(f"philox/{index}", "Philox", known, words)
    for rows, columns, seed, name, matrix in (
        (1, 1, 0, "", 0), (3, 5, 0, "a", 0), (7, 8, 1, "blocks.0.attention.wq.weight", 3), (24, 6, -2, "ö", 2**31),
    ):  # fmt: skip

        def values(
            rows: int = rows, columns: int = columns, seed: int = seed, name: str = name, matrix: int = matrix
        ) -> dict[str, Tensor]:
            return {"normals": philox.normal(rows, columns, seed=seed, name=name, matrix=matrix)}

        def expected(
            rows: int = rows, columns: int = columns, seed: int = seed, name: str = name, matrix: int = matrix
        ) -> list[Output]:
            return [generator.normals(rows, columns, seed, name, matrix)]

        yield PrimitiveCase(f"normals/{rows}x{columns}", "normal values", expected, values)


def counting_cases() -> Iterator[PrimitiveCase]:
    """Rounded-up counts where floats go wrong, and the factors on lr."""
    counts = (
        (0.07, 100, 1),
        (0.55, 100, 1),
        (0.28, 25, 1),
        (0.25, 10, 1),
        (1e-5, 7, 1),
        (0.5, 24, 8),
        (1.0, 9, 4),
    )

    def ceilings() -> dict[str, Tensor]:
        return {"counts": torch.tensor([float(update.exact_ceil(*count)) for count in counts], dtype=F64)}

    def right() -> list[Output]:
        return [whole([ceiling(*count) for count in counts], "counts")]

    yield PrimitiveCase("count/ceilings", "counts and scales", right, ceilings)
    shapes = ((1, 1), (3, 7), (7, 3), (1024, 4096), (40, 40))
    for scale in ("spectral_norm", "keller", "moonlight", "rms_norm", "nvidia", None):
        for storage in ("out_in", "in_out"):

            def factors(scale: str | None = scale, storage: str = storage) -> list[Output]:
                values = [scale_of({"scale": scale, "weight_storage": storage}, m, n) for m, n in shapes]
                return [Output("factors", [values], [values])]

            def found(scale: str | None = scale, storage: str = storage) -> dict[str, Tensor]:
                given = [update.scale_factor(scale, m, n, storage) for m, n in shapes]
                return {"factors": torch.tensor(given, dtype=F64)}

            yield PrimitiveCase(f"scale/{scale}/{storage}", "counts and scales", factors, found)


def primitive_cases() -> list[PrimitiveCase]:
    """All of them."""
    return [
        *polar_cases(), *basis_cases(), *newton_schulz_cases(), *column_cases(),
        *selection_cases(), *generator_cases(), *counting_cases(),
    ]  # fmt: skip
