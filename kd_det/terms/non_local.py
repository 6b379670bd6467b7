"""The non-local block of FKD."""

import torch
from torch import Tensor, nn


class NonLocal(nn.Module):
    """
    A map plus what every cell gathers from all others (Wang et al., CVPR 2018), in the dot-product
    form that FKD's public code uses.

        x_i + W ( 1/M sum_j <theta(x_i), phi(x_j)> g(x_j) )

    theta, phi, g and W are 1x1 convolutions; W starts at 0, the block as the identity. Without a
    softmax the sum over j can be taken first: M * inner^2 products instead of M^2 * inner, so no
    map is too large (published code max-pools the keys j for that). float32, or whatever its
    parameters are, under autocast too.

    Args:
        channels: C.
        inner: channels of theta, phi and g.
    """

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.theta = nn.Conv2d(channels, inner, 1)
        self.phi = nn.Conv2d(channels, inner, 1)
        self.g = nn.Conv2d(channels, inner, 1)
        self.out = nn.Conv2d(inner, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]  # bias=True makes it a Parameter

    def forward(self, x: Tensor, cells: Tensor | None = None) -> Tensor:
        """
        Apply the block.

        Args:
            x: ``(N, C, H, W)``.
            cells: ``(N, 1, H, W)``, 0 for cells that nothing is gathered from; ``None`` has none.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.out.weight.dtype)
            real = torch.ones_like(x[:, :1]) if cells is None else cells.to(x.dtype)
            values = (self.g(x) * real).flatten(2)  # (N, inner, M)
            keys = self.phi(x).flatten(2)
            number = real.sum((1, 2, 3)).clamp_min(1)[:, None, None]  # (N, 1, 1)
            memory = torch.bmm(values, keys.transpose(1, 2)) / number  # (N, inner, inner)
            gathered = torch.bmm(memory, self.theta(x).flatten(2))  # (N, inner, M)
            return x + self.out(gathered.unflatten(2, x.shape[2:]))
