"""Wrong ports, each with one plausible mistake: what shows that the levels have teeth."""
