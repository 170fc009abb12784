"""Elastic weight consolidation that is exact and nearly free: importances, penalties, optimizers."""

from fastewc import ops as ops
from fastewc import optim as optim
from fastewc._dispatch import impl_report as impl_report
from fastewc._version import __version__ as __version__
from fastewc.attach import AttachHandle as AttachHandle
from fastewc.ewc import EWC as EWC
from fastewc.importance import Importance as Importance
from fastewc.importance import fisher_importance as fisher_importance
from fastewc.importance import mas_importance as mas_importance
from fastewc.importance import signal_importance as signal_importance
from fastewc.importance import uniform_importance as uniform_importance
from fastewc.importance.si import PathIntegral as PathIntegral
from fastewc.importance.si import si_importance as si_importance
from fastewc.importance.suggest import suggest_lambda as suggest_lambda
from fastewc.per_sample.user_rules import Outer as Outer
from fastewc.per_sample.user_rules import per_sample_rule as per_sample_rule
