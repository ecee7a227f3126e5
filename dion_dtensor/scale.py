"""The factor on the learning rate, by the full shape of the logical matrix (never that of a shard)."""

from __future__ import annotations

import math

__all__ = ["SCALES", "WEIGHT_STORAGES", "scale_factor"]

SCALES = {
    "spectral_norm": lambda m, n: math.sqrt(m / n),  # microsoft/dion
    "keller": lambda m, n: math.sqrt(max(1.0, m / n)),  # KellerJordan/Muon, torch.optim.Muon "original"
    "moonlight": lambda m, n: 0.2 * math.sqrt(max(m, n)),  # arXiv 2502.16982; microsoft/dion "rms_norm"
    "rms_norm": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "nvidia": lambda m, n: math.sqrt(max(m, n)),  # NVIDIA Emerging-Optimizers "spectral"
}


WEIGHT_STORAGES = ("out_in", "in_out")


def scale_factor(scale: str | None, shape: tuple[int, ...], weight_storage: str = "out_in") -> float:
    """The factor of a matrix ``[fan_out, fan_in]``, or ``[fan_in, fan_out]`` if "in_out"; 1 for ``None``.

    Raises:
        ValueError: an unknown name.
    """
    if weight_storage not in WEIGHT_STORAGES:
        raise ValueError(f"weight_storage={weight_storage!r} must be 'out_in' or 'in_out'")
    if scale is None:
        return 1.0
    if scale not in SCALES:
        named = {"match_rms_adamw": "moonlight", "original": "keller", "spectral": "nvidia"}.get(scale)
        hint = f"that of others by this name is {named!r} here; " if named else ""
        raise ValueError(f"scale={scale!r} is unknown; {hint}choose from {sorted(SCALES)} or None")
    m, n = shape if weight_storage == "out_in" else shape[::-1]
    return SCALES[scale](m, n)
