"""Results of evaluations, kept between runs."""

import json
import logging
import os

from iopath.common.file_io import get_cache_dir

logger = logging.getLogger(__name__)


def read(key: str) -> dict[str, float] | None:
    """The results under a key; ``None`` when there are none or the file is damaged."""
    try:
        with open(_path(key), encoding="utf-8") as f:
            results = json.load(f)
        return {str(name): float(value) for name, value in results.items()}
    except FileNotFoundError:
        return None
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
    ) as e:  # the last two: not numbers by name
        logger.info(
            "The cached results %s cannot be used and are computed again: %s", _path(key), e
        )
        return None


def write(key: str, results: dict[str, float]) -> None:
    """Keep results under a key, whole or not at all. That they cannot be kept is only logged."""
    path = _path(key)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as f:
            json.dump(results, f, indent=1)
        os.replace(temporary, path)
    except OSError as e:
        logger.info("Results are not kept for other runs: %s", e)
        if os.path.exists(temporary):
            os.remove(temporary)


def _path(key: str) -> str:
    return os.path.join(get_cache_dir(), "kd_det", key + ".json")
