"""Calls of autograd Functions and modules that torch tells nobody of: those with a rule, and packed sequences."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function

from fastewc.per_sample.proxy import Proxy, found_proxies
from fastewc.per_sample.unrolled import Steps, of_packed, takes_packed

Run = Callable[..., Any]
Rules = Mapping[type, Run]


@contextmanager
def intercepted(model: nn.Module, rules: Rules, steps: Steps) -> Iterator[None]:
    """Inside, calls of classes with a rule go to the catcher of a stand-in among what they get, as torch functions do.

    ``rules``: by class what is called, with the module or Function, what runs it and its stand-ins in front.

    Recurrent layers without a rule take packed sequences as :func:`of_packed` does, with or without stand-ins: those of
    layers behind them need to know whose a row is, too. ``steps``: of how many.
    """
    own = list[tuple[nn.Module, Run]]()
    for module in model.modules():
        rule = _nearest(type(module), rules)
        if "forward" in vars(module) or (rule is None and not takes_packed(module)):
            continue
        own.append((module, partial(of_packed, steps) if rule is None else partial(_forward, rule)))
    with _functions_intercepted({cls: rule for cls, rule in rules.items() if issubclass(cls, Function)}):
        try:
            for module, run in own:
                vars(module)["forward"] = partial(run, module, module.forward)
            yield
        finally:
            for module, _ in own:
                vars(module).pop("forward", None)


def _nearest(cls: type, rules: Rules) -> Run | None:
    return next((rules[base] for base in cls.__mro__ if base in rules), None)


# ---- modules ----


def _forward(rule: Run, module: nn.Module, forward: Run, /, *args: Any, **kwargs: Any) -> Any:
    inner = {name: slots[key] for name, slots, key in _stand_ins(module)}
    proxies = found_proxies((inner, args, kwargs))
    if not proxies:
        return forward(*args, **kwargs)
    return proxies[0].catcher.call(rule, (module, forward, inner, *args), kwargs)


def _stand_ins(module: nn.Module) -> list[tuple[str, dict[str, Any], str]]:
    """Name, dict and key of every stand-in in a module: of parameters, and what a hook made of them (weight_norm)."""
    return [
        (f"{prefix}.{key}" if prefix else key, slots, key)
        for prefix, owner in module.named_modules()
        for slots in (owner._parameters, vars(owner))
        for key, value in slots.items()
        if isinstance(value, Proxy)
    ]


@contextmanager
def placed(module: Any, inner: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the module has these tensors in the places of its stand-ins."""
    places = _stand_ins(module) if inner else []
    before = [slots[key] for _, slots, key in places]
    try:
        for name, slots, key in places:
            slots[key] = inner.get(name, slots[key])
        yield
    finally:
        for (_, slots, key), stand_in in zip(places, before, strict=True):
            slots[key] = stand_in


# ---- autograd Functions ----

_lock = threading.Lock()
_passes = 0  # those of several threads overlap: the last one puts everything back
_taken: dict[Any, Any] = {}  # class whose ``apply`` is ours -> its own before, None where it is inherited


@contextmanager
def _functions_intercepted(rules: Rules) -> Iterator[None]:
    global _passes

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        rule, run = _nearest(cls, rules), _untaken(cls)
        stand_in = next((one for one in (*args, *kwargs.values()) if isinstance(one, Proxy)), None)
        if rule is None or stand_in is None:
            return run(*args, **kwargs)
        return stand_in.catcher.call(rule, (cls, run, {}, *args), kwargs)

    with _lock:
        _passes += 1
        for cls in rules.keys() - _taken.keys():
            _taken[cls] = vars(cls).get("apply")
            setattr(cls, "apply", classmethod(apply))  # noqa: B010 - a class that mypy doesn't know
    try:
        yield
    finally:
        with _lock:
            _passes -= 1
            while _taken and not _passes:
                cls, own = _taken.popitem()
                cls.apply = own
                if own is None:
                    del cls.apply


def _untaken(cls: type) -> Run:
    own = (_taken[base] if base in _taken else vars(base).get("apply") for base in cls.__mro__)
    found: Run = next(one for one in own if one is not None).__get__(None, cls)
    return found
