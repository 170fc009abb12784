"""Fine-tuning by adapters, as PEFT adds them to a model of transformers: their importances against autograd."""

import warnings
from collections import Counter

import pytest
import torch

from tests.per_sample.checking import assert_importance
from tests.per_sample.test_zoo import DECODER, TRANSFORMERS, Kind, importances, oracles, pretrained, scales, tokens

peft = pytest.importorskip("peft", reason="needs peft, which is not installed")

GPT2, LLAMA = TRANSFORMERS["gpt2"].make, pretrained("LlamaForCausalLM", "LlamaConfig", **DECODER)
#: Where their adapters go: all projections of attention and of the feed-forward part.
LAYERS = {
    GPT2: ["c_attn", "c_proj", "c_fc"],
    LLAMA: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def adapted(base, config, **options):
    """A model of which the adapters alone are trained."""
    if "Lo" in config or "Ve" in config:
        options = {"r": 4, "target_modules": LAYERS[base]} | options
    if config == "LoraConfig":
        options = {"lora_dropout": 0.0} | options
    if base is GPT2 and "Prompt" not in config and "Prefix" not in config:
        options["fan_in_fan_out"] = True

    def make():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, about transformers and its own defaults
            return peft.get_peft_model(base(), getattr(peft, config)(task_type="CAUSAL_LM", **options))

    return make


MODELS = {
    "LoRA of gpt2": adapted(GPT2, "LoraConfig"),
    "LoRA of llama": adapted(LLAMA, "LoraConfig"),
    "LoRA, biases": adapted(GPT2, "LoraConfig", bias="lora_only"),
    "LoRA with biases": adapted(LLAMA, "LoraConfig", lora_bias=True),
    "LoRA, tables": adapted(LLAMA, "LoraConfig", target_modules=[*LAYERS[LLAMA], "embed_tokens", "lm_head"]),
    "LoRA, modules_to_save": adapted(LLAMA, "LoraConfig", modules_to_save=["embed_tokens", "lm_head"]),
    "LoRA, tokens": adapted(LLAMA, "LoraConfig", trainable_token_indices=[3, 4, 17]),
    "DoRA of gpt2": adapted(GPT2, "LoraConfig", use_dora=True),
    "DoRA of llama": adapted(LLAMA, "LoraConfig", use_dora=True),
    "AdaLoRA": adapted(LLAMA, "AdaLoraConfig", init_r=4, total_step=10),
    "VeRA": adapted(LLAMA, "VeraConfig"),
    "LoHa": adapted(LLAMA, "LoHaConfig"),
    "LoKr": adapted(LLAMA, "LoKrConfig"),
    "IA3 of gpt2": adapted(
        GPT2, "IA3Config", target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]
    ),
    "IA3 of llama": adapted(
        LLAMA, "IA3Config", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "prompt tuning": adapted(GPT2, "PromptTuningConfig", num_virtual_tokens=4),
    "prefix tuning": adapted(GPT2, "PrefixTuningConfig", num_virtual_tokens=4),
    "prefix tuning of llama": adapted(LLAMA, "PrefixTuningConfig", num_virtual_tokens=4),
    "p-tuning": adapted(GPT2, "PromptEncoderConfig", num_virtual_tokens=4, encoder_hidden_size=8),
}
#: What is not "fused" today: of how many parameter tensors. May only get less.
NOT_FUSED = {
    "LoRA, tokens": {"op": 1},  # rows that are written into a copy of the table
    "AdaLoRA": {"op": 28},  # A times the singular values
    "LoHa": {"batch-1": 56},  # custom autograd functions
    "LoKr": {"op": 28},  # Kronecker products
}


@pytest.mark.parametrize("name", MODELS)
def test_adapters(name):
    model = MODELS[name]()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) < sum(p.numel() for p in model.parameters()) / 2
    with torch.no_grad():
        for p in trained:  # LoRA's B begins at 0: then A's gradients are 0
            p += 0.2 * torch.randn_like(p)
    kind = Kind(MODELS[name], tokens(7))
    model, x = model.double().eval(), kind.inputs()
    y = torch.randint_like(model(x).logits[..., 0], 50).long()
    for got, oracle in zip(importances(kind, model, x, y), oracles(kind, model, x, y), strict=True):
        assert len(got) == len(trained)
        assert all(value.max() > 0 for value in oracle.values())
        # What PEFT and LLaMA do in float32, they do whatever the model's dtype.
        assert_importance(got, oracle, scales=scales(oracle), roundings=64, dtype=torch.float32)
        counts = Counter(path for path, _ in got.report.values())
        assert {path: count for path, count in counts.items() if path != "fused"} == NOT_FUSED.get(name, {}), got.report
