"""The rooms of kd_det: imports go down only, every public name is documented, files stay short."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kd_det

ROOT = Path(kd_det.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# From the ground up. A room imports rooms before it; a package is one room, whose files may import
# each other in any order that works.
ORDER = [
    "_stub_C",
    "_compat",
    "registry",
    "rng",
    "paths",
    "losses",
    "schedules",
    "connectors",
    "taps",
    "classes",
    "detectors",
    "labels",
    "context",
    "boxes",
    "regions",
    "pairing",
    "channels",
    "sources",
    "terms",
    "inherit",
    "wiring",
    "kd_state",
    "diagnostics",
    "distiller",
    "fields",
    "data",
    "config",
    "record",
    "build",
    "plan",
    "engine",
    "tools",
    "__init__",
    "__main__",
]


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def typing_only(tree):
    """Nodes under `if TYPE_CHECKING:`, which nothing runs."""
    blocks = [
        node.body
        for node in ast.walk(tree)
        if isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    ]
    return {inner for body in blocks for stmt in body for inner in ast.walk(stmt)}


def imports(path):
    """Dotted names of everything that a file imports, wherever in the file."""
    tree = ast.parse(path.read_text())
    skipped = typing_only(tree)
    found = []
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            if node.module == "kd_det":  # the rooms themselves, or public names
                found += [f"kd_det.{alias.name}" for alias in node.names]
            else:
                found.append(node.module)
    return found


def rooms_imported(path):
    names = [name.split(".") for name in imports(path)]
    mine = [parts for parts in names if parts[0] == "kd_det"]
    # `import kd_det` and `from kd_det import Teacher` are the table of contents.
    return {parts[1] if len(parts) > 1 and parts[1] in ORDER else "__init__" for parts in mine}


def test_the_order_names_every_room():
    assert len(FILES) > 30
    assert {room(path) for path in FILES} <= set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path):
    here = ORDER.index(room(path))
    above = {name for name in rooms_imported(path) if ORDER.index(name) > here}
    assert not above, f"{path.relative_to(ROOT)} imports from above: {', '.join(sorted(above))}"


def test_losses_import_torch_alone():
    for path in (ROOT / "losses").glob("*.py"):
        # The one file that is opened only where its backend is asked for.
        allowed = {"torch", "triton"} if path.name == "channel_wise_triton.py" else {"torch"}
        outside = {
            name.split(".")[0]
            for name in imports(path)
            if not name.startswith("kd_det.losses")
            and name.split(".")[0] not in sys.stdlib_module_names
        }
        assert outside <= allowed, path


def test_the_triton_kernel_is_not_imported_with_the_package():
    code = "import sys, kd_det; assert 'kd_det.losses.channel_wise_triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cfg_is_not_visible_below_the_config():
    # Detectron2's config system is for config, build and what is above them, and for the one file
    # that builds a model from a config file.
    allowed = {"data", "config", "record", "build", "plan", "engine", "tools"}
    for path in FILES:
        if room(path) not in allowed and path.name != "model_config.py":
            assert not [n for n in imports(path) if n.startswith("detectron2.config")], path


def test_the_walk_sees_an_import_from_above(tmp_path, monkeypatch):
    (tmp_path / "losses").mkdir()
    bad = tmp_path / "losses" / "bad.py"
    bad.write_text("def f():\n    from kd_det.terms import CWD\n    import kd_det\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert rooms_imported(bad) == {"terms", "__init__"}
    with pytest.raises(AssertionError, match=r"bad\.py imports from above: __init__, terms"):
        test_imports_go_down_only(bad)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_public_name_has_a_docstring(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path} has no docstring"
    bare = []
    for parent in ast.walk(tree):
        if not isinstance(parent, (ast.Module, ast.ClassDef)):
            continue
        if isinstance(parent, ast.ClassDef) and parent.name.startswith("_"):
            continue
        for node in parent.body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            # An override without its own (D102) takes the base class's, as Python's help() does.
            inherits = isinstance(parent, ast.ClassDef) and parent.bases
            if not ast.get_docstring(node) and not inherits:
                bare.append(node.name)
    assert not bare, f"{path.relative_to(ROOT)}: {', '.join(bare)}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_longer_than_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400
