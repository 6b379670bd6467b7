from detectron2.config import CfgNode


def add_flock_config(cfg: CfgNode) -> None:
    cfg.INPUT.FLOCK_NOISE = 5.0
    cfg.MODEL.FLOCK = CfgNode()
    cfg.MODEL.FLOCK.COUNT_WEIGHT = 0.1
    cfg.MODEL.FLOCK.COUNT_LEVEL = "p4"
    cfg.MODEL.FLOCK.BOX_DIM = 24
    cfg.SOLVER.EMA_DECAY = 0.9
