"""What a port has to offer: a functional adapter, and what it claims to implement.

An adapter is any object with `init`, `step` and `capabilities`; the other methods of :class:`Adapter` are optional.
Arrays are numpy's, so that a port in any framework can be judged. `torch_optimizer.TorchOptimizerAdapter` makes an
adapter out of a `torch.optim.Optimizer`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from conformance.vectors import Case, VectorSet

Arrays = Mapping[str, NDArray[Any]]
LEVELS = ("L0", "L1", "L2", "L3", "L4", "L5")
"""Orthonormalizer, one step, trajectory, save and resume, mesh equivalence, convergence."""
DTYPES = ("float64", "float32", "bfloat16")
"""Compute dtypes; with bfloat16 the weights, gradients and states are float32."""

ALGORITHMS = ("muon", "normuon", "dion", "orth_dion", "dion2", "dion3", "adamw", "lion", "orthonormalize")
"""The oracle's, and the orthonormalizer of L0."""
STATES = ("momentum", "Q", "variance", "exp_avg", "exp_avg_sq", "step")
"""Keys of the oracle's states."""
FEATURES = (
    *("state", "cautious", "schedule:lr", "schedule:mu"),
    *("gradients:Partial", "shards:two-dims", "shards:one-dim"),
    *("split:Rows", "split:Heads", "split:InterleavedRows", "split:Experts", "split:Flatten"),
)
"""What a port may claim beyond algorithms, levels and dtypes."""


@dataclass(frozen=True)
class Spec:
    """The one parameter of a case.

    Attributes:
        name: fully qualified, as a model would have it.
        shape: its shape.
        storage_dtype: "float64" or "float32": of weight, gradient and state.
        compute_dtype: "float64", "float32" or "bfloat16": of the orthonormalization.
        algorithm: a key of the oracle's ALGORITHMS.
        dialect: name of the convention.
        split: how it is cut into logical matrices, or None.
        hyper: every hyperparameter of the first step.
        derived: scale_factor, rank and count of each logical matrix.
        state: what to start from, by the oracle's key: "momentum", "Q", "variance", "exp_avg", "exp_avg_sq", "step";
            empty where the port starts as it always does (L3 to L5).
    """

    name: str
    shape: tuple[int, ...]
    storage_dtype: str
    compute_dtype: str
    algorithm: str
    dialect: str
    split: Mapping[str, Any] | None
    hyper: Mapping[str, Any]
    derived: Mapping[str, Any]
    state: Arrays


@dataclass(frozen=True)
class Capabilities:
    """What a port claims. What it does not claim is listed as not claimed, never as passed.

    Attributes:
        name: of the port.
        algorithms: by algorithm, the dialects that it follows; "*" stands for all.
        levels: of LEVELS.
        dtypes: compute dtypes of DTYPES.
        features: beyond these: "state" (starts from a given state), "cautious", "split:Rows", "split:Heads",
            "split:InterleavedRows", "split:Experts", "split:Flatten", "schedule:lr", "schedule:mu",
            on a mesh "gradients:Partial" (averages still to be taken), "shards:two-dims" (FSDP2 x TP on two dims of a
            matrix) and "shards:one-dim" (both on one).
        states: keys that `canonical_state` returns and that are to be graded; "*" stands for all.
        distribution: name of the installed package, for its version.
    """

    name: str
    algorithms: Mapping[str, tuple[str, ...]]
    levels: tuple[str, ...] = ("L1", "L2")
    dtypes: tuple[str, ...] = ("float32",)
    features: tuple[str, ...] = ()
    states: tuple[str, ...] = ("*",)
    distribution: str | None = None
    notes: Mapping[str, str] = field(default_factory=dict)

    def refusal(self, case: Case, compute_dtype: str) -> str | None:
        """Why a case is not claimed, or None if it is."""
        dialects = self.algorithms.get(case.algorithm, ())
        if case.level not in self.levels:
            return f"level {case.level}"
        if not dialects:
            return f"algorithm {case.algorithm}"
        if case.dialect not in dialects and "*" not in dialects:
            return f"dialect {case.dialect} of {case.algorithm}"
        if compute_dtype not in self.dtypes:
            return f"dtype {compute_dtype}"
        missing = [one for one in case.requires if one not in self.features]
        return f"feature {', '.join(missing)}" if missing else None

    def version(self) -> str:
        """Version of the installed package, "unknown" without a name, or that it runs from a checkout."""
        try:
            return importlib.metadata.version(self.distribution) if self.distribution else "unknown"
        except importlib.metadata.PackageNotFoundError:
            return "from a checkout"


class Adapter(Protocol):
    """What the suite calls. Only the first three are needed."""

    def capabilities(self) -> Capabilities:
        """What the port claims."""
        ...

    def init(self, spec: Spec, params: Arrays) -> Any:
        """The state before the first step; `params` holds the weight under `spec.name`."""
        ...

    def step(self, params: Arrays, grads: Arrays, state: Any, hyper: Mapping[str, Any]) -> tuple[Arrays, Any]:
        """One step; returns new weights and state. Raises if the step is refused."""
        ...

    # optional
    # def use_device(self, device: str): where L0 to L2 and L5 are computed from now on, "cpu" or "cuda".
    # def canonical_state(self, state) -> Arrays: the state by the oracle's keys.
    # def orthonormalize(self, matrix, hyper, compute_dtype) -> array: level L0.
    # def build(self, params, spec): a torch.optim.Optimizer over (name, parameter) pairs, plain or DTensor: L3 and L4.


class AdapterError(ValueError):
    """An adapter that cannot be found or is none; the message says what to give."""


def find(path: str) -> Adapter:
    """The adapter at "package.module:object", or of an entry point in the group "conformance.adapters".

    An object without `capabilities` that can be called is called, once, to make the adapter.

    Raises:
        AdapterError: no such module or object, something else than an adapter, or whatever its code raised.
    """
    if ":" not in path:
        known = importlib.metadata.entry_points(group="conformance.adapters")
        if path not in known.names:
            raise AdapterError(
                f"{path!r} is neither package.module:object nor a registered adapter "
                f"({', '.join(sorted(known.names)) or 'none is registered'})"
            )
        found = _tried(path, "it cannot be loaded", known[path].load)
    else:
        module_name, _, name = path.partition(":")
        if module_name.endswith(".py"):
            file = Path(module_name).resolve()
            inside = file.is_relative_to(Path.cwd())
            dotted = ".".join(
                (file.relative_to(Path.cwd()) if inside else Path(file.name)).with_suffix("").parts
            )
            where = "" if inside else f" from {file.parent}"
            raise AdapterError(f"{path!r} names a file; give the module: {dotted}:{name}{where}")
        if not all(part.isidentifier() for part in module_name.split(".")):
            raise AdapterError(f"{path!r} is not package.module:object")
        module = _tried(
            path, f"{module_name} cannot be imported", lambda: importlib.import_module(module_name)
        )
        if not hasattr(module, name):
            raise AdapterError(f"{path!r}: {module_name} has no {name!r}")
        found = getattr(module, name)
    if isinstance(found, type) or (callable(found) and not hasattr(found, "capabilities")):
        found = _tried(path, "it cannot be called without arguments to make the adapter", found)
    missing = [name for name in ("capabilities", "init", "step") if not callable(getattr(found, name, None))]
    if missing:
        raise AdapterError(f"{path!r} is no adapter: it has no {', '.join(missing)}")
    adapter: Adapter = found
    return adapter


def use_device(adapter: Adapter, device: str, path: str) -> None:
    """Has an adapter compute on a device. One without `use_device` (numpy's, JAX's) stays where its framework puts it.

    Raises:
        AdapterError: there is no such device.
    """
    if hasattr(adapter, "use_device"):
        _tried(path, f"it cannot use the device {device!r}", lambda: adapter.use_device(device))


def _tried(path: str, problem: str, function: Callable[[], Any]) -> Any:
    """Calls the port's code; sys.exit there must not end the suite as if all were well."""
    try:
        return function()
    except (Exception, SystemExit) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise AdapterError(f"{path!r}: {problem}: {said}") from error


def checked_claims(adapter: Adapter, path: str) -> Capabilities:
    """What an adapter claims, in plain types that any process can read.

    Raises:
        AdapterError: `capabilities` raises, gives something else, or claims what is not known.
    """
    claims = _tried(path, "capabilities() failed", adapter.capabilities)
    if not isinstance(claims, Capabilities):
        raise AdapterError(f"{path!r}: capabilities() must return conformance.adapters.Capabilities")
    if not isinstance(claims.name, str):
        raise AdapterError(f"{path!r}: Capabilities.name must be a string, not {claims.name!r}")
    if not isinstance(claims.distribution, str | None):
        raise AdapterError(f"{path!r}: Capabilities.distribution must be a string or None")
    for field_name in ("algorithms", "notes"):
        if not isinstance(getattr(claims, field_name), Mapping):
            raise AdapterError(
                f"{path!r}: Capabilities.{field_name} must be a dict, not {getattr(claims, field_name)!r}"
            )
    named: dict[str, tuple[object, Sequence[str] | None]] = {
        "algorithms": (tuple(claims.algorithms), ALGORITHMS),
        "levels": (claims.levels, LEVELS),
        "dtypes": (claims.dtypes, DTYPES),
        "features": (claims.features, FEATURES),
        "states": (claims.states, ("*", *STATES)),
        **{f"algorithms[{name!r}]": (dialects, None) for name, dialects in claims.algorithms.items()},
    }
    for what, (values, known) in named.items():
        if not isinstance(values, tuple | list) or not all(isinstance(one, str) for one in values):
            raise AdapterError(f"{path!r}: Capabilities.{what} must be a tuple of strings, not {values!r}")
        for one in values:
            if known is not None and one not in known:
                raise AdapterError(f"{path!r}: Capabilities.{what} has {one!r}; known are {', '.join(known)}")
    return Capabilities(
        claims.name,
        {name: tuple(dialects) for name, dialects in claims.algorithms.items()},
        tuple(claims.levels),
        tuple(claims.dtypes),
        tuple(claims.features),
        tuple(claims.states),
        claims.distribution,
        {str(name): str(note) for name, note in claims.notes.items()},
    )


def check_dialects(claims: Capabilities, vectors: VectorSet, path: str) -> None:
    """Refuses claims of conventions that no vector has, of any algorithm.

    Raises:
        AdapterError: names the dialect and those that there are.
    """
    known = dict.fromkeys(case.dialect for case in vectors)
    for algorithm, dialects in claims.algorithms.items():
        for one in dialects:
            if one not in known and one != "*":
                own = dict.fromkeys(case.dialect for case in vectors if case.algorithm == algorithm)
                raise AdapterError(
                    f"{path!r}: Capabilities.algorithms[{algorithm!r}] has the dialect {one!r}; known are "
                    f"{', '.join(own or known)}"
                )


def spec_of(case: Case, compute_dtype: str) -> Spec:
    """The specification of a case's parameter, in the storage dtype that goes with a compute dtype."""
    inputs = case.cast(compute_dtype)
    return Spec(
        name="blocks.0.weight",
        shape=case.shape,
        storage_dtype=str(np.dtype(inputs["weight"].dtype)),
        compute_dtype=compute_dtype,
        algorithm=case.algorithm,
        dialect=case.dialect,
        split=case.split,
        hyper=case.hyper_at(0),
        derived=case.derived,
        state={
            name.removeprefix("state/"): value for name, value in inputs.items() if name.startswith("state/")
        },
    )
