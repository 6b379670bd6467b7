"""retinanet_regnetx_4gf_FPN_1x.py with CWD of the features and class logits of RetinaNet R-101.

The baseline is that file. For features only: model.terms.logits.weight=0 on the command line. The
student inherits the teacher's head and FPN outputs with inherit=L(Inherit)(source="teacher").
"""

from detectron2.config import LazyCall as L

from kd_det import Distiller, Teacher
from kd_det.terms import CWD

from .retinanet_regnetx_4gf_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

model = L(Distiller)(
    student=model,
    # L("builtins.dict"), because instantiate() leaves what is inside of a plain dict alone.
    sources=L("builtins.dict")(
        teacher=L(Teacher)(
            config_file="COCO-Detection/retinanet_R_101_FPN_3x.yaml",  # of kd_det's configs
            weights="detectron2://COCO-Detection/retinanet_R_101_FPN_3x/190397697/"
            "model_final_971ab9.pkl",
        )
    ),
    terms=L("builtins.dict")(
        # What configs/KD/cwd_R_101.yaml says, and there are the reasons. Naming the levels also
        # pairs p6 and p7, which a RegNet and a ResNet make of different things (s4, res5).
        fpn=L(CWD)(tap="features", levels=["p3", "p4", "p5", "p6"], tau=1.0, weight=5.0),
        logits=L(CWD)(tap="cls_logits", levels=["p3", "p4", "p5", "p6", "p7"], tau=1.0, weight=1.0),
    ),
    max_iter="${train.max_iter}",
)
