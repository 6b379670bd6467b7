"""SGD and the schedules 1x and 3x of a RetinaNet on COCO, for 16 images per batch."""

import torch
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler

optimizer = L(torch.optim.SGD)(
    # lazyconfig_train_net.py sets params.model: a Distiller's connectors are trained too.
    params=L(get_default_optimizer_params)(weight_decay_norm=0.0),
    lr=0.01,
    momentum=0.9,
    weight_decay=1e-4,
)


def _multi_step(*milestones):
    """A tenth at each milestone but the last, which is the end, after 1000 iterations of warm-up.

    Schedulers work in fractions of the run: with another train.max_iter the steps move along.
    """
    return L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1, 0.01], milestones=list(milestones)),
        warmup_length=1000 / milestones[-1],
        warmup_method="linear",
        warmup_factor=0.001,
    )


lr_multiplier_1x = _multi_step(60000, 80000, 90000)
lr_multiplier_3x = _multi_step(210000, 250000, 270000)
