"""Tasks: problem families with worked solutions, and the verifiers that score replies."""
