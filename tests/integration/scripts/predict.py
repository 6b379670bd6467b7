"""
What Detectron2 predicts where kd_det cannot be imported.

Called with the path of kd_det/_stub_C.py, a config, a checkpoint, a file of inputs and one for the
predictions, both of torch.save.
"""

import sys

import torch
from stock import prepare

if __name__ == "__main__":
    torch.set_num_threads(1)
    stub, config_file, weights, inputs, predictions = sys.argv[1:]
    prepare(stub)
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    cfg = get_cfg()
    cfg.merge_from_file(config_file)
    model = build_model(cfg).eval()
    DetectionCheckpointer(model).load(weights)
    with torch.no_grad():
        found = model(torch.load(inputs, weights_only=False))
    torch.save([x["sem_seg"] for x in found], predictions)
    assert "kd_det" not in sys.modules
