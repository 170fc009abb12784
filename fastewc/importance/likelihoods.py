"""log p(y|x) of the named losses: its negative, its labels, and its exact expectation over labels (E5).

Everything here works on *rows*: the counted positions of one sample, K of them. Categorical rows are [K, C]; Gaussian
and Bernoulli are elementwise, rows [K]. Uniform random numbers come one per row, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastewc.importance.evaluate import ignored

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_CALLABLE_HINT = "for another likelihood pass a callable loss(output, target) that returns per-sample losses [N]"


@dataclass(frozen=True)
class Likelihood:
    """One named loss.

    ``elementwise``: each entry of the output is an event of its own; else its last dimension is C classes.
    """

    name: str
    elementwise: bool

    def check_output(self, output: Tensor) -> None:
        """Raise ValueError where the output can't hold this likelihood's parameters."""

    def check_target(self, output: Tensor, target: Tensor) -> None:
        """Raise where target and output do not fit (shape, dtype, range)."""
        raise NotImplementedError

    def negative_log(self, rows: Tensor, target: Tensor) -> Tensor:
        """−log p(y) of each row (up to a constant), [K]."""
        raise NotImplementedError

    def term(self, rows: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """(value, seed): the gradient of Σ seed ⊙ value is that of −log p(y) over all rows."""
        return self.negative_log(rows, target).sum(), None

    def predicted(self, rows: Tensor) -> Tensor:
        """The most probable label of each row."""
        raise NotImplementedError

    def sampled(self, rows: Tensor, uniform: Tensor) -> Tensor:
        """A label of each row drawn from the model, by inverting the distribution function at ``uniform`` in [0, 1)."""
        raise NotImplementedError

    def sampled_term(self, rows: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor | None]:
        """As :meth:`term`, y drawn from the model."""
        return self.term(rows, self.sampled(rows.detach(), uniform))

    def expected(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(values, weights) of one shape: the expectation over labels is Σ weights · (∂values)²."""
        raise NotImplementedError


class Categorical(Likelihood):
    """y ~ softmax(f), C classes in the last dimension."""

    def check_output(self, output: Tensor) -> None:
        """[..., C] with at least two classes."""
        if output.ndim < 2 or output.shape[-1] < 2:
            raise ValueError(
                "loss='categorical' wants an output [N, ..., C] of at least 2 classes, got shape "
                f"{tuple(output.shape)}; for one logit per sample use loss='bernoulli'"
            )

    def check_target(self, output: Tensor, target: Tensor) -> None:
        """Class indices of shape ``output.shape[:-1]``, −100 where nothing counts."""
        classes = output.shape[-1]
        if target.dtype not in _INTEGERS:
            raise TypeError(
                f"loss='categorical' wants integer class indices as targets, got {target.dtype}; {_CALLABLE_HINT}"
            )
        if target.shape != output.shape[:-1]:
            raise ValueError(
                f"output {tuple(output.shape)} [N, ..., C] wants targets of shape {tuple(output.shape[:-1])}, got "
                f"{tuple(target.shape)}"
            )
        counts, target = ~ignored(target), target.long()  # in 8 bits the number of classes may not fit
        wrong = counts & ((target < 0) | (target >= classes))
        if bool(wrong.any()):
            raise ValueError(
                f"target {int(target[wrong][0])} is not a class index of 0 to {classes - 1} (or −100, which does not "
                "count)"
            )

    def term(self, rows: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Seed p − 1_y, the derivative by f itself: −Σ of the others' p at y, because p_y − 1 would cancel."""
        y = target.long().unsqueeze(-1)
        seed = torch.softmax(rows.detach(), dim=-1).scatter_(-1, y, 0.0)
        return rows, seed.scatter_(-1, y, -seed.sum(dim=-1, keepdim=True))

    def predicted(self, rows: Tensor) -> Tensor:
        """Argmax f."""
        return rows.argmax(dim=-1)

    def sampled(self, rows: Tensor, uniform: Tensor) -> Tensor:
        """The class whose share of [0, Σp) holds uniform · Σp."""
        shares = torch.softmax(rows.double(), dim=-1).cumsum(dim=-1)
        drawn = torch.searchsorted(shares, uniform.unsqueeze(-1) * shares[:, -1:], right=True).squeeze(-1)
        return drawn.clamp(max=rows.shape[-1] - 1)

    def expected(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Σ_c p_c (∂ log p_c)²."""
        logarithm = torch.log_softmax(rows, dim=-1)
        return logarithm, logarithm.detach().exp()


class Gaussian(Likelihood):
    """y ~ N(f, 1), so −log p = ½‖f − y‖² up to a constant."""

    def check_target(self, output: Tensor, target: Tensor) -> None:
        """Exactly the output's shape; −100 where nothing counts."""
        _same_shape("gaussian", output, target)

    def negative_log(self, rows: Tensor, target: Tensor) -> Tensor:
        """½(f − y)²."""
        return 0.5 * (rows - target.to(rows.dtype)).square()

    def sampled_term(self, rows: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor | None]:
        """With y = f + ε, ∂(½(f − y)²)/∂f is −ε itself: f + ε would be rounded, and for a large f swallow ε."""
        noise: Tensor = torch.special.ndtri(uniform + 2.0**-54)  # 2⁻⁵⁴ keeps a draw of exactly 0 from becoming −∞
        return rows, -noise.to(rows.dtype)

    def expected(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Σ_o (∂f_o)²: the residual has variance 1."""
        return rows, torch.ones_like(rows)


class Bernoulli(Likelihood):
    """y ~ Bernoulli(σ(z)) with logits z; soft targets in [0, 1] are cross-entropies."""

    def check_target(self, output: Tensor, target: Tensor) -> None:
        """Exactly the output's shape, values in [0, 1] or −100."""
        _same_shape("bernoulli", output, target)
        if target.dtype == torch.bool:
            return
        wrong = ~ignored(target) & ~((target >= 0) & (target <= 1))
        if bool(wrong.any()):
            raise ValueError(
                "loss='bernoulli' wants targets in [0, 1] (or −100, which does not count), got "
                f"{target[wrong][0].item()}"
            )

    def negative_log(self, rows: Tensor, target: Tensor) -> Tensor:
        """−y log σ(z) − (1 − y) log σ(−z)."""
        return F.binary_cross_entropy_with_logits(rows, target.to(rows.dtype), reduction="none")

    def predicted(self, rows: Tensor) -> Tensor:
        """1 where z > 0."""
        return torch.gt(rows, 0)

    def sampled(self, rows: Tensor, uniform: Tensor) -> Tensor:
        """1 with probability σ(z)."""
        return uniform < torch.sigmoid(rows.double())

    def expected(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Σ_o p_o(1 − p_o)(∂z_o)², with 1 − p as σ(−z) so that it does not cancel."""
        logits = rows.detach()
        return rows, torch.sigmoid(logits) * torch.sigmoid(-logits)


def _same_shape(name: str, output: Tensor, target: Tensor) -> None:
    if target.shape != output.shape:
        raise ValueError(
            f"loss={name!r} wants targets of exactly the output's shape {tuple(output.shape)}, got "
            f"{tuple(target.shape)}; nothing is broadcast (reshape one of them, or do it in forward=)"
        )
    if target.is_complex():
        raise TypeError(f"loss={name!r} wants real targets, got {target.dtype}")


LIKELIHOODS: dict[str, Likelihood] = {
    "categorical": Categorical("categorical", elementwise=False),
    "gaussian": Gaussian("gaussian", elementwise=True),
    "bernoulli": Bernoulli("bernoulli", elementwise=True),
}
