"""The oracle recomputed with mpmath at 50 digits, by other methods than its own.

The recomputation (``precise``, ``tables``, ``primitives``, ``conditions``, ``generator`` and the ``*_steps``) never
imports the oracle.  ``primitive_cases``, ``step_cases`` and ``chain`` call it as the thing to be judged; ``mistakes``
and ``mutants`` make it wrong.
"""
