"""`conformance bench`: step times of ours and of every peer that can be imported, in pairs, in one run."""
