"""What training shows: the public claims measured, and the convergence gate (level L5)."""
