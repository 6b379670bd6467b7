"""Every network of a run beside the exported one: its AP, their mean, their ensemble, the best."""

import logging
import math
import os
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm
from tabulate import tabulate
from torch import nn

from kd_det.distiller import find_distiller
from kd_det.engine.after_evaluation import AfterEvaluation, boxes
from kd_det.engine.best_network import BestNetwork
from kd_det.engine.ensemble import EnsembleModel

logger = logging.getLogger(__name__)

ENSEMBLE, MEAN = "ensemble", "mean"
_AP = "bbox/AP"
_SHOWN = (_AP, "bbox/AP50", "bbox/AP75")


class PeerEvaluation(AfterEvaluation):
    """
    After every evaluation of a Distiller with peers, all its networks are evaluated alike.

    The scalars are ``kd/<network>/bbox/AP`` (AP50, ..., AP-<class>) of each, the exported one too;
    ``kd/ensemble/bbox/AP``... of `EnsembleModel`, where the networks can be averaged; and
    ``kd/mean/bbox/AP``, the mean of the networks' APs without the ensemble's. With several test
    sets ``<dataset>/`` stands before ``bbox``. A table of them is in the log.

    The networks are evaluated by the trainer's own ``test``, with their own channel order, on the
    images and sizes of the config; predictions go to ``<OUTPUT_DIR>/<network>/inference``. What
    cannot be evaluated is left out with one line in the log. `BestNetwork` keeps the weights of the
    network with the highest AP on ``DATASETS.TEST[0]`` so far. Runs without peers do nothing.

    Args:
        cfg: of the run; without ``KD.EVAL_PEERS`` the hook does nothing.
    """

    without_boxes = "The evaluation has no box AP: the peers are not evaluated beside it."

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self._enabled = "KD" in cfg and cfg.KD.EVAL_PEERS
        self._ensemble: EnsembleModel | None = None
        self._best = BestNetwork(cfg.OUTPUT_DIR)

    def applies(self) -> bool:  # noqa: D102  # as in the base
        distiller = find_distiller(self.trainer.model)
        return self._enabled and distiller is not None and len(distiller.networks) > 1

    def before_train(self) -> None:
        """
        A run that goes on, goes on from the best network of its folder.

        Raises:
            ValueError: if a peer has a name that stands for all networks.
        """
        super().before_train()
        distiller = find_distiller(self.trainer.model)
        if distiller is None or not self.applies():
            return
        for name in {ENSEMBLE, MEAN} & distiller.networks.keys():
            raise ValueError(
                f"A peer cannot be called '{name}' in KD.SOURCES: kd/{name}/... are the scalars of "
                "all networks together. Rename it, or set KD.EVAL_PEERS to False."
            )
        if self.trainer.start_iter > 0:
            self._best.resume()

    def evaluated(  # noqa: D102  # as in the base
        self, results: Mapping[str, dict[str, float]], datasets: list[str]
    ) -> None:
        distiller = find_distiller(self.trainer.model)
        assert distiller is not None, "applies() has found it"
        networks, exported = distiller.networks, distiller.export_peer
        found = {
            name: results if name == exported else self._tested(name, network)
            for name, network in networks.items()
        }
        together = self._tested(ENSEMBLE, self._averaged(networks, exported))
        if not comm.is_main_process():
            return
        for dataset in datasets:
            each = {name: _finite(found[name].get(dataset, {})) for name in networks}
            self._report(dataset, each, _finite(together.get(dataset, {})))
        first = self._cfg.DATASETS.TEST[0]
        for name, network in networks.items():
            ap = found[name].get(first, {}).get(_AP, math.nan)
            self._best.offer(name, network, ap, iteration=int(self.trainer.storage.iter))

    def _averaged(self, networks: Mapping[str, nn.Module], exported: str) -> EnsembleModel | None:
        """Decoded by the exported network: thresholds and NMS are its."""
        if self._ensemble is None:
            members = {exported: networks[exported], **networks}
            try:
                self._ensemble = EnsembleModel(members, self._cfg.INPUT.FORMAT)
            except ValueError as e:
                self.say(f"The ensemble of the networks is left out of evaluations: {e}")
        return self._ensemble

    def _tested(self, name: str, network: nn.Module | None) -> dict[str, dict[str, float]]:
        """Box results by dataset; empty on all but the main process, and where there are none."""
        if network is None:
            return {}
        cfg = self._cfg.clone()
        cfg.defrost()
        cfg.INPUT.FORMAT = getattr(network, "input_format", cfg.INPUT.FORMAT)
        # Or its predictions would take the place of the exported network's.
        cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, name)
        logger.info("Evaluating the network '%s'; what follows is its.", name)
        results: Any = {}
        try:
            results = self.trainer.test(cfg, network)
        except (ValueError, FileNotFoundError) as e:  # a report is not worth a run
            self.say(f"The network '{name}' is left out of evaluations: {e}")
        comm.synchronize()
        return boxes(results, cfg.DATASETS.TEST)

    def _report(
        self, dataset: str, each: Mapping[str, dict[str, float]], ensemble: dict[str, float]
    ) -> None:
        rows = {**each, **({ENSEMBLE: ensemble} if ensemble else {})}
        if all(_AP in found for found in each.values()):
            rows[MEAN] = {_AP: sum(found[_AP] for found in each.values()) / len(each)}
        where = self.key_of(dataset)
        scalars = {
            f"kd/{row}/{where}{k}": v for row, found in rows.items() for k, v in found.items()
        }
        self.trainer.storage.put_scalars(**scalars, smoothing_hint=False)
        table = tabulate(
            [(row, *(found.get(key, math.nan) for key in _SHOWN)) for row, found in rows.items()],
            headers=("network", *(key.removeprefix("bbox/") for key in _SHOWN)),
            tablefmt="pipe",
            floatfmt=".1f",
        )
        logger.info("The networks on %s:\n%s", dataset, table)


def _finite(results: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in results.items() if math.isfinite(value)}
