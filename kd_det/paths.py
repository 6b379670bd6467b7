"""Finding the files that configs name."""

import os
from pathlib import Path

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
"""kd_det's own configs, beside the package."""


def find_file(path: str, relative_to: str = "") -> str | None:
    """
    Resolve the path of a config or of weights.

    Looked for, in this order: as it is when absolute or an address (``detectron2://``); relative to
    ``relative_to`` (the folder of the file that names it); to the working directory; in kd_det's
    own configs; in Detectron2's model zoo configs.

    Returns:
        The absolute path (or the address), or ``None`` when nothing is there.
    """
    if "://" in path:
        return path
    expanded = os.path.expanduser(path)
    roots = [relative_to] if relative_to else []
    roots += [os.getcwd(), str(CONFIGS)]
    for root in roots:
        candidate = os.path.join(root, expanded)  # an absolute path wins over the root
        if os.path.isfile(candidate):
            return os.path.abspath(candidate)
    if os.path.isabs(expanded) or os.pardir in expanded.split("/"):
        return None  # pkg_resources, which the zoo asks, warns of such names
    from detectron2 import model_zoo  # late: it imports pkg_resources, which warns

    try:
        return os.path.abspath(model_zoo.get_config_file(path))
    except RuntimeError:  # not in the zoo, or a Detectron2 that ships without its configs
        return None


def zoo_checkpoint(config: str) -> str | None:
    """
    Address of what Detectron2's model zoo trained with a config of its own, or with kd_det's of the
    same name; ``None`` for any other config.

    Args:
        config: absolute path, as `find_file` gives it.
    """
    from detectron2 import model_zoo  # late, as above

    for root in (CONFIGS, Path(model_zoo.__file__).resolve().parent / "configs"):
        for path in (Path(config), Path(config).resolve()):  # a checkout's zoo is linked in
            if path.is_relative_to(root):
                try:
                    return str(model_zoo.get_checkpoint_url(path.relative_to(root).as_posix()))
                except RuntimeError:  # not trained there
                    return None
    return None
