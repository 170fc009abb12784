"""Per-sample gradients, reduced as they come: Σ_n |g_n|^p without keeping any g_n."""

from fastewc.per_sample.batch_one import BatchOneSums, Term, zeros_for
from fastewc.per_sample.engine import PerSampleSums, Unforeseen

__all__ = ["BatchOneSums", "PerSampleSums", "Term", "Unforeseen", "zeros_for"]
