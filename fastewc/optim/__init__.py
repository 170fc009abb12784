"""torch.optim's SGD, Adam and AdamW with the penalty of elastic weight consolidation inside the step."""

from fastewc.optim.adam import Adam
from fastewc.optim.adamw import AdamW
from fastewc.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW"]
