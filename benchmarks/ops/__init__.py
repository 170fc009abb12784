"""Times of single ops, each against what a user would otherwise run; ``python -m benchmarks.ops`` runs them all."""
