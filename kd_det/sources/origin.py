"""Where the network of a teacher comes from: files, or a model that is there already."""

import copy
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kd_det.sources.carried import carried_config
from kd_det.sources.model_config import ModelConfig
from kd_det.sources.strict import load_strictly


class Origin:
    """
    A network that can be had again and again. It holds no state that a step changes, so a deepcopy
    of its owner shares it, and it is no module: no module tree shows what it knows of.
    """

    @property
    def input_format(self) -> str:
        """Channel order of the images that the network wants."""
        return "BGR"

    @property
    def config_file(self) -> str:
        """File that says what the network is; empty where there is none."""
        return ""

    @property
    def weights(self) -> str:
        """File of the weights; empty where there is none."""
        return ""

    @property
    def dataset(self) -> str:
        """Name of the dataset that it was trained on; empty where that is unknown."""
        return ""

    @property
    def recipe(self) -> str:
        """All that decides what it predicts beside the weights, as text."""
        return ""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Origin":
        return self

    def architecture(self) -> nn.Module:
        """
        The network to be measured, not to be changed: without weights where they can be spared.

        Raises:
            SourceUnavailable: if a file that says so is missing.
        """
        raise NotImplementedError

    def load(self) -> tuple[nn.Module, str]:
        """
        The network with its weights, the caller's own, and their fingerprint.

        Raises:
            SourceUnavailable: if a file is missing.
            ValueError: if a file is not what it should be.
        """
        raise NotImplementedError

    def test_mapper(self, input_format: str) -> Callable[[dict[str, Any]], Any] | None:
        """From a dataset's record to what it is evaluated on; ``None`` where nothing is known."""
        return None


class FromFiles(Origin):
    """
    A config, and weights that are loaded strictly. Nothing is read before it is asked for.

    Args:
        config_file: of the network; empty takes the config that the weights carry, see
            `kd_det.sources.carried.carried_config`.
        weights: empty takes what the config names.
        sha256: of the weights; see `kd_det.sources.strict.load_strictly`.
        defaults: what a YAML config is merged into; see `kd_det.sources.model_config.ModelConfig`.
    """

    def __init__(self, config_file: str, weights: str, sha256: str, defaults: Any = None) -> None:
        self._config_file = config_file
        self._weights = weights
        self._sha256 = sha256
        self.defaults = defaults

    @property
    def config(self) -> ModelConfig:
        """The config, read once."""
        if "_config" not in self.__dict__:
            what = "The teacher"
            self._config = (
                ModelConfig(self._config_file, what=what, defaults=self.defaults)
                if self._config_file
                else carried_config(self._weights, what=what, defaults=self.defaults)
            )
        return self._config

    @property
    def input_format(self) -> str:  # noqa: D102  # as in the base
        return self.config.input_format

    @property
    def config_file(self) -> str:  # noqa: D102  # as in the base
        return self.config.path

    @property
    def weights(self) -> str:  # noqa: D102  # as in the base
        return self._weights or self.config.weights

    @property
    def dataset(self) -> str:  # noqa: D102  # as in the base
        return self.config.dataset

    @property
    def recipe(self) -> str:  # noqa: D102  # as in the base
        return self.config.text

    def architecture(self) -> nn.Module:  # noqa: D102  # as in the base
        return self.config.build("meta")

    def load(self) -> tuple[nn.Module, str]:  # noqa: D102  # as in the base
        what = f"The teacher of {self.config.path}"
        weights = self.weights
        if not weights:
            raise ValueError(f"{what} has no weights: set WEIGHTS. A random teacher only harms.")
        model = self.config.build("cpu")
        return model, load_strictly(model, weights, what=what, sha256=self._sha256)

    def test_mapper(  # noqa: D102  # as in the base
        self, input_format: str
    ) -> Callable[[dict[str, Any]], Any]:
        return self.config.test_mapper(input_format)


class Given(Origin):
    """
    A model that is there already; it is left as it is, what is loaded is a copy.

    Args:
        model: with its weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def input_format(self) -> str:  # noqa: D102  # as in the base
        return str(getattr(self.model, "input_format", "BGR"))

    @property
    def recipe(self) -> str:  # noqa: D102  # as in the base
        return _attributes(self.model)

    def architecture(self) -> nn.Module:  # noqa: D102  # as in the base
        return self.model

    def load(self) -> tuple[nn.Module, str]:  # noqa: D102  # as in the base
        return copy.deepcopy(self.model), _tensor_fingerprint(self.model)


def _tensor_fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(x.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _attributes(model: nn.Module) -> str:
    """The types of all modules and their plain values, thresholds say, as text."""
    plain = (bool, int, float, str, tuple, list)
    found = []
    for name, m in model.named_modules():
        values = {k: v for k, v in vars(m).items() if k != "training" and isinstance(v, plain)}
        found.append((name, type(m).__qualname__, values))
    return repr(found)
