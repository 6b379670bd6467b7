"""
Connectors: small trainable maps from the student's channels to the target's.

A connector in a config or a constructor is a *recipe*, called with the two channel counts once the
real shapes are known; it returns the module that the term owns, one per level. Connectors are
training-only: they are part of the kd state, never of the student's checkpoint. (Other code calls
them adapters.)
"""

from torch import nn

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
class Conv(Connector):
    """
    One convolution with bias, always, whatever the channel counts are.

    Args:
        kernel: odd kernel size; 1 in CWD's public detection code, 3 in FGFI's.
        relu: whether a ReLU follows.

    Raises:
        ValueError: if the kernel is even or not positive.
    """

    def __init__(self, *, kernel: int = 1, relu: bool = False) -> None:
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"Connector Conv needs an odd kernel >= 1, but got {kernel}.")
        self.kernel = kernel
        self.relu = relu

    def __call__(self, in_channels: int, out_channels: int) -> nn.Module:
        """See `Connector`; the weight is initialised as Detectron2 initialises FPN laterals."""
        conv = nn.Conv2d(in_channels, out_channels, self.kernel, padding=self.kernel // 2)
        nn.init.kaiming_uniform_(conv.weight, a=1)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # bias=True makes it a Parameter
        return nn.Sequential(conv, nn.ReLU()) if self.relu else conv


@CONNECTORS.register()
class Auto(Connector):
    """A 1x1 convolution where the channel counts differ, and nothing where they agree."""

    def __call__(self, in_channels: int, out_channels: int) -> nn.Module:  # noqa: D102  # as in the base
        if in_channels == out_channels:
            return nn.Identity()
        return Conv()(in_channels, out_channels)
