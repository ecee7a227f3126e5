"""Run as ``python -m conformance.certify``."""

from conformance.certify.command import main

main()
