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
    elif name in ("m2m100", "blenderbot"):
        family = {"m2m100": "M2M100", "blenderbot": "Blenderbot"}[name]
        config = getattr(transformers, f"{family}Config")(
            vocab_size=13, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=16, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
        )  # fmt: skip
        model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
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
    if name in ("t5", "m2m100", "blenderbot"):
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
    largest = max(value.max().item() for value in oracle.values())
    for name, value in oracle.items():
        # The gradient of a key's bias is 0: what is there are the roundings of the others, in whatever order.
        scale = torch.full_like(value, max(value.max().item(), largest * torch.finfo(value.dtype).eps))
        # GPT-2's and BERT's losses compute log-probabilities in float32, whatever the model's dtype.
        assert_within_roundings(got[name], value, roundings=4000, error_scale=scale, dtype=torch.float32, context=name)


@pytest.mark.parametrize(
    "name",
    [
        "gpt2", "llama", "bart_decoder", "bert_masked", "bert_classes", "bert_tokens", "t5", "m2m100", "blenderbot",
        "vit",
    ],
)  # fmt: skip
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


def test_shift_by_the_loss_that_the_forward_calls():
    class ForSomethingNew(transformers.PreTrainedModel):  # a name that says nothing
        def __init__(self, loss_type):
            super().__init__(transformers.PretrainedConfig())
            self.loss_type = loss_type

        def forward(self, labels):
            return self.loss_function(labels)

    class ThatCallsNone(ForSomethingNew):
        loss_function = transformers.loss.loss_utils.ForCausalLMLoss

        def forward(self, labels):
            return labels

    assert shifts_labels(ForSomethingNew(None))  # transformers' default
    assert shifts_labels(ForSomethingNew("ForCausalLM"))
    assert not shifts_labels(ForSomethingNew("ForMaskedLM"))
    encoder_decoder = ForSomethingNew("ForCausalLM")
    encoder_decoder.config.is_encoder_decoder = True
    assert not shifts_labels(encoder_decoder)
    # Its forward does not call the loss, so the default in transformers' base class says nothing.
    assert not shifts_labels(transformers.BertForPreTraining(tiny("bert_masked").config))


def test_idefics_shifts_like_its_own_loss():
    vision = {
        "embed_dim": 8,
        "image_size": 8,
        "patch_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    config = transformers.IdeficsConfig(
        vocab_size=13, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        cross_layer_interval=1, additional_vocab_size=0, use_resampler=False, max_position_embeddings=16,
        pad_token_id=0, vision_config=vision,
    )  # fmt: skip
    model = transformers.IdeficsForVisionText2Text(config).double().eval()
    ids = torch.randint(1, 13, (2, 6))
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 1, 3, 8, 8, dtype=torch.float64),
        "image_attention_mask": torch.ones(2, 6, 1, dtype=torch.long),
        "labels": ids,
    }
    got = fisher_importance(model, [batch])
    assert_importance(got, by_own_loss(model, batch, lambda labels: labels[:, 1:].numel()))


def test_uint8_labels_shift_too():
    model, batch = tiny("gpt2"), batch_for("gpt2")
    batch["labels"] = batch["labels"].clamp(min=0)
    wanted = fisher_importance(model, [batch])
    got = fisher_importance(model, [batch | {"labels": batch["labels"].to(torch.uint8)}])
    assert_importance(got, {n: v.double() for n, v in wanted.items()})


def decoder_batch():
    return {
        "input_ids": torch.randint(1, 13, (2, 5)),
        "attention_mask": torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]),
        "decoder_input_ids": torch.randint(1, 13, (2, 5)),
        "decoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]),
    }


@pytest.mark.parametrize("masked", [True, False])
def test_an_encoders_mask_does_not_mask_the_decoders_output(masked):
    model, batch = tiny("t5"), decoder_batch()  # source and target of one length: shapes would not tell
    if not masked:
        batch.pop("decoder_attention_mask")
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    oracle = {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in named.items()}
    for i in range(2):
        one = cut(batch, i)
        keep = one.get("decoder_attention_mask", torch.ones(1, 5))
        norm = model(**one).logits[keep != 0].square().sum()
        for n, g in zip(named, torch.autograd.grad(norm, list(named.values())), strict=True):
            oracle[n] += g.abs() / 2
    assert_importance(mas_importance(model, [batch]), oracle)


def test_an_encoders_mask_masks_the_encoder_in_signal():
    model, batch = tiny("t5"), decoder_batch()
    exclude = ("shared.*", "*norm*", "*relative_attention_bias*")
    with pytest.raises(NotImplementedError, match="same length"):
        signal_importance(model, [batch], exclude=exclude)
    batch["decoder_input_ids"] = batch["decoder_input_ids"][:, :4]
    batch["decoder_attention_mask"] = batch["decoder_attention_mask"][:, 1:]
    got = signal_importance(model, [batch], exclude=exclude)
    for side, mask in (("encoder", "attention_mask"), ("decoder", "decoder_attention_mask")):
        seen = []
        layer = getattr(model, side).block[0].layer[0].SelfAttention.q
        handle = layer.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0]))
        with torch.no_grad():
            model(**batch)
        handle.remove()
        inputs = (seen[0].abs() * batch[mask][..., None]).sum((0, 1)) / 2
        name = f"{side}.block.0.layer.0.SelfAttention.q.weight"
        assert_within_roundings(got[name], layer.weight.detach().abs() * inputs, roundings=200, context=name)


def test_decoder_inputs_that_cannot_be_made():
    class Translator(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(1, 3)
            self.config = transformers.PretrainedConfig(is_encoder_decoder=True)

        def forward(self, input_ids, decoder_input_ids=None):
            ids = input_ids if decoder_input_ids is None else decoder_input_ids
            return self.lin(ids[..., None].float())

    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.zeros(2, 4, dtype=torch.long)}
    with pytest.raises(ValueError, match=r"decoder_input_ids.*forward"):
        fisher_importance(Translator(), [batch])
    assert fisher_importance(Translator(), [batch | {"decoder_input_ids": batch["labels"]}]).num_samples == 2
    classes = {"input_ids": batch["input_ids"], "labels": torch.zeros(2, dtype=torch.long)}
    assert (
        fisher_importance(Translator(), [classes], lambda out, y: out.logsumexp(-1).sum(1)).num_samples == 2
    )  # labels of whole samples are no decoder's


def test_activations_written_out_by_transformers():
    from transformers.activations import ACT2FN

    layer, x = nn.Linear(3, 4).double(), 3 * torch.randn(5, 3, dtype=torch.float64)
    for name in ("gelu_new", "relu2", "quick_gelu", "gelu_10", "laplace"):
        model = nn.Sequential(layer, ACT2FN[name]).double().eval()
        got = signal_importance(model, [x])
        with torch.no_grad():
            assert_within_roundings(got["0.bias"], model(x).abs().mean(0), roundings=200, context=name)


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
