"""
Connectors: small trainable maps from the student's channels to the target's.

A connector in a config or a constructor is a *recipe*, called with the two channel counts once the
real shapes are known; it returns the module that the term owns, one per level. Connectors are
training-only: they are part of the kd state, never of the student's checkpoint. (Other code calls
them adapters.)
"""

from torch import Tensor, nn

from kd_det.losses import standardize
from kd_det.registry import CONNECTORS


class Connector:
    """A recipe: ``recipe(in_channels, out_channels) -> nn.Module``."""

    def __call__(self, in_channels: int, out_channels: int) -> nn.Module:
        """
        Build the module for one level.

        Args:
            in_channels: channels of the student's map.
            out_channels: channels of the target's map.

        Returns:
            Module from ``(N, in, H, W)`` to ``(N, out, H, W)``; ``nn.Identity`` for none.
        """
        raise NotImplementedError


@CONNECTORS.register()
class Identity(Connector):
    """No connector: different channel counts are an error."""

    def __call__(self, in_channels: int, out_channels: int) -> nn.Module:
        """Raises ValueError: if the channel counts differ."""
        if in_channels != out_channels:
            raise ValueError(
                f"the student has {in_channels} channels and the target {out_channels}, and "
                "connector Identity bridges none: use connector Auto or Conv"
            )
        return nn.Identity()


@CONNECTORS.register()
class Unbridged(Connector):
    """No connector, whatever the channel counts are: for terms that compare none of them (AT)."""

    def __call__(self, in_channels: int, out_channels: int) -> nn.Module:  # noqa: D102  # as in the base
        return nn.Identity()


@CONNECTORS.register()
class Conv(Connector):
    """
    One convolution, always, whatever the channel counts are.

    Args:
        kernel: odd kernel size; 1 in CWD's public detection code, 3 in FGFI's.
        norm: whether a BatchNorm follows (the convolution then has no bias), see `BatchNorm`.
        relu: whether a ReLU follows.

    Raises:
        ValueError: if the kernel is even or not positive.
    """

    def __init__(self, *, kernel: int = 1, norm: bool = False, relu: bool = False) -> None:
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"Connector Conv needs an odd kernel >= 1, but got {kernel}.")
        self.kernel = kernel
        self.norm = norm
        self.relu = relu

    def __call__(self, in_channels: int, out_channels: int) -> nn.Module:
        """See `Connector`; the weight is initialised as Detectron2 initialises FPN laterals."""
        conv = nn.Conv2d(
            in_channels, out_channels, self.kernel, padding=self.kernel // 2, bias=not self.norm
        )
        nn.init.kaiming_uniform_(conv.weight, a=1)
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        behind = [BatchNorm(out_channels)] * self.norm + [nn.ReLU()] * self.relu
        return nn.Sequential(conv, *behind) if behind else conv


class BatchNorm(nn.BatchNorm2d):
    """
    BatchNorm as a connector needs it: always by the statistics of the batch, of this process.

    A connector is never run in eval mode, so there are no running statistics: nothing that
    processes would disagree on and a checkpoint would have to choose from. A map with one value
    per channel (a P7 of 1 x 1, one image) becomes the bias instead of an error. float32 inside.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        """``weight * standardize(x) + bias``, see `kd_det.losses.standardize`."""
        scale, shift = self.weight[:, None, None], self.bias[:, None, None]  # (C, 1, 1)
        return standardize(x, eps=self.eps) * scale + shift


@CONNECTORS.register()
class Auto(Connector):
    """A 1x1 convolution where the channel counts differ, and nothing where they agree."""

    def __call__(self, in_channels: int, out_channels: int) -> nn.Module:  # noqa: D102  # as in the base
        if in_channels == out_channels:
            return nn.Identity()
        return Conv()(in_channels, out_channels)
