"""Text shipped with the package; README.md names source and licence."""
