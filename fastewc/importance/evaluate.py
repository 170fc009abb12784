"""One batch through the model: its output, its target, and which positions count."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastewc.importance.batches import Batch

IGNORED = -100
Forward = Callable[[Any, Any], tuple[Any, Tensor | None]]


def ignored(target: Tensor) -> Tensor:
    """Where a target is −100. One of unsigned integers never is: there −100 would wrap around to a true label."""
    return target == IGNORED if target.dtype.is_signed else torch.zeros_like(target, dtype=torch.bool)


# Language models whose class name says decoder, but whose own loss compares position t with label t, unshifted.
_UNSHIFTED = frozenset(
    {
        "BartForCausalLM",
        "BigBirdPegasusForCausalLM",
        "BlenderbotForCausalLM",
        "BlenderbotSmallForCausalLM",
        "CpmAntForCausalLM",
        "FlaubertWithLMHeadModel",
        "MBartForCausalLM",
        "MarianForCausalLM",
        "MusicgenForCausalLM",
        "MusicgenMelodyForCausalLM",
        "MvpForCausalLM",
        "PLBartForCausalLM",
        "PegasusForCausalLM",
        "ProphetNetForCausalLM",
        "Speech2Text2ForCausalLM",
        "TrOCRForCausalLM",
        "WhisperForCausalLM",
        "XLMProphetNetForCausalLM",
        "XLMWithLMHeadModel",
        "XLNetLMHeadModel",
    }
)


@dataclass(frozen=True)
class Evaluated:
    """What a forward gave for ``size`` samples. ``raw`` is the model's own return value."""

    raw: Any
    target: Tensor | None
    attention_mask: Tensor | None
    size: int
    batch_dim: int

    @property
    def output(self) -> Tensor:
        """The output tensor: ``raw`` or its ``logits``.

        Raises:
            TypeError: there is no such floating-point tensor.
        """
        found = logits_or_raw(self.raw)
        if not isinstance(found, Tensor):
            raise TypeError(
                f"the model returned {type(self.raw).__name__}; wanted a tensor or an object with .logits. Otherwise "
                "pass forward=, a callable(model, batch) that returns (output, target or None)"
            )
        if not found.is_floating_point():
            raise TypeError(f"the model's output must be a floating-point tensor, got {found.dtype}")
        return found

    def counted(self, output: Tensor, *, elementwise: bool = False) -> Tensor | None:
        """Which positions count: a bool mask of ``output.shape[:-1]`` (elementwise: ``output.shape``), None if all do.

        A target of that shape (elementwise: or of ``output.shape[:-1]``) decides by != −100; without one an
        attention_mask of ``output.shape[:-1]`` by != 0.
        """
        positions = output.shape[:-1]
        target, mask = self.target, self.attention_mask
        entries = elementwise and target is not None and target.shape == output.shape
        if target is not None and (entries or target.shape == positions):
            keep = ~ignored(target)
        elif mask is not None and mask.shape == positions:
            keep = mask != 0
        else:
            return None
        if bool(keep.all()):
            return None
        return keep.unsqueeze(-1).expand(output.shape) if elementwise and not entries else keep


def logits_or_raw(raw: Any) -> Any:
    """``raw.logits`` or ``raw["logits"]`` where that is a tensor, else ``raw``."""
    if isinstance(raw, Tensor):
        return raw
    logits = getattr(raw, "logits", None)
    if logits is None and isinstance(raw, Mapping):
        logits = raw.get("logits")
    return logits if isinstance(logits, Tensor) else raw


class Evaluator:
    """Calls the unwrapped model (or ``forward``) on a batch and finds target and attention mask."""

    def __init__(self, module: nn.Module, forward: Forward | None) -> None:
        self.module = module
        self.custom = forward
        self._base = _base_model(module)
        self._encoder_decoder = bool(getattr(getattr(self._base, "config", None), "is_encoder_decoder", False))
        self._shifts = shifts_labels(module)

    def __call__(self, batch: Batch) -> Evaluated:
        """Run the model on a batch that is on its device."""
        inputs, target, mask = self._split(batch)
        if self.custom is not None:
            result = self.custom(self.module, batch.content)
            if not isinstance(result, tuple) or len(result) != 2:
                raise TypeError(f"forward must return (output, target or None), got {_describe(result)}")
            raw, target = result
            if target is not None and not isinstance(target, Tensor):
                raise TypeError(
                    f"the target that forward returns must be a tensor or None, got {type(target).__name__}"
                )
            target = None if target is None else target.detach()
        elif isinstance(inputs, Mapping):
            raw = self.module(**inputs)
        else:
            raw = self.module(inputs)
        return Evaluated(raw, target, mask, batch.size, batch.batch_dim)

    def target(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """(target, attention_mask) of a batch. A custom forward has to run to tell."""
        if self.custom is None:
            _, target, mask = self._split(batch)
            return target, mask
        seen = self(batch)
        return seen.target, seen.attention_mask

    def encoder_mask(self, batch: Batch) -> Tensor | None:
        """The attention_mask of an encoder-decoder's encoder, which says nothing about its output."""
        content = batch.content
        return _tensor_or_none(content, "attention_mask") if self._decodes(content) else None

    def _decodes(self, content: Any) -> bool:
        """True if attention_mask belongs to an encoder, and the output comes from a decoder."""
        return isinstance(content, Mapping) and (
            self._encoder_decoder or any(str(key).startswith("decoder_") for key in content)
        )

    def _split(self, batch: Batch) -> tuple[Any, Tensor | None, Tensor | None]:
        """(what the model gets, target, attention_mask)."""
        content = batch.content
        if isinstance(content, Mapping):
            mask = _tensor_or_none(content, "decoder_attention_mask" if self._decodes(content) else "attention_mask")
            if self.custom is not None:
                return None, None, mask
            inputs = dict(content)
            labels = inputs.pop("labels", None)
            if labels is not None and not isinstance(labels, Tensor):
                raise TypeError(f"labels of a batch must be a tensor, got {type(labels).__name__}")
            if labels is not None:
                inputs = self._with_decoder_inputs(inputs, labels)
                labels = _shifted(labels) if self._shifts else labels
            return inputs, labels, mask
        if self.custom is not None:
            return None, None, None
        if isinstance(content, Tensor):
            return content, None, None
        return content[0], (content[1] if len(content) == 2 else None), None

    def _with_decoder_inputs(self, inputs: dict[str, Any], labels: Tensor) -> dict[str, Any]:
        """An encoder-decoder makes its decoder inputs from the labels, which we have taken out: do it here."""
        base = self._base
        given = any(inputs.get(key) is not None for key in ("decoder_input_ids", "decoder_inputs_embeds"))
        tokens = labels.ndim == 2 and not labels.is_floating_point()
        if given or not tokens or not self._encoder_decoder:
            return inputs
        if "decoder_input_ids" not in inspect.signature(base.forward).parameters:
            return inputs
        return {**inputs, "decoder_input_ids": _shifted_right(base, labels)}


def _base_model(module: nn.Module) -> nn.Module:
    """The model inside PEFT's wrapper."""
    get_base_model = getattr(module, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else module


def _tensor_or_none(content: Any, key: str) -> Tensor | None:
    found = content.get(key) if isinstance(content, Mapping) else None
    return found if isinstance(found, Tensor) else None


def _shifted_right(base: nn.Module, labels: Tensor) -> Tensor:
    """The decoder inputs that a Hugging Face encoder-decoder makes of labels itself, by its own function."""
    for method in ("prepare_decoder_input_ids_from_labels", "_shift_right"):
        if callable(prepare := getattr(base, method, None)):
            return cast(Tensor, prepare(labels))
    shift = getattr(sys.modules.get(type(base).__module__), "shift_tokens_right", None)
    config = getattr(base, "config", None)
    tokens = [getattr(config, f"{name}_token_id", None) for name in ("pad", "decoder_start")]
    wanted = tokens[: len(inspect.signature(shift).parameters) - 1] if shift is not None else []
    if not callable(shift) or None in wanted:
        raise ValueError(
            f"can't make the decoder inputs of {type(base).__name__} from its labels: put decoder_input_ids into the "
            "batch, or pass forward="
        )
    return cast(Tensor, shift(labels, *wanted))


def _describe(value: object) -> str:
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else type(value).__name__


def _shifted(labels: Tensor) -> Tensor:
    """Position t is compared with label t + 1; nothing follows the last one."""
    if labels.ndim < 2:
        return labels
    labels = labels if labels.dtype.is_signed else labels.long()  # −100 must fit
    target = torch.full_like(labels, IGNORED)
    target[..., :-1] = labels[..., 1:]
    return target


def shifts_labels(module: nn.Module) -> bool:
    """True for decoder language models of Hugging Face, whose own loss compares position t with label t + 1.

    By fact where the forward calls transformers' ForCausalLMLoss, else by the names of such models.
    """
    base = _base_model(module)
    config = getattr(base, "config", None)
    names = [cls.__name__ for cls in type(base).__mro__]
    if getattr(config, "is_encoder_decoder", False):
        return False
    if any(name in _UNSHIFTED for name in names):
        return False
    if _calls_causal_loss(base):
        return True
    auto = sys.modules.get("transformers.models.auto.modeling_auto")
    causal = set(getattr(auto, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", {}).values())
    endings = ["ForCausalLM", "LMHeadModel", "DoubleHeadsModel"]
    if config is not None:  # without one, nothing says that it has no encoder
        endings.append("ForConditionalGeneration")
    return any(name in causal or name.endswith(tuple(endings)) for name in names)


def _calls_causal_loss(base: nn.Module) -> bool:
    """True if a forward of the model reads ``self.loss_function``, and that is transformers' ForCausalLMLoss."""
    causal = getattr(sys.modules.get("transformers.loss.loss_utils"), "ForCausalLMLoss", None)
    forwards = [inspect.unwrap(cls.__dict__["forward"]) for cls in type(base).__mro__ if "forward" in cls.__dict__]
    reads = any("loss_function" in getattr(getattr(f, "__code__", None), "co_names", ()) for f in forwards)
    return causal is not None and reads and getattr(base, "loss_function", None) is causal
