"""`optax.contrib.muon`, on the CPU: reads the vectors without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from conformance.adapters import Arrays, Capabilities, Spec

jax.config.update("jax_enable_x64", True)


def transformation(hyper: Mapping[str, Any]) -> Any:
    """optax.contrib.muon's own chain for matrices: learning rate, decay and momentum of one step."""
    return optax.contrib.muon(
        learning_rate=hyper["lr"],
        ns_coeffs=tuple(tuple(triple) for triple in hyper["polynomial"]),
        ns_steps=len(hyper["polynomial"]),
        beta=hyper["mu"],
        eps=hyper["epsilon"],
        weight_decay=hyper["weight_decay"],
        nesterov=hyper["nesterov"],
        consistent_rms=0.2 if hyper["scale"] == "moonlight" else None,
    )


def _is_own(node: Any) -> bool:
    return isinstance(node, optax.contrib.MuonState)


class OptaxAdapter:
    """optax's functions behind the protocol."""

    def capabilities(self) -> Capabilities:
        """Its own convention, in the input's dtype."""
        return Capabilities(
            name="optax.contrib.muon",
            algorithms={"muon": ("optax",)},
            dtypes=("float64", "float32"),
            features=("state", "schedule:lr", "schedule:mu"),
            distribution="optax",
        )

    def init(self, spec: Spec, params: Arrays) -> Any:
        """optax's state, momentum and count replaced by the case's."""
        weights = {name: jnp.asarray(value) for name, value in params.items()}
        state = transformation(spec.hyper).init(weights)
        momentum, count = jnp.asarray(spec.state["momentum"]), jnp.asarray(int(spec.state["step"]), jnp.int32)

        def filled(node: Any) -> Any:
            if _is_own(node):
                return node._replace(mu=jax.tree.map(lambda _: momentum, node.mu), count=count)
            return node

        return jax.tree.map(filled, state, is_leaf=_is_own)

    def step(self, params: Arrays, grads: Arrays, state: Any, hyper: Mapping[str, Any]) -> tuple[Arrays, Any]:
        """One update and its application."""
        weights, gradients = ({name: jnp.asarray(v) for name, v in tree.items()} for tree in (params, grads))
        updates, state = transformation(hyper).update(gradients, state, weights)
        new = optax.apply_updates(weights, updates)
        return {name: np.asarray(value) for name, value in new.items()}, state

    def canonical_state(self, state: Any) -> Mapping[str, NDArray[Any]]:
        """The momentum."""
        own = next(node for node in jax.tree.leaves(state, is_leaf=_is_own) if _is_own(node))
        return {"momentum": np.asarray(jax.tree.leaves(own.mu)[0])}


adapter = OptaxAdapter()
