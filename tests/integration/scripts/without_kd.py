"""
Run a script where kd_det cannot be imported.

    without_kd.py PATH_OF_STUB SCRIPT ARGUMENTS...
"""

import runpy
import sys

from stock import prepare

if __name__ == "__main__":
    _, stub, script, *words = sys.argv
    prepare(stub)
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")
    assert "kd_det" not in sys.modules
