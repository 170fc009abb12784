"""Whole models as people use them, small and with random weights: every parameter's importances against autograd.

Nothing is downloaded. A model does here what it does in its library; only its sizes are our own.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastewc import fisher_importance, mas_importance
from tests.per_sample.checking import assert_importance, naive, with_statistics

models = pytest.importorskip("torchvision.models", reason="needs torchvision, which is not installed")
transformers = pytest.importorskip("transformers", reason="needs transformers, which is not installed")

#: What is not "fused" today: of how many parameter tensors, or the error that a model ends in. May only get less.
NOT_FUSED: dict[str, dict[str, int] | str] = {}
N, VOCABULARY = 3, 50


def images(size):
    return lambda: torch.randn(N, 3, size, size, dtype=torch.float64)


def tokens(length):
    return lambda: torch.randint(3, VOCABULARY, (N, length))


@dataclasses.dataclass
class Kind:
    """A model, its inputs, and the likelihood of its output; ``call`` where its output is no tensor with N first."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], torch.Tensor]
    call: Callable[[nn.Module, torch.Tensor], torch.Tensor] | None = None
    loss: str = "categorical"


# ── images ──


def small(cls, *args, **options):
    return lambda: cls(*args, **options)


def conv_next():
    block = models.convnext.CNBlockConfig
    return models.convnext.ConvNeXt([block(8, 16, 1), block(16, None, 2)], num_classes=7)


def swin_v2():
    swin = models.swin_transformer
    return swin.SwinTransformer(
        [2, 2], 8, [1, 1], [2, 2], [4, 4], num_classes=7, block=swin.SwinTransformerBlockV2,
        downsample_layer=swin.PatchMergingV2,
    )  # fmt: skip


def pyramid():
    """A detector's backbone: stem and first stage are frozen, and so are all BatchNorms."""
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    return resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=3)


def mobile(*, fpn=False):
    """MobileNetV2 with all BatchNorms trained, as a detector's backbone or the outputs of two of its stages."""
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.detection.backbone_utils import mobilenet_backbone

    if fpn:
        return mobilenet_backbone(
            backbone_name="mobilenet_v2", weights=None, fpn=True, trainable_layers=6, norm_layer=nn.BatchNorm2d
        )
    net = models.mobilenet_v2(weights=None, width_mult=0.25)
    return IntermediateLayerGetter(net.features, {"13": "aux", "17": "out"})


def fcn():
    head = models.segmentation.fcn.FCNHead
    return models.segmentation.FCN(mobile(), head(80, 4), head(24, 4))


def deep_lab():
    head = models.segmentation.deeplabv3.DeepLabHead(80, 4, (2, 3))
    return models.segmentation.DeepLabV3(mobile(), head, models.segmentation.fcn.FCNHead(24, 4))


def maps(model, x):
    return torch.cat([found.movedim(1, -1) for found in model(x).values()], 1)


class Head(nn.Module):
    """A detector's head over three levels of feature maps."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return self.head([x, F.avg_pool2d(x, 2), F.avg_pool2d(x, 4)])


def retina_net(name):
    from torchvision.models.detection import retinanet

    sizes = (8, 3, 4) if name == "RetinaNetClassificationHead" else (8, 3)
    return Head(getattr(retinanet, name)(*sizes, norm_layer=lambda channels: nn.GroupNorm(2, channels)))


def fcos():
    from torchvision.models.detection.fcos import FCOSHead

    return Head(FCOSHead(64, 2, 4, num_convs=2))


def rpn():
    from torchvision.models.detection.rpn import RPNHead

    return Head(RPNHead(8, 3))


def parts(model, x):
    found = model(x)
    found = found.values() if isinstance(found, dict) else [part for level in found for part in level]
    return torch.cat([part.flatten(1) for part in found], 1)


def features(channels):
    return lambda: torch.randn(N, channels, 8, 8, dtype=torch.float64)


def levels(model, x):
    return torch.cat([level.flatten(1) for level in model(x).values()], 1)


IMAGES = {
    "resnet18": Kind(small(models.resnet18, num_classes=7), images(32)),
    "mobilenet_v3_small": Kind(small(models.mobilenet_v3_small, num_classes=7), images(32)),
    "efficientnet_b0": Kind(small(models.efficientnet_b0, num_classes=7), images(32)),
    "convnext": Kind(conv_next, images(32)),
    "densenet": Kind(small(models.DenseNet, 4, (2, 2), 8, 2, num_classes=7), images(32)),
    "vision_transformer": Kind(small(models.VisionTransformer, 16, 8, 2, 2, 16, 32, num_classes=7), images(16)),
    "swin_v2": Kind(swin_v2, images(32)),
    "maxvit": Kind(
        small(models.MaxVit, (32, 32), 8, 4, [8, 16], [1, 1], 8, 0.0, num_classes=7), images(32)
    ),
    "lraspp": Kind(
        small(models.segmentation.lraspp_mobilenet_v3_large, weights=None, weights_backbone=None, num_classes=4),
        images(32), lambda m, x: m(x)["out"].movedim(1, -1),
    ),
    "fcn": Kind(fcn, images(64), maps),
    "deeplabv3": Kind(deep_lab, images(64), maps),
    "resnet_fpn_backbone": Kind(pyramid, images(32), levels, "gaussian"),
    "mobilenet_fpn_backbone": Kind(small(mobile, fpn=True), images(32), levels, "gaussian"),
    "retinanet_classes": Kind(small(retina_net, "RetinaNetClassificationHead"), features(8)),
    "retinanet_boxes": Kind(small(retina_net, "RetinaNetRegressionHead"), features(8), loss="gaussian"),
    "fcos_head": Kind(fcos, features(64), parts, "gaussian"),
    "rpn_head": Kind(rpn, features(8), parts, "gaussian"),
    "shufflenet": Kind(small(models.shufflenet_v2_x0_5, num_classes=7), images(32)),
    "regnet": Kind(small(models.regnet_y_400mf, num_classes=7), images(32)),
}  # fmt: skip


# ── transformers ──


DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENCODER = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 40,
}  # fmt: skip
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def pretrained(model, config, attention="sdpa", **sizes):
    """A Hugging Face model of a configuration."""

    def make():
        made = getattr(transformers, config)(**sizes)
        if attention is not None:
            made._attn_implementation = attention
        return getattr(transformers, model)(made)

    return make


def causal(name, attention="sdpa", config=None, **sizes):
    config = config or f"{name}Config"
    return Kind(pretrained(f"{name}ForCausalLM", config, attention, **DECODER, **sizes), tokens(7))


def translate(model, ids):
    return model(input_ids=ids, decoder_input_ids=ids.flip(1)[:, :5]).logits


def transcribe(model, features):
    ids = (features[:, 0, :5].abs() * 7).long() + 3
    return model(input_features=features, decoder_input_ids=ids).logits


TRANSFORMERS = {
    "gpt2": Kind(
        pretrained(
            "GPT2LMHeadModel", "GPT2Config", vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32,
            bos_token_id=1, eos_token_id=2,
        ),
        tokens(7),
    ),
    "llama": causal("Llama"),
    "mistral": causal("Mistral"),
    "qwen2": causal("Qwen2"),
    "qwen3": causal("Qwen3", head_dim=8),
    "gemma": causal("Gemma", "eager", head_dim=8),
    "gemma 3": causal("Gemma3", "eager", "Gemma3TextConfig", head_dim=8),
    "bert": Kind(pretrained("BertForSequenceClassification", "BertConfig", num_labels=5, **ENCODER), tokens(7)),
    "bert, masked": Kind(pretrained("BertForMaskedLM", "BertConfig", **ENCODER), tokens(7)),
    "roberta": Kind(
        pretrained("RobertaForSequenceClassification", "RobertaConfig", num_labels=5, **ENCODER), tokens(7)
    ),
    "t5": Kind(
        pretrained(
            "T5ForConditionalGeneration", "T5Config", vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2,
            num_heads=2, decoder_start_token_id=0,
        ),
        tokens(7), translate,
    ),
    "vit": Kind(
        pretrained(
            "ViTForImageClassification", "ViTConfig", hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=24, image_size=16, patch_size=8, num_labels=5,
        ),
        images(16),
    ),
    "whisper": Kind(
        pretrained(
            "WhisperForConditionalGeneration", "WhisperConfig", vocab_size=VOCABULARY, d_model=16, encoder_layers=2,
            decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
            decoder_ffn_dim=24, num_mel_bins=8, max_source_positions=10, max_target_positions=20, suppress_tokens=None,
            begin_suppress_tokens=None, **SPECIAL,
        ),
        lambda: torch.randn(N, 8, 20, dtype=torch.float64), transcribe,
    ),
    "mamba": Kind(
        pretrained(
            "MambaForCausalLM", "MambaConfig", None, vocab_size=VOCABULARY, hidden_size=16, state_size=4,
            num_hidden_layers=2, time_step_rank=4,
        ),
        tokens(7),
    ),
}  # fmt: skip


# ── torch's own ──


class Translator(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)
        self.transformer = nn.Transformer(16, 2, 2, 2, 32, batch_first=True)

    def forward(self, ids):
        return self.out(self.transformer(self.table(ids), self.table(ids.flip(1))))


class Recurrent(nn.Module):
    """A language model of two layers."""

    def __init__(self, cls, **options):
        super().__init__()
        self.table, self.layers = nn.Embedding(VOCABULARY, 6), cls(6, 8, 2, batch_first=True, **options)
        width = options.get("proj_size", 8) * (2 if options.get("bidirectional") else 1)
        self.out = nn.Linear(width, VOCABULARY)

    def forward(self, ids):
        return self.out(self.layers(self.table(ids))[0])


class Packed(nn.Module):
    """Sequences of different lengths, told apart by their last state."""

    def __init__(self):
        super().__init__()
        self.table, self.layer, self.out = nn.Embedding(VOCABULARY, 6), nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 5)

    def forward(self, ids):
        lengths = ids[:, 0] % ids.shape[1] + 1
        packed = nn.utils.rnn.pack_padded_sequence(self.table(ids), lengths, batch_first=True, enforce_sorted=False)
        return self.out(self.layer(packed)[1][0][-1])


class Cells(nn.Module):
    """One cell, step by step."""

    def __init__(self, cls):
        super().__init__()
        self.table, self.cell, self.out = nn.Embedding(VOCABULARY, 6), cls(6, 8), nn.Linear(8, VOCABULARY)

    def forward(self, ids):
        state, outputs = None, []
        for step in self.table(ids).unbind(1):
            state = self.cell(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return self.out(torch.stack(outputs, 1))


TORCH = {
    "nn.Transformer": Kind(Translator, tokens(5)),
    "lstm": Kind(small(Recurrent, nn.LSTM), tokens(5)),
    "lstm, bidirectional": Kind(small(Recurrent, nn.LSTM, bidirectional=True), tokens(5)),
    "lstm, proj_size": Kind(small(Recurrent, nn.LSTM, proj_size=5), tokens(5)),
    "lstm, packed": Kind(Packed, tokens(5)),
    "gru": Kind(small(Recurrent, nn.GRU), tokens(5)),
    "rnn": Kind(small(Recurrent, nn.RNN), tokens(5)),
    "LSTMCell": Kind(small(Cells, nn.LSTMCell), tokens(5)),
    "GRUCell": Kind(small(Cells, nn.GRUCell), tokens(5)),
    "RNNCell": Kind(small(Cells, nn.RNNCell), tokens(5)),
}
ZOO = {**IMAGES, **TRANSFORMERS, **TORCH}

#: They do part of their arithmetic in float32, whatever their dtype.
SINGLE = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma 3", "t5", "mamba"}
#: Softmax does not see a key's bias: its gradient is 0, and what is computed is the roundings of others.
CANCELS = ("key.bias", "k_proj.bias")


def randomised(model):
    """Other weights for norms, biases and last layers, that begin as all the same number, and for tables next to 0."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if bool((p == p.flatten()[0]).all()) or name.endswith("bias_table"):
                p += 0.2 * torch.randn_like(p)
    return with_statistics(model).double().eval()


def scales(oracle):
    """A parameter's entries are as wrong as roundings of its largest one."""
    largest = max(value.max() for value in oracle.values())
    return {name: largest if name.endswith(CANCELS) else value.max() for name, value in oracle.items()}


def call(kind, model, x):
    found = model(x) if kind.call is None else kind.call(model, x)
    return getattr(found, "logits", found)


def target_of(kind, output):
    if kind.loss == "gaussian":
        return torch.randn_like(output)
    return torch.randint(output.shape[-1], output.shape[:-1])


def oracles(kind, model, x, y):
    """Fisher's and MAS' sums by autograd, from one sample at a time."""

    def log_loss(i):
        out = call(kind, model, x[i : i + 1])
        if kind.loss == "gaussian":
            return [(1.0, 0.5 * (out - y[i : i + 1]).square().sum())]
        return [(1.0, F.cross_entropy(out.flatten(0, -2), y[i : i + 1].flatten(), reduction="sum"))]

    fisher = naive(model, log_loss, N)
    return fisher, naive(model, lambda i: [(1.0, call(kind, model, x[i : i + 1]).square().sum())], N, power=1)


def importances(kind, model, x, y):
    def forward(m, batch):
        return call(kind, m, batch[0]), (batch[1] if len(batch) > 1 else None)

    own = {} if kind.call is None else {"forward": forward}
    return fisher_importance(model, [(x, y)], loss=kind.loss, **own), mas_importance(model, [(x,)], **own)


@pytest.mark.parametrize("name", ZOO)
def test_model(name):
    kind, wanted = ZOO[name], NOT_FUSED.get(name, {})
    model, x = randomised(kind.make()), kind.inputs()
    with torch.no_grad():
        y = target_of(kind, call(kind, model, x))
    if isinstance(wanted, str):
        with pytest.raises(RuntimeError, match=wanted):
            importances(kind, model, x, y)
        return
    roundings = {"roundings": 64, "dtype": torch.float32} if name in SINGLE else {"roundings": 4000}
    for got, oracle in zip(importances(kind, model, x, y), oracles(kind, model, x, y), strict=True):
        assert_importance(got, oracle, scales=scales(oracle), **roundings)
        counts = Counter(path for path, _ in got.report.values())
        assert {path: count for path, count in counts.items() if path != "fused"} == wanted, got.report
