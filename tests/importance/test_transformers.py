"""Hugging Face batches on real (tiny, randomly initialised) models: what the model's own loss compares, we compare."""

import pytest
import torch
from torch import nn

from fastewc import fisher_importance, mas_importance, signal_importance
from fastewc.importance.evaluate import shifts_labels
from fastewc.testing import assert_within_roundings

transformers = pytest.importorskip("transformers", reason="needs transformers, which is not installed")


def tiny(name):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=13, n_positions=9, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
        model = transformers.GPT2LMHeadModel(config)
    elif name == "llama":
        config = transformers.LlamaConfig(vocab_size=13, num_key_value_heads=1, max_position_embeddings=16, **sizes)
        model = transformers.LlamaForCausalLM(config)
    elif name == "bart_decoder":
        config = transformers.BartConfig(
            vocab_size=13, d_model=8, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=8, is_decoder=True,
            is_encoder_decoder=False, max_position_embeddings=16,
        )  # fmt: skip
        model = transformers.BartForCausalLM(config)
    elif name == "bert_masked":
        model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=13, max_position_embeddings=9, **sizes))
    elif name == "bert_classes":
        config = transformers.BertConfig(vocab_size=13, max_position_embeddings=9, num_labels=3, **sizes)
        model = transformers.BertForSequenceClassification(config)
    elif name == "bert_tokens":
        config = transformers.BertConfig(vocab_size=13, max_position_embeddings=9, num_labels=3, **sizes)
        model = transformers.BertForTokenClassification(config)
    elif name == "t5":
        config = transformers.T5Config(
            vocab_size=13,
            d_model=8,
            d_kv=4,
            d_ff=12,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
        model = transformers.T5ForConditionalGeneration(config)
    else:
        config = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=3, **sizes)
        model = transformers.ViTForImageClassification(config)
    return model.double().eval()


def batch_for(name, n=3):
    if name == "vit":
        return {"pixel_values": torch.randn(n, 1, 8, 8, dtype=torch.float64), "labels": torch.randint(0, 3, (n,))}
    ids = torch.randint(1, 13, (n, 5))
    batch = {"input_ids": ids, "attention_mask": torch.ones(n, 5, dtype=torch.long)}
    batch["attention_mask"][1, 3:] = 0
    if name == "bert_classes":
        return batch | {"labels": torch.randint(0, 3, (n,))}
    labels = torch.randint(0, 3, (n, 5)) if name == "bert_tokens" else ids.clone()
    if name == "t5":
        labels = torch.randint(1, 13, (n, 4))
    labels[0, 1] = labels[1, 3:] = -100
    return batch | {"labels": labels}


def cut(batch, i):
    return {key: value[i : i + 1] for key, value in batch.items()}


def by_own_loss(model, batch, counted):
    """(1/N) Σ_n (∂ (mean loss of the model itself · how many positions it averaged))²."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    n = len(batch["labels"])
    total = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in named.items()}
    for i in range(n):
        one = cut(batch, i)
        loss = model(**one).loss * counted(one["labels"])
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for name, grad in zip(named, grads, strict=True):
            if grad is not None:
                total[name] += grad**2 / n
    return total


def assert_importance(got, oracle):
    assert list(got) == list(oracle)
    for name, value in oracle.items():
        scale = torch.full_like(value, value.max().item())
        # GPT-2's and BERT's losses compute log-probabilities in float32, whatever the model's dtype.
        assert_within_roundings(got[name], value, roundings=4000, error_scale=scale, dtype=torch.float32, context=name)


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "bart_decoder", "bert_masked", "bert_classes", "bert_tokens", "t5", "vit"]
)
def test_matches_the_models_own_loss(name):
    model, batch = tiny(name), batch_for(name)
    shift = name in ("gpt2", "llama")
    assert shifts_labels(model) == shift

    def counted(labels):
        return (labels[:, 1:] if shift else labels).ne(-100).sum()

    got = fisher_importance(model, [batch])
    assert_importance(got, by_own_loss(model, batch, counted))
    split = fisher_importance(model, [transformers.BatchEncoding(cut(batch, i)) for i in range(3)])
    assert_importance(split, {n: v.double() for n, v in got.items()})
    assert "labels" in batch


def test_named_loss_sees_the_mask_for_other_labels():
    model, batch = tiny("gpt2"), batch_for("gpt2")
    batch.pop("labels")
    full = mas_importance(model, [batch])
    oracle = {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in model.named_parameters()}
    for i in range(3):
        one = cut(batch, i)
        rows = model(**one).logits[one["attention_mask"] != 0]
        for p, g in zip(
            oracle.values(), torch.autograd.grad(rows.square().sum(), list(model.parameters())), strict=True
        ):
            p += g.abs() / 3
    assert_importance(full, oracle)


def test_predicted_masks_by_labels_too():
    model, batch = tiny("gpt2"), batch_for("gpt2")
    got = fisher_importance(model, [batch], labels="predicted")
    named = dict(model.named_parameters())
    oracle = {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in named.items()}
    for i in range(3):
        one = cut(batch, i)
        labels = one.pop("labels")
        logp = model(**one).logits[:, :-1].log_softmax(-1).max(-1).values
        loss = logp[labels[:, 1:] != -100].sum()
        for n, g in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
            oracle[n] += g**2 / 3
    assert_importance(got, oracle)


def test_shift_only_for_decoders_whose_loss_shifts():
    class GPT2LMHeadModel(nn.Module):  # by name, whoever wrote it
        pass

    class LlavaForConditionalGeneration(nn.Module):
        def __init__(self, encoder_decoder):
            super().__init__()
            self.config = transformers.PretrainedConfig(is_encoder_decoder=encoder_decoder)

    class PeftModel(nn.Module):
        def get_base_model(self):
            return GPT2LMHeadModel()

    assert shifts_labels(GPT2LMHeadModel())
    assert shifts_labels(PeftModel())
    assert shifts_labels(LlavaForConditionalGeneration(False))
    assert not shifts_labels(LlavaForConditionalGeneration(True))
    assert not shifts_labels(nn.Linear(1, 1))


def test_signal_of_gpt2():
    model, batch = tiny("gpt2"), batch_for("gpt2")
    batch.pop("labels")
    keep = batch["attention_mask"].double()[..., None]
    with pytest.raises(NotImplementedError, match="exclude"):
        signal_importance(model, [batch])
    got = signal_importance(model, [batch], exclude=("*wte*", "*wpe*", "*ln_*"))
    seen = {}
    block = model.transformer.h[0]
    hooks = [
        block.mlp.c_fc.register_forward_hook(lambda m, a, out: seen.update(fc=a[0])),
        block.mlp.act.register_forward_hook(lambda m, a, out: seen.update(act=out)),
        block.mlp.c_proj.register_forward_hook(lambda m, a, out: seen.update(proj=out)),
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    inputs = (seen["fc"].abs() * keep).sum((0, 1)) / 3
    wanted = {
        "transformer.h.0.mlp.c_fc.weight": block.mlp.c_fc.weight.detach().abs() * inputs[:, None],
        "transformer.h.0.mlp.c_fc.bias": (seen["act"].abs() * keep).sum((0, 1)) / 3,
        "transformer.h.0.mlp.c_proj.bias": (seen["proj"].abs() * keep).sum((0, 1)) / 3,
    }
    for name, value in wanted.items():
        assert_within_roundings(got[name], value, roundings=200)
    assert not any(m._forward_hooks for m in model.modules())


def test_a_model_without_logits_names_forward():
    config = transformers.BertConfig(
        vocab_size=13, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = transformers.BertModel(config).eval()
    with pytest.raises(TypeError, match="forward"):
        mas_importance(model, [{"input_ids": torch.ones(1, 3, dtype=torch.long)}])
    got = mas_importance(
        model,
        [{"input_ids": torch.ones(1, 3, dtype=torch.long)}],
        forward=lambda m, b: (m(**b).last_hidden_state, None),
    )
    assert got.num_samples == 1
