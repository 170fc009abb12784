"""Convolutions of every kind, and the nets around them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.per_sample.checking import Lambda, assert_exact, floats, weight, with_statistics

GRID, LINE, CUBE = floats(5, 4, 7, 6), floats(5, 4, 9), floats(5, 4, 4, 5, 4)
CONV = {
    "1d": (lambda: nn.Conv1d(4, 6, 3), LINE),
    "1d stride": (lambda: nn.Conv1d(4, 6, 2, stride=3, padding=1, dilation=2), LINE),
    "2d": (lambda: nn.Conv2d(4, 6, 3), GRID),
    "2d uneven": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 0), dilation=(1, 2)), GRID),
    "2d remainder": (lambda: nn.Conv2d(4, 6, 2, stride=4), GRID),
    "2d 1x1": (lambda: nn.Conv2d(4, 6, 1), GRID),
    "2d groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), GRID),
    "2d depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), GRID),
    "2d depthwise multiplied": (lambda: nn.Conv2d(4, 8, 3, groups=4, stride=2), GRID),
    "2d same": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), GRID),
    "2d same, even kernel": (lambda: nn.Conv2d(4, 6, (2, 4), padding="same"), GRID),
    "1d same, even kernel": (lambda: nn.Conv1d(4, 6, 4, padding="same", groups=2), LINE),
    "2d valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid", bias=False), GRID),
    "2d circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), GRID),
    "2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"), GRID),
    "2d replicate, same": (lambda: nn.Conv2d(4, 6, 2, padding="same", padding_mode="replicate"), GRID),
    "3d": (lambda: nn.Conv3d(4, 6, 2, stride=(1, 2, 1), padding=1), CUBE),
    "3d groups, dilation": (lambda: nn.Conv3d(4, 4, 2, groups=2, dilation=(2, 1, 1)), CUBE),
    "patches": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, stride=3), nn.Flatten(2)), GRID),
    "T1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), LINE),
    "T2d": (lambda: nn.ConvTranspose2d(4, 6, 3), GRID),
    "T2d output_padding": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=(3, 2), padding=1, output_padding=(2, 1), groups=2), GRID,
    ),
    "T2d dilation": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, dilation=3, output_padding=2), GRID),
    "T3d": (lambda: nn.ConvTranspose3d(4, 2, 2, stride=2, groups=2), CUBE),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch, about its own copy
@pytest.mark.parametrize("name", CONV)
def test_layer(name):
    make, inputs = CONV[name]
    assert_exact(make().double().eval(), inputs().double())


@pytest.mark.parametrize("name", ["2d", "2d uneven", "2d depthwise", "T2d output_padding"])
def test_channels_last(name):
    make, inputs = CONV[name]
    model = make().double().eval().to(memory_format=torch.channels_last)
    assert_exact(model, inputs().double().to(memory_format=torch.channels_last))


class Residual(nn.Module):
    """A block of a ResNet, with everything in place."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.norm1(self.one(x)))
        out = self.norm2(self.two(out))
        out += x
        return self.relu(out)


class Frames(nn.Module):
    """Frames of a sample folded into the batch."""

    def __init__(self, *, first=False):
        super().__init__()
        self.conv, self.head, self.first = nn.Conv2d(2, 3, 3, stride=2), nn.Linear(3, 2), first

    def forward(self, x):  # [N, F, C, H, W]
        if self.first:
            return self.head(torch.stack([self.conv(f).mean((2, 3)) for f in x.unbind(1)], 1))
        h = self.conv(x.flatten(0, 1)).relu_().mean((2, 3))
        return self.head(h).view(*x.shape[:2], -1)


def conv_next():
    def forward(model, x):
        h = model.depthwise(x).permute(0, 2, 3, 1)
        return x + (model.out(F.gelu(model.wide(model.norm(h)))) * model.gamma).permute(0, 3, 1, 2)

    return Lambda(
        forward, depthwise=nn.Conv2d(4, 4, 3, padding=1, groups=4), norm=nn.LayerNorm(4), wide=nn.Linear(4, 8),
        out=nn.Linear(8, 4), gamma=weight(4),
    )  # fmt: skip


NETS = {
    "residual": (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), Residual(), Residual()), GRID),
    "frames": (Frames, floats(5, 3, 2, 5, 5)),
    "as many frames as samples": (Frames, floats(3, 3, 2, 5, 5)),
    "frame by frame": (lambda: Frames(first=True), floats(5, 3, 2, 5, 5)),
    "ConvNeXt": (conv_next, GRID),
    "U": (
        lambda: Lambda(
            lambda m, x: torch.cat([x, m.up(F.silu(m.down(x)))], 1), down=nn.Conv2d(4, 6, 2, stride=2),
            up=nn.ConvTranspose2d(6, 3, 2, stride=2),
        ),
        floats(5, 4, 6, 6),
    ),
    "reused": (
        lambda: Lambda(
            lambda m, x: m.c(F.relu(m.c(x))).mean((2, 3)) + m.c(F.avg_pool2d(x, 2)).mean((2, 3)),
            c=nn.Conv2d(4, 4, 3, padding=1),
        ),
        GRID,
    ),
    "two geometries of one weight": (
        lambda: Lambda(
            lambda m, x: F.conv2d(x, m.w, m.b, padding=1) + F.conv2d(x, m.w, m.b, padding=2, dilation=2),
            w=weight(4, 4, 3, 3), b=weight(4),
        ),
        GRID,
    ),
    "convolution and transposed": (
        lambda: Lambda(lambda m, x: F.conv_transpose2d(F.conv2d(x, m.w).tanh(), m.w), w=weight(3, 4, 2, 2)), GRID,
    ),
    "1x1 as a matrix": (
        lambda: Lambda(
            lambda m, x: F.linear(m.c(x).movedim(1, -1).tanh(), m.c.weight[:, :, 0, 0]), c=nn.Conv2d(4, 4, 1)
        ),
        GRID,
    ),
    "pooled": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
        ),
        GRID,
    ),
    "standardised weight": (
        lambda: Lambda(lambda m, x: F.conv2d(x, (m.w - m.w.mean((1, 2, 3), keepdim=True)) * 2), w=weight(3, 4, 2, 2)),
        GRID,
    ),
}  # fmt: skip
OP = {"standardised weight": {"w"}}


@pytest.mark.parametrize("name", NETS)
def test_net(name):
    make, inputs = NETS[name]
    assert_exact(with_statistics(make()).double().eval(), inputs().double(), op=OP.get(name, ()))
