"""
Stock Detectron2 predicts with what distilled runs left behind, where kd_det cannot be imported.

    stock_predictions.py PATH_OF_STUB FOLDER

Every sub-folder of FOLDER has ``student.yaml`` or ``student.py`` and ``model_final.pth``; what the
student predicts for ``FOLDER/inputs.pt`` is written to ``stock.pt`` beside them.
"""

import sys
from pathlib import Path

import torch
from stock import prepare

if __name__ == "__main__":
    torch.set_num_threads(1)
    stub, root = sys.argv[1:]
    prepare(stub)
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import LazyConfig, get_cfg, instantiate
    from detectron2.modeling import build_model
    from predictions import predictions

    inputs = torch.load(Path(root) / "inputs.pt")
    for weights in sorted(Path(root).glob("*/model_final.pth")):
        folder = weights.parent
        if (folder / "student.py").is_file():
            model = instantiate(LazyConfig.load(str(folder / "student.py")).model)
        else:
            cfg = get_cfg()
            cfg.merge_from_file(str(folder / "student.yaml"))
            model = build_model(cfg)
        DetectionCheckpointer(model).load(str(weights))
        torch.save(predictions(model, inputs), folder / "stock.pt")
    assert "kd_det" not in sys.modules
