"""Set up an environment for kd_det (`make setup`).

Without --python it makes or completes the project's own .venv. With --python it completes that
environment and changes nothing in it: only what is missing is installed, held to the versions that
are there. An existing torch, torchvision or Detectron2 is never touched, in either.

Every run looks at what is installed instead of remembering what it did, so a run that was
interrupted is completed by the next one.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
VENV = ROOT / ".venv"
# pip: the first with per-requirement --config-settings; newer than 26.0 refuse pb1-detectron2's
# metadata. setuptools: editable installs; 81 and later lack pkg_resources (Detectron2 imports it).
BUILD_TOOLS = ["pip>=23.2,<=26.0", "setuptools>=64,<81", "wheel"]
HELD = {"torch", "torchvision"}  # never replaced, not even in the own environment
# In a given environment these count as there when the module is, whatever its distribution is
# called. (In the own one they do not: the module of an interrupted installation is there, too.)
MODULES = {"torch": "torch", "torchvision": "torchvision", "detectron2": "detectron2",
           "opencv-python-headless": "cv2"}  # fmt: skip
# Runs at every start of the interpreter: Detectron2 0.6 uses the name while its data package is
# imported, and Pillow 10 removed it.
PILLOW_LINE = "import PIL.Image as i; i.LINEAR = getattr(i, 'LINEAR', i.Resampling.BILINEAR)\n"

# Runs in the target interpreter. pip writes INSTALLER last: without it, it was interrupted.
PROBE = r"""
import importlib.metadata as im, importlib.util, json, re, sys, sysconfig
try:
    from packaging.requirements import Requirement
except ImportError:
    try:
        from pip._vendor.packaging.requirements import Requirement
    except ImportError:
        Requirement = None
modules, requirements, own = json.load(sys.stdin)
norm = lambda name: re.sub(r"[-_.]+", "-", name).lower()
dists, unfinished = {}, []
for dist in im.distributions():
    path = str(getattr(dist, "_path", ""))
    if own and path.endswith(".dist-info") and not dist.read_text("INSTALLER"):
        unfinished.append(path)
    elif dist.metadata["Name"] and dist.version:
        dists.setdefault(norm(dist.metadata["Name"]), dist.version)
origins = {}
for module in modules:
    spec = importlib.util.find_spec(module)
    origins[module] = spec and (spec.origin or "")
unmet = {}
for text in requirements if Requirement else []:
    r = Requirement(text)
    if r.marker is None or r.marker.evaluate():
        unmet[text] = not r.specifier.contains(dists.get(norm(r.name), "0"), prereleases=True)
json.dump({"version": list(sys.version_info[:3]), "dists": dists, "unfinished": unfinished,
           "origins": origins, "unmet": unmet, "pip": importlib.util.find_spec("pip") is not None},
          sys.stdout)
"""


def stop(sentence):
    sys.exit(f"setup: {sentence}")


def normalised(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def name_of(requirement):
    return normalised(re.match(r"[\w.-]+", requirement).group())


def read(file):
    """The lines of a requirements file, without comments."""
    lines = (re.split(r"(?:^|\s)#", line)[0].strip() for line in (REQUIREMENTS / file).open())
    return [line for line in lines if line]


class Environment:
    """An interpreter and what is installed for it."""

    def __init__(self, python, own):
        self.python, self.own = python, own
        self.look()
        self.before = self.dists

    def look(self):
        wanted = [*BUILD_TOOLS, *read("torch.txt"), *read("base.txt"), *read("dev.txt")]
        # From another folder: the checkout itself must not count as installed.
        done = subprocess.run(
            [self.python, "-c", PROBE],
            input=json.dumps([[*MODULES.values(), "kd_det"], wanted, self.own]),
            capture_output=True, text=True, cwd=tempfile.gettempdir(),
        )  # fmt: skip
        if done.returncode:
            stop(f"{self.python} does not run:\n{done.stderr}")
        self.__dict__.update(json.loads(done.stdout))
        if "pb1-detectron2" in self.dists:
            self.dists["detectron2"] = self.dists["pb1-detectron2"]

    def has(self, name):
        if self.own or name not in MODULES:
            return name in self.dists
        return name in self.dists or self.origins[MODULES[name]] is not None

    def missing(self, requirements):
        """Those to install: absent ones and, in the own environment, ones too old or too new."""
        absent = [r for r in requirements if not self.has(name_of(r))]
        if not self.own:
            return absent
        return [r for r in requirements if r in absent or (
            name_of(r) not in HELD and name_of(r) in self.dists and self.unmet.get(r))]  # fmt: skip

    def install(self, requirements):
        """Install these, held to what must not change and to constraints.txt for the rest."""
        names = {name_of(r) for r in requirements}
        fixed = HELD if self.own else self.dists
        kept = {n: v for n, v in self.dists.items() if n in fixed and n not in names}
        lines = [f"{n}=={v}" for n, v in kept.items() if re.fullmatch(r"[\w.+!]+", v)]
        lines += [c for c in read("constraints.txt") if name_of(c) not in kept]
        with tempfile.TemporaryDirectory() as folder:
            constraints = Path(folder, "constraints.txt")
            constraints.write_text("\n".join(lines))
            self.pip_install(names, "--constraint", constraints, *requirements)

    def pip_install(self, names, *arguments):
        if not self.pip:
            stop(f"{self.python} lacks {', '.join(names)} and has no pip to install them with; "
                 "add pip to it (python -m ensurepip) and run again.")  # fmt: skip
        patience = " (several GB, this can take minutes)" if "torch" in names else ""
        print(f"setup: installing {', '.join(sorted(names))}{patience}", flush=True)
        done = subprocess.run(
            [self.python, "-m", "pip", "install", "--quiet", *arguments],
            env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"},
            cwd=ROOT,
        )
        if done.returncode:
            stop("pip failed (its message is above). Run `make setup` again to continue from here.")
        self.look()


def own_environment():
    """The project's .venv, made or repaired as far as having a working pip."""
    python = VENV / "bin" / "python"

    def works(*arguments):
        command = [python, *arguments]
        return python.exists() and not subprocess.run(command, capture_output=True).returncode

    # The second attempt starts over; the first keeps what an interrupted run has installed.
    for clear in ([], ["--clear"]):
        if works("-m", "pip", "--version"):
            break
        print(f"setup: making {VENV.name} with Python {sys.version.split()[0]}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", *clear, VENV])
    else:
        if not works("-m", "pip", "--version"):
            stop(f"{sys.executable} could not make a virtual environment (its message is above).")
    environment = Environment(str(python), own=True)
    for path in environment.unfinished:
        print(f"setup: {Path(path).name} was interrupted, installing it again", flush=True)
        shutil.rmtree(path)
    if environment.unfinished:
        environment.look()
    return environment


def place_stub(package):
    """Put what Detectron2 0.6 expects at import time into and beside its folder.

    Only for the own .venv: there, scripts that import Detectron2 before kd_det work, too. Elsewhere
    kd_det._compat does the same for the running process.
    """
    compiled = any(p.name != "_C.py" for p in package.glob("_C.*"))
    optional = (package / "utils" / "develop.py").is_file()  # main does without, see kd_det._compat
    if compiled or optional:
        return
    stub = (ROOT / "kd_det" / "_stub_C.py").read_text()
    for file, text in (
        (package / "_C.py", stub),
        (package.parent / "kd_det_pillow.pth", PILLOW_LINE),
    ):
        if not file.exists() or file.read_text() != text:
            file.with_suffix(".tmp").write_text(text)
            file.with_suffix(".tmp").replace(file)


def require_existing(environment):
    """The parts of a given environment that are its owner's choice must be there."""
    absent = [n for n in ("torch", "torchvision", "detectron2") if not environment.has(n)]
    if absent:
        stop(
            f"{environment.python} was asked for, but it has no {' and no '.join(absent)}. Install "
            "what fits the machine there, or run without PYTHON= for an environment with all of it."
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", help="an existing interpreter instead of the own .venv")
    given = parser.parse_args().python
    if given:
        given = shutil.which(given) or stop(f"there is no Python at {given}; give PYTHON= a path.")
    # abspath, not resolve: the interpreter of a virtual environment is a link out of it.
    own = given is None or Path(os.path.abspath(given)).parent.parent == VENV
    if own and sys.version_info < (3, 10):
        stop(f"kd_det needs Python >= 3.10, but {sys.executable} is {sys.version.split()[0]}. "
             "Run `make setup BASE_PYTHON=/path/to/python`.")  # fmt: skip
    environment = own_environment() if own else Environment(os.path.abspath(given), own=False)
    if environment.version < [3, 10]:
        stop(f"kd_det needs Python >= 3.10, but {environment.python} is older.")

    if not own:
        require_existing(environment)
    # torch first, as Detectron2's build asks for it.
    order = [BUILD_TOOLS, *([read("torch.txt")] if own else []), read("base.txt"), read("dev.txt")]
    for requirements in order:
        if missing := environment.missing(requirements):
            environment.install(missing)
    if own and not environment.has("detectron2"):
        # Hash-pinned and without its declared dependencies: base.txt has those that are needed.
        environment.pip_install(
            {"detectron2"}, "--no-deps", "--no-build-isolation", "--use-pep517",
            "--requirement", "requirements/detectron2.txt",
        )  # fmt: skip
    package = Path(environment.origins["detectron2"]).parent
    if own and VENV in package.parents:  # not a checkout that was installed there
        place_stub(package)
    if environment.origins["kd_det"] != str(ROOT / "kd_det" / "__init__.py"):
        environment.pip_install({"kd-det"}, "--no-deps", "--no-build-isolation", "--editable", ".")
    report(environment)


def report(environment):
    """Print what was chosen."""
    names = ["kd-det", "torch", "torchvision", "detectron2"]
    rest = [*BUILD_TOOLS, *read("base.txt"), *read("dev.txt")]
    print(f"\n{environment.python} (Python {'.'.join(map(str, environment.version))})")
    for name in [*names, *sorted(name_of(r) for r in rest)]:
        version = environment.dists.get(name, "by another package")
        did = "kept" if environment.before.get(name) == environment.dists.get(name) else "installed"
        print(f"  {name:24} {version:24} {did}")
    for requirement in rest:
        # pip's own upper bound matters only where we install Detectron2.
        name = name_of(requirement)
        if name in environment.dists and name != "pip" and environment.unmet.get(requirement):
            print(f"  note: kd_det asks for {requirement}; what is there was left alone")


if __name__ == "__main__":
    main()
