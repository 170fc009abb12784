"""Which importance: Fisher, MAS, total absolute signal, or one everywhere."""

from fastewc.importance.base import Importance
from fastewc.importance.fisher import fisher_importance
from fastewc.importance.mas import mas_importance
from fastewc.importance.signal import signal_importance
from fastewc.importance.uniform import uniform_importance

__all__ = ["Importance", "fisher_importance", "mas_importance", "signal_importance", "uniform_importance"]
