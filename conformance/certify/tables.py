"""The numbers of the papers and of the public implementations, typed once more and independently of the oracle.

Coefficients are decimal strings, so that a digit lost to float64 on the other side would show.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conformance.certify.precise import Real, real

Triple = tuple[Real, Real, Real]

_KELLER = "3.4445 -4.7750 2.0315"

_ROWS: Mapping[str, tuple[str, ...]] = {
    # KellerJordan/Muon, torch.optim.Muon, optax.contrib.muon
    "keller": (_KELLER, _KELLER, _KELLER, _KELLER, _KELLER),
    # Dao-AILab/gram-newton-schulz 0.1.6
    "you": (
        "4.0848 -6.8946 2.9270",
        "3.9505 -6.3029 2.6377",
        "3.7418 -5.5913 2.3037",
        "2.8769 -3.1427 1.2046",
        "2.8366 -3.0525 1.2012",
    ),
    # microsoft/dion at 0a059a4, 1.02 baked into the first four
    "polar_express": (
        "8.156554524902461 -22.48329292557795 15.878769915207462",
        "4.042929935166739 -2.808917465908714 .5000178451051316",
        "3.8916678022926607 -2.772484153217685 .5060648178503393",
        "3.285753657755655 -2.3681294933425376 .46449024233003106",
        "2.3465413258596377 -1.7097828382687081 .42323551169305323",
    ),
    # arXiv 2505.16932 as in Dao-AILab/gram-newton-schulz 0.1.6, before the damping by 1.05
    "polar_express_gns": (
        "8.28721201814563 -23.595886519098837 17.300387312530933",
        "4.107059111542203 -2.9478499167379106 .5448431082926601",
        "3.9486908534822946 -2.908902115962949 .5518191394370137",
        "3.3184196573706015 -2.488488024314874 .51004894012372",
        "2.300652019954817 -1.6689039845747493 .4188073119525673",
    ),
    # arXiv 2506.10935 as in NVIDIA Emerging-Optimizers
    "cans": (
        "8.4703 -25.1081 18.6293",
        "4.1828 -3.1087 .5806",
        "3.9619 -2.9541 .5630",
        "3.2866 -2.4647 .5074",
        "2.2737 -1.6447 .4162",
    ),
}

TABLES = tuple(_ROWS)
"""Names of the tables."""

NORM_FACTOR: Mapping[str, float] = {"polar_express": 1.02}
"""What the input's norm is multiplied by, where it is not 1."""


def coefficients(name: str) -> list[Triple]:
    """The (a, b, c) of a named table at the precision in force; "polar_express_gns" is p(x / 1.05) at every step."""
    damping = real("1.05") if name == "polar_express_gns" else real(1)
    triples = []
    for row in _ROWS[name]:
        a, b, c = (real(word) for word in row.split())
        triples.append((a / damping, b / damping**3, c / damping**5))
    return triples


CONVENTIONS: Mapping[str, Mapping[str, Any]] = {
    # microsoft/dion
    "dion": {
        "momentum": "sum", "nesterov": False, "bias_correction": False, "polynomial": "polar_express",
        "epsilon": 1e-8, "epsilon_rule": "add", "scale": "spectral_norm", "weight_storage": "out_in",
    },
    # KellerJordan/Muon
    "keller": {
        "momentum": "ema", "nesterov": True, "bias_correction": False, "polynomial": "keller",
        "epsilon": 1e-7, "epsilon_rule": "add", "scale": "keller", "weight_storage": "out_in",
    },
    # torch.optim.Muon 2.14
    "torch": {
        "momentum": "ema", "nesterov": True, "bias_correction": False, "polynomial": "keller",
        "epsilon": 1e-7, "epsilon_rule": "clamp", "scale": "keller", "weight_storage": "out_in",
    },
    # arXiv 2502.16982
    "moonlight": {
        "momentum": "sum", "nesterov": True, "bias_correction": False, "polynomial": "keller",
        "epsilon": 1e-7, "epsilon_rule": "add", "scale": "moonlight", "weight_storage": "out_in",
    },
    # NVIDIA Emerging-Optimizers
    "nvidia": {
        "momentum": "ema", "nesterov": False, "bias_correction": False, "polynomial": "you",
        "epsilon": 1e-15, "epsilon_rule": "clamp", "scale": "nvidia", "weight_storage": "out_in",
    },
    # optax.contrib.muon
    "optax": {
        "momentum": "ema", "nesterov": True, "bias_correction": True, "polynomial": "keller",
        "epsilon": 1e-8, "epsilon_rule": "add", "scale": "keller", "weight_storage": "in_out",
    },
}  # fmt: skip
"""What each public implementation of Muon does, apart from lr, mu and decay."""

_COMMON: Mapping[str, Any] = {"lr": 0.01, "weight_decay": 0.01, "cautious": False}
_MATRIX: Mapping[str, Any] = {
    **_COMMON, "mu": 0.95, "epsilon": 1e-8, "scale": "spectral_norm", "weight_storage": "out_in",
}  # fmt: skip
_POLYNOMIAL: Mapping[str, Any] = {
    **_MATRIX, "polynomial": "polar_express", "epsilon_rule": "add", "norm_factor": None,
}  # fmt: skip
_MUON: Mapping[str, Any] = {**_POLYNOMIAL, "nesterov": False, "momentum": "sum", "bias_correction": False}
_ROW_VARIANCE: Mapping[str, Any] = {"beta2": 0.95, "variance_epsilon": 1e-8}

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "muon": _MUON,
    "normuon": {**_MUON, **_ROW_VARIANCE},
    "dion": {**_MATRIX, "rank_fraction": 1.0, "rank_multiple": 1},
    "orth_dion": {**_MATRIX, "rank_fraction": 1.0, "rank_multiple": 1},
    "dion2": {**_POLYNOMIAL, "fraction": 0.25},
    "dion3": {**_POLYNOMIAL, "fraction": 0.25, **_ROW_VARIANCE},
    "adamw": {**_COMMON, "betas": (0.9, 0.95), "epsilon": 1e-8},
    "lion": {**_COMMON, "betas": (0.9, 0.95)},
}
"""What microsoft/dion uses when nothing is said; a case that gives no value is judged by these."""
