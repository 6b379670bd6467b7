"""How many classes an anchor has, for terms that compare its class scores together."""

from kd_det.channels import Common
from kd_det.losses import MODES


def check_class_fields(term: str, mode: str, num_classes: int) -> None:
    """
    Refuse what no class logits are.

    Raises:
        ValueError: if the mode is none of `kd_det.losses.MODES`, or ``num_classes`` is negative.
    """
    if mode not in MODES:
        raise ValueError(f"{term}'s mode is one of {', '.join(MODES)}, but got '{mode}'.")
    if num_classes < 0:
        raise ValueError(f"{term} needs num_classes >= 0, but got {num_classes}.")


def classes_per_anchor(common: Common, num_classes: int, mode: str, where: str) -> int:
    """
    Classes of one anchor in the channels that both sides have.

    Args:
        common: those channels.
        num_classes: what the user says, for taps that do not tell; 0 takes all channels for classes
            of one anchor there.
        mode: of `kd_det.losses.MODES`.
        where: level and tap, for errors.

    Raises:
        ValueError: if ``num_classes`` is not what the tap says, the channels are no multiple of it,
            or a softmax would be over one class.
    """
    known = common.per_anchor
    if known and num_classes and known != num_classes:
        raise ValueError(
            f"{where} has {known} classes per anchor in common, and NUM_CLASSES says "
            f"{num_classes}: leave it at 0, it is for taps that do not tell"
        )
    classes = known or num_classes or common.channels
    if common.channels % classes:
        raise ValueError(
            f"{where} has {common.channels} channels, which are no whole number of anchors with "
            f"{classes} classes each: set NUM_CLASSES to the number of classes"
        )
    if classes == 1 and mode == "softmax":
        raise ValueError(
            f"{where} has one class per anchor, whose softmax is 1 whatever the logits are: set "
            'MODE: "sigmoid"'
        )
    return classes
