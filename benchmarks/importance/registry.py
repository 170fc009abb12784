"""Every contender of a quantity by name."""

from __future__ import annotations

from functools import partial

from benchmarks.importance import layer_hooks, peers
from benchmarks.importance.contenders import Builder, Quantity, batch_one, ours, plain, vmap_grad

#: What everything is compared with.
PLAIN = "plain forward + backward"
#: Contenders that give Ω of some layers only, and say so in their name.
PARTIAL = (layer_hooks.NAME,)


def builders(quantity: Quantity, compile_seconds: float) -> dict[str, Builder]:
    """The unit first. BackPACK sums squares only."""
    found: dict[str, Builder] = {
        PLAIN: plain,
        f"fastewc.{quantity.name}_importance": ours,
        "batch-1 loop": batch_one,
        "vmap(grad)": vmap_grad,
        layer_hooks.NAME: partial(layer_hooks.hooked, compile_seconds=compile_seconds),
        "Opacus GradSampleModule": peers.opacus,
    }
    if quantity.power == 2:
        found["BackPACK SumGradSquared"] = peers.backpack
    return found
