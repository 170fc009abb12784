"""SIG (E8): hand-worked numbers, and the definition written out with loops."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastewc import signal_importance
from fastewc.testing import assert_within_roundings


def near(got, wanted):
    assert_within_roundings(got, wanted.double(), roundings=200)


def by_loops(conv, x):
    """Σ_n Σ_positions |w · a| of a convolution, one weight at a time: a convolution with only that weight."""
    total = torch.zeros_like(conv.weight, dtype=torch.float64)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in conv.weight.shape)):
        single = torch.zeros_like(conv.weight)
        single[tuple(index)] = conv.weight[tuple(index)]
        with torch.no_grad():
            out = torch.func.functional_call(conv, {"weight": single, "bias": torch.zeros_like(conv.bias)}, (x,))
        total[tuple(index)] = out.double().abs().sum() / len(x)
    return total


def test_linear_by_hand():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0], [0.5, 1.0]]))
        model[0].bias.copy_(torch.tensor([0.5, -3.0]))
        model[2].weight.copy_(torch.tensor([[2.0, -1.0]]))
        model[2].bias.fill_(-10.0)
    x = torch.tensor([[1.0, -1.0], [-3.0, 0.0]])
    got = signal_importance(model, [x])
    # mean |x| = (2, ½); hidden: (1+2+½, ½−1−3) = (3.5, −3.5) and (−3+½, −1.5−3) = (−2.5, −4.5);
    # after ReLU (3.5, 0) and (0, 0).
    assert got["0.weight"].tolist() == [[2.0, 1.0], [1.0, 0.5]]
    assert got["0.bias"].tolist() == [1.75, 0.0]
    assert got["2.weight"].tolist() == [[3.5, 0.0]]
    assert got["2.bias"].tolist() == [(3.0 + 10.0) / 2]  # |7 − 10|, |0 − 10|: no activation follows
    assert (got.method, got.num_samples) == ("signal", 2)
    assert {path for path, _ in got.report.values()} == {"op"}


@pytest.mark.parametrize(
    "activation", [nn.ReLU(inplace=True), nn.LeakyReLU(0.1), nn.Sigmoid(), nn.GELU(), nn.SiLU(True)]
)
def test_activation_behind_norm_identity_and_dropout(activation):
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Identity(), nn.LayerNorm(4), nn.Dropout(0.5), activation, nn.Linear(4, 2)
    ).eval()
    x = torch.randn(6, 3)
    got = signal_importance(model, [x[:4], x[4:]], exclude="2.*")
    with torch.no_grad():
        near(got["0.bias"], model[:5](x).double().abs().mean(0))
        near(got["5.bias"], model(x).double().abs().mean(0))
        near(got["5.weight"], model[5].weight.double().abs() * model[:5](x).double().abs().mean(0))


def test_reshapes_in_between_change_nothing():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.conv = nn.Linear(3, 4), nn.Conv1d(4, 2, 2)
            self.norm = nn.BatchNorm1d(4, affine=False)

        def forward(self, x):
            h = torch.relu(self.norm(self.lin(x).transpose(1, 2)))
            return self.conv(h).flatten(1).tanh()

    model, x = Tokens().eval(), torch.randn(3, 5, 3)
    got = signal_importance(model, [x])
    with torch.no_grad():
        hidden = torch.relu(model.norm(model.lin(x).transpose(1, 2)))
        near(got["lin.bias"], hidden.double().abs().sum((0, 2)) / 3)
        near(got["conv.bias"], model.conv(hidden).tanh().double().abs().sum((0, 2)) / 3)


def test_strided_reshapes():
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.conv = nn.Linear(3, 4), nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)

        def forward(self, tokens, image):
            flat = self.conv(image).permute(0, 2, 3, 1).view(len(image), -1, 3)
            return torch.relu(self.lin(tokens).T), torch.relu(flat)

    model, tokens = Transposed(), torch.randn(2, 3)
    image = torch.randn(2, 2, 5, 5).to(memory_format=torch.channels_last)
    got = signal_importance(model, [(tokens, image)], forward=lambda m, b: (m(*b), None))
    with torch.no_grad():
        a, b = model(tokens, image)
        near(got["lin.bias"], a.double().sum(1) / 2)
        near(got["conv.bias"], b.double().sum((0, 1)) / 2)


def test_without_a_direct_activation_the_output_itself_counts():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(3, 3)

        def forward(self, x):
            h = self.lin(x)
            h += x  # changes the layer's output in place: no longer "directly"
            return torch.relu(h)

    model, x = Residual(), torch.randn(5, 3)
    with torch.no_grad():
        near(signal_importance(model, [x])["lin.bias"], model.lin(x).double().abs().mean(0))


@pytest.mark.parametrize(
    "activation",
    [
        torch.square, torch.atan, torch.sinh, torch.abs, F.softsign, lambda h: h**2, lambda h: h.pow(3),
        lambda h: torch.clip(h, 0, 1), lambda h: h.clamp_max(0), lambda h: h.clamp_min(0), lambda h: h.sigmoid_(),
    ],
)  # fmt: skip
def test_functional_activations(activation):
    class Model(nn.Linear):
        def forward(self, x):
            return activation(super().forward(x)) @ torch.ones(4, 2)

    model, x = Model(3, 4), torch.randn(5, 3)
    with torch.no_grad():
        near(signal_importance(model, [x])["bias"], activation(F.linear(x, model.weight, model.bias)).abs().mean(0))


def write_through_a_view(h):
    h[:, :1] += 5
    return torch.relu(h)


def write_through_another_view(h):
    view = h.view(-1)
    view += 5
    return torch.relu(h)


@pytest.mark.parametrize(
    "behind",
    [
        lambda h: h * torch.sigmoid(h),  # a hand-written SiLU
        lambda h: torch.sigmoid(h) * h,
        lambda h: h * F.softplus(h).tanh(),
        lambda h: torch.where(h > 0, h, 0.1 * h),
        lambda h: h + torch.relu(h),
        lambda h: torch.relu(F.layer_norm(h, (4,))) + h,
        lambda h: torch.relu(h) + torch.tanh(h),
        write_through_a_view,
        write_through_another_view,
    ],
)
def test_with_another_reader_the_output_itself_counts(behind):
    class Model(nn.Linear):
        def forward(self, x):
            return behind(super().forward(x)).sum(-1, keepdim=True)

    model, x = Model(3, 4), torch.randn(5, 3)
    with torch.no_grad():
        near(signal_importance(model, [x])["bias"], F.linear(x, model.weight, model.bias).double().abs().mean(0))


def test_shapes_and_dtypes_are_no_readers():
    class Model(nn.Linear):
        def forward(self, x):
            assert self.weight.dtype == x.dtype
            assert self.weight.size(1) == self.weight.shape[1] == x.shape[-1]
            h = super().forward(x.to(self.weight.device))
            assert h.size() == (*x.shape[:-1], h.shape[-1])
            return torch.relu(h.to(h.dtype).contiguous())

    model, x = Model(3, 4), torch.randn(5, 3)
    with torch.no_grad():
        near(signal_importance(model, [x])["bias"], model(x).double().abs().mean(0))


@pytest.mark.parametrize("read", [lambda p: p.item(), lambda p: p.tolist(), float, lambda p: p.detach().numpy().item()])
def test_a_parameter_read_as_a_number_is_a_use(read):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.scale = nn.Linear(3, 3), nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return self.lin(x) * read(self.scale)

    with pytest.raises(NotImplementedError, match="'scale'"):
        signal_importance(Scaled(), [torch.randn(2, 3)])


def test_all_offending_parameters_are_named_at_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.PReLU(), nn.Linear(3, 2))
    with pytest.raises(NotImplementedError, match=r"exclude=\['1\.weight', '1\.bias', '2\.weight'\]"):
        signal_importance(model, [torch.randn(2, 3)])
    assert signal_importance(model, [torch.randn(2, 3)], exclude=["1.weight", "1.bias", "2.weight"]).num_samples == 2


class Convolved(nn.Module):
    """A causal convolution over time behind a linear layer; time first or batch first inside."""

    def __init__(self, stride=1):
        super().__init__()
        self.lin, self.conv = nn.Linear(3, 2), nn.Conv1d(2, 4, 3, stride)

    def forward(self, inputs_embeds, attention_mask=None):
        h = self.lin(inputs_embeds.transpose(0, 1)).permute(1, 2, 0)  # [T, N, ·] inside
        return torch.relu(self.conv(F.pad(h, (2, 0)))).transpose(1, 2)


@pytest.mark.parametrize("steps", [5, 3], ids=["T=5", "T=N"])
def test_masks_of_convolutions_and_of_time_first_layers(steps):
    model, x = Convolved(), torch.randn(3, steps, 3)
    keep = torch.ones(3, steps, dtype=torch.long)
    keep[0, 2:] = keep[1, 1:] = 0
    got = signal_importance(model, [{"inputs_embeds": x, "attention_mask": keep}])
    labelled = signal_importance(model, [(x, keep * 101 - 100)])
    with torch.no_grad():
        windows = F.pad(model.lin(x).double().transpose(1, 2), (2, 0)).unfold(2, 3, 1)  # [N, I, T, K]
        met = (windows.abs() * keep[:, None, :, None]).sum((0, 2)) / 3
        wanted = {
            "lin.weight": model.lin.weight.double().abs() * (x.double().abs() * keep[..., None]).sum((0, 1)) / 3,
            "lin.bias": (model.lin(x).double().abs() * keep[..., None]).sum((0, 1)) / 3,
            "conv.weight": model.conv.weight.double().abs() * met,
            "conv.bias": (model(x).double() * keep[..., None]).sum((0, 1)) / 3,
        }
    for name, value in wanted.items():
        near(got[name], value)
        near(labelled[name], value)


def test_a_mask_that_a_convolution_cannot_take():
    model, x = Convolved(stride=2), torch.randn(3, 5, 3)
    keep = torch.ones(3, 5, dtype=torch.long)
    batch = {"inputs_embeds": x, "attention_mask": keep}
    for name, value in signal_importance(model, [batch]).items():
        near(value, signal_importance(model, [x])[name].double())
    keep[1, 3:] = 0
    with pytest.raises(NotImplementedError, match="convolution"):
        signal_importance(model, [batch])
    assert signal_importance(model, [batch], exclude="conv.*").num_samples == 3


def test_segmentation_labels_mask_a_convolution():
    model, x = nn.Conv2d(2, 3, 1), torch.randn(2, 2, 3, 4)
    y = torch.zeros(2, 3, 4, dtype=torch.long)
    y[0, 1] = -100
    keep = (y != -100)[:, None]
    got = signal_importance(model, [(x, y)])
    with torch.no_grad():
        near(got["bias"], (model(x).double().abs() * keep).sum((0, 2, 3)) / 2)
        inputs = (x.double().abs() * keep).sum((0, 2, 3)) / 2
        near(got["weight"], model.weight.double().abs() * inputs[:, None, None])


def test_softmax_counts_only_where_it_is_returned():
    x = torch.randn(5, 3)
    returned = nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1))
    inside = nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1), nn.Linear(4, 2))
    with torch.no_grad():
        near(signal_importance(returned, [x])["0.bias"], returned(x).double().mean(0))
        near(signal_importance(inside, [x])["0.bias"], inside[0](x).double().abs().mean(0))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1), (3, 2, 7, 6)),
        (lambda: nn.Conv2d(4, 4, 2, groups=2, dilation=2), (2, 4, 5, 5)),
        (lambda: nn.Conv2d(2, 2, 3, padding="same", padding_mode="circular"), (2, 2, 4, 4)),
        (lambda: nn.Conv1d(2, 3, 3, padding="same"), (2, 2, 6)),
        (lambda: nn.Conv3d(1, 2, 2), (2, 1, 3, 3, 3)),
        (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1), (2, 2, 4)),
        (lambda: nn.ConvTranspose2d(4, 2, 3, stride=2, groups=2, padding=1), (2, 4, 3, 3)),
    ],
)  # fmt: skip
def test_convolutions(make, shape):
    conv, x = make(), torch.randn(shape)
    got = signal_importance(conv, [x[:1], x[1:]])
    near(got["weight"], by_loops(conv, x))
    with torch.no_grad():
        near(got["bias"], conv(x).double().abs().transpose(0, 1).flatten(1).sum(1) / len(x))


def test_conv_batchnorm_activation():
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.LeakyReLU(0.01), nn.MaxPool2d(2)).eval()
    model[1].running_mean.normal_()
    x = torch.randn(4, 1, 5, 5)
    with pytest.raises(NotImplementedError, match=r"'1\.weight'"):
        signal_importance(model, [x])
    got = signal_importance(model, [x], exclude="1.*")
    with torch.no_grad():
        near(got["0.bias"], model[:3](x).double().abs().sum((0, 2, 3)) / 4)


def test_uses_add_up():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(3, 3)

        def forward(self, x):
            return F.linear(torch.tanh(self.lin(x)), self.lin.weight)

    model, x = Twice(), torch.randn(5, 3)
    with torch.no_grad():
        hidden = torch.tanh(model.lin(x)).double().abs()
        wanted = model.lin.weight.double().abs() * (x.double().abs() + hidden).mean(0)
        got = signal_importance(model, [x])
        near(got["lin.weight"], wanted)
        near(got["lin.bias"], hidden.mean(0))


def test_addmm_has_its_weight_the_other_way_round():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))

        def forward(self, x):
            return torch.addmm(self.bias, x.view(-1, 3), self.weight).view(*x.shape[:-1], 4)

    model, x = Conv1D(), torch.randn(2, 5, 3)
    got = signal_importance(model, [x])
    with torch.no_grad():
        near(got["weight"], model.weight.double().abs() * x.double().abs().sum((0, 1))[:, None] / 2)
        near(got["bias"], model(x).double().abs().sum((0, 1)) / 2)


def test_positions_that_do_not_count():
    class Tokens(nn.Module):
        def __init__(self, flat):
            super().__init__()
            self.lin, self.flat = nn.Linear(3, 4), flat

        def forward(self, inputs_embeds, attention_mask=None):
            h = inputs_embeds.view(-1, 3) if self.flat else inputs_embeds
            return {"logits": torch.relu(self.lin(h)).view(*inputs_embeds.shape[:-1], 4)}

    x, keep = torch.randn(2, 3, 3), torch.tensor([[1, 1, 0], [1, 0, 0]])
    for flat in (False, True):
        model = Tokens(flat)
        batch = {"inputs_embeds": x, "attention_mask": keep}
        labelled = batch | {"attention_mask": torch.ones_like(keep), "labels": keep * 101 - 100}
        for data in ([batch], [labelled]):
            got = signal_importance(model, data)
            inputs = (x.double().abs() * keep[..., None]).sum((0, 1)) / 2
            with torch.no_grad():
                near(got["lin.weight"], model.lin.weight.double().abs() * inputs)
                act = model(x)["logits"].double() * keep[..., None]
            near(got["lin.bias"], act.sum((0, 1)) / 2)


def test_samples_that_do_not_count_stay_in_n():
    model, x = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Flatten(), nn.Linear(6, 2)), torch.randn(5, 1, 4)
    y = torch.tensor([-100, 1, 0, -100, 1])
    got, kept = signal_importance(model, [(x, y)]), signal_importance(model, [x[y != -100]])
    assert got.num_samples == 5
    for name in got:
        near(got[name], kept[name].double() * 3 / 5)


def test_forward_and_max_samples():
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    got = signal_importance(
        model, [(x[:2], x[:2], 0), (x[2:], x[2:], 0)], max_samples=4, forward=lambda m, b: (m(b[1]), None)
    )
    assert got.num_samples == 4
    near(got["weight"], model.weight.detach().double().abs() * x[:4].double().abs().mean(0))


@pytest.mark.parametrize(
    ("model", "x", "name"),
    [
        (nn.Embedding(5, 3), torch.tensor([[1, 2]]), "weight"),
        (nn.LSTM(3, 2, batch_first=True), torch.randn(2, 4, 3), "weight_ih_l0"),
        (nn.Sequential(nn.Linear(3, 3), nn.PReLU()), torch.randn(2, 3), "1.weight"),
        (nn.Bilinear(3, 3, 2), torch.randn(2, 3), "weight"),
    ],
)
def test_other_layers_raise(model, x, name):
    if isinstance(model, nn.LSTM | nn.Bilinear):
        lstm = isinstance(model, nn.LSTM)
        call = (lambda m, b: (m(b)[0], None)) if lstm else (lambda m, b: (m(b, b), None))
    else:
        call = None
    with pytest.raises(NotImplementedError, match=f"'{name}'.*exclude"):
        signal_importance(model, [x], forward=call)


def test_raw_uses_of_a_parameter_raise():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.scale = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.lin(x) * self.scale

    with pytest.raises(NotImplementedError, match="'scale'"):
        signal_importance(Raw(), [torch.randn(2, 3)])
    assert list(signal_importance(Raw(), [torch.randn(2, 3)], exclude="scale")) == ["lin.weight", "lin.bias"]


def test_unused_and_frozen():
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
    model["a"].bias.requires_grad_(False)
    got = signal_importance(model, [torch.randn(2, 3)], forward=lambda m, x: (m["a"](x), None))
    assert got.report["b.weight"][0] == "unused"
    assert got["b.weight"].count_nonzero() == 0
    assert "a.bias" not in got


def test_bf16_and_float64():
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        model, x = nn.Linear(3, 2).to(dtype), torch.randn(4, 3, dtype=dtype)
        got = signal_importance(model, [x])
        assert got["weight"].dtype == wide
        near(got["weight"], model.weight.detach().double().abs() * x.double().abs().mean(0))
