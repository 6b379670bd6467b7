"""What a temperature may be."""


def temperature(owner: str, tau: float) -> float:
    """
    ``tau`` as a float.

    Args:
        owner: whose it is, for the error.
        tau: what logits or responses are divided by before a softmax or a sigmoid.

    Raises:
        ValueError: if it is not a positive finite number.
    """
    if not 0 < tau < float("inf"):
        raise ValueError(f"{owner} needs a finite temperature tau > 0, but got {tau}.")
    return float(tau)
