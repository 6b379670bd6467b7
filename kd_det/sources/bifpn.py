"""A two-way pyramid over given maps, with weights of its own for every sum."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_det.connectors import BatchNorm


class Fusion(nn.Module):
    """
    Fast normalised fusion (EfficientDet, Tan et al., CVPR 2020, https://arxiv.org/abs/1911.09070).

        sum_k w_k x_k,   w = relu(v) / (sum relu(v) + 1e-6)

    The v start at 1 each.

    Args:
        count: of maps.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(count))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """The sum of maps of one shape."""
        w = self.weights().unbind()
        return sum((a * x for a, x in zip(w, maps, strict=True)), torch.zeros_like(maps[0]))

    def weights(self) -> Tensor:
        """w, (K), >= 0, of sum 1 but for the 1e-6."""
        v = F.relu(self.weight)
        return v / (v.sum() + 1e-6)


def conv1x1(in_channels: int, out_channels: int) -> nn.Sequential:
    """Convolution, BatchNorm of the batch (`kd_det.connectors.BatchNorm`), ReLU."""
    conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    return nn.Sequential(conv, BatchNorm(out_channels), nn.ReLU())


def separable(channels: int, depth: int) -> nn.Sequential:
    """``depth`` times: a 3x3 convolution within each channel, a 1x1 one, BatchNorm, ReLU."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            *conv1x1(channels, channels),
        ]
    return nn.Sequential(*layers)


class BiFPN(nn.Module):
    """
    FRSKD's self-teacher network (Ji et al., CVPR 2021, https://arxiv.org/abs/2103.08273), one layer
    of a BiFPN whose levels have channels of their own. F_1 is the finest map, F_n the coarsest.

        L_i = lateral_i(F_i)      S_i = skip_i(F_i)
        P_n = L_n                 P_i = conv(fuse(L_i, up(P_{i+1}))),          i = n - 1 ... 1
        T_1 = P_1                 T_i = conv(fuse(S_i, P_i, down(T_{i-1}))),   i = 2 ... n - 1
                                  T_n = conv(fuse(S_n, down(T_{n-1})))

    lateral, skip: 1x1 to d_i channels; up, down: 1x1 to the channels of the level that they reach;
    each with BatchNorm and ReLU. up is nearest, to that level's grid; down is max-pooling, 3x3 with
    stride 2. The links L_n to P_{n-1} and P_2 to T_1 are the paper's diagonal ones: the ends of the
    pyramid have no node of their own in between. conv is `separable`.

    Against the authors' code: sides may be odd; pooling is centred; up convolves before it
    enlarges (the same, a quarter of the work); and a lateral is given the map as it is, where
    theirs takes its ReLU, which their maps have behind them and an FPN's have not.

    Args:
        in_channels: c_i of F_i, fine to coarse; two levels at least.
        out_channels: d_i of T_i.
        depth: of every ``conv``; 2 in the authors' code.
    """

    def __init__(
        self, in_channels: Sequence[int], out_channels: Sequence[int], depth: int = 2
    ) -> None:
        super().__init__()
        c, d = in_channels, out_channels
        below, above = list(d[:-1]), list(d[1:])
        self.lateral = nn.ModuleList(map(conv1x1, c, d))
        self.skip = nn.ModuleList(map(conv1x1, c[1:], above))
        # Entry i leads from level i + 1 to level i, or from i to i + 1.
        self.up = nn.ModuleList(map(conv1x1, above, below))
        self.down = nn.ModuleList(map(conv1x1, below, above))
        self.up_fusion = nn.ModuleList(Fusion(2) for _ in below)
        self.down_fusion = nn.ModuleList(Fusion(3) for _ in above[:-1])
        self.down_fusion.append(Fusion(2))
        self.up_conv = nn.ModuleList(separable(n, depth) for n in below)
        self.down_conv = nn.ModuleList(separable(n, depth) for n in above)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """
        The refined maps T_i.

        Args:
            maps: F_i, ``(N, c_i, H_i, W_i)``, each half the size of the one before, rounded up.
        """
        lateral = [conv(x) for conv, x in zip(self.lateral, maps, strict=True)]
        last = len(maps) - 1
        middle = lateral[-1:]  # P_i, fine to coarse
        for i in reversed(range(last)):
            size = lateral[i].shape[-2:]
            up = F.interpolate(self.up[i](middle[0]), size=size, mode="nearest")
            middle.insert(0, self.up_conv[i](self.up_fusion[i]([lateral[i], up])))
        refined = middle[:1]
        for i in range(last):
            pooled = F.max_pool2d(refined[-1], 3, stride=2, padding=1)
            # The coarsest level has no node in between: its P is its L.
            between = [middle[i + 1]] if i + 1 < last else []
            parts = [self.skip[i](maps[i + 1]), *between, self.down[i](pooled)]
            refined.append(self.down_conv[i](self.down_fusion[i](parts)))
        return refined
