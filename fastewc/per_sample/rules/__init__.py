"""One file per layer family: how an op's use of a parameter becomes a segment. ``RULES`` maps torch functions to them.

A rule is a function of a :class:`Call` that returns its uses, or None for a form that it does not know; then the op is
differentiated sample by sample, which is exact for every op.
"""

from fastewc.per_sample.rules.base import LEADING, RULES, Call, Use
from fastewc.per_sample.rules.rerun import rerun

from fastewc.per_sample.rules import conv, elementwise, embedding, linear, norms  # isort: skip  # they fill RULES

__all__ = ["LEADING", "RULES", "Call", "Use", "conv", "elementwise", "embedding", "linear", "norms", "rerun"]
