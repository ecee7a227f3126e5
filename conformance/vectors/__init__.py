"""Test vectors: JSON for what is said, safetensors for the numbers; read with numpy alone.

from conformance.vectors import load
for case in load(): ...
"""

from conformance.vectors.loader import SCHEMA, Case, VectorSet, load
from conformance.vectors.tensors import VectorError

__all__ = ["SCHEMA", "Case", "VectorError", "VectorSet", "load"]
