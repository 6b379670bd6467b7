"""
Detectron2 where kd_det cannot be imported: trains a config, or evaluates a checkpoint.

Called with the path of kd_det/_stub_C.py, which Detectron2 0.6 needs without compiled operators.
"""

import importlib.abc
import importlib.util
import sys
from pathlib import Path

import PIL.Image
import torch


class NoKD(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] == "kd_det":
            raise ImportError("kd_det is not here")


def prepare(stub: str) -> None:
    sys.meta_path.insert(0, NoKD())
    package = importlib.util.find_spec("detectron2")
    is_main = (Path(package.origin).parent / "utils" / "develop.py").is_file()
    if is_main:
        return
    if importlib.util.find_spec("detectron2._C") is None:
        spec = importlib.util.spec_from_file_location("detectron2._C", stub)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules["detectron2._C"] = sys.modules["detectron2"]._C = module
    PIL.Image.LINEAR = PIL.Image.Resampling.BILINEAR  # gone since Pillow 10


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, stub, config_file, *words = sys.argv[1:]
    prepare(stub)
    import loops
    from detectron2.config import get_cfg
    from detectron2.engine import default_argument_parser, default_setup

    cfg = get_cfg()
    cfg.merge_from_file(config_file)
    if what == "evaluate":
        loops.evaluate(cfg, words)
    else:
        cfg.merge_from_list(words)
        cfg.freeze()
        default_setup(cfg, default_argument_parser().parse_args([]))
        getattr(loops, what)(cfg, False)
    assert "kd_det" not in sys.modules
