"""The arrow of dependency, held by reading the imports, and the README's tree, held by asking git."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nanocnn"

# Who may see whom inside nanocnn. A name stands for a file or a folder; `kernels.dispatch` is less than `kernels`.
CORE = {"kernels", "tensor", "random"}
SEES = {
    "kernels": {"kernels"},
    "random": {"kernels"},
    "tensor": {"kernels.dispatch", "kernels.narrow"},
    "buckets": {"kernels.dispatch", "tensor"},
    "functional": {*CORE, "functional"},
    "init": CORE,
    "nn": {*CORE, "init", "functional", "state"},
    "state": {"kernels.dispatch"},
    "models": {*CORE, "init", "functional", "nn", "models"},
}
BESIDE = (
    "optim schedules parallel data checkpoint profile doctor machine "
    "ema early_stopping metrics progress record precision bench roofline example_calls"
)
NEVER = {  # these see arrays, tensors and the board: what they must not reach for
    name: {"functional", "nn", "models", "train"} for name in BESIDE.split()
}
ONLY_SCRIPTS_SEE = {"__main__", "testing"}


def sources(*folders):
    for folder in folders:
        yield from sorted(p for p in (ROOT / folder).rglob("*.py") if "nanocnn/kernels" not in p.as_posix())


def part_of(path):
    """nanocnn/optim.py -> "optim"; nanocnn/data/loader.py -> "data"; kernels/conv2d.py -> "kernels"."""
    inside = path.relative_to(ROOT).with_suffix("").parts
    return inside[0] if inside[0] == "kernels" else inside[1]


def imports(path, text=None):
    """The modules that a file imports, by full name: `from . import nn` in nanocnn/ is `nanocnn.nn`.

    Imports inside functions count, those for type checkers alone do not.
    """
    inside = path.relative_to(ROOT).parts[:-1]
    package = ["nanocnn", *inside] if inside[:1] == ("kernels",) else list(inside)
    tree = ast.parse(text if text is not None else path.read_text(), str(path))
    typing_only = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            typing_only |= {id(n) for statement in node.body for n in ast.walk(statement)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            found |= {".".join([*base, alias.name]) for alias in node.names}
    return found


def inner(path):
    """What a file imports of nanocnn, without that word: {"kernels.dispatch.span", "tensor.Tensor"}."""
    return {name.removeprefix("nanocnn.") for name in imports(path) if name.split(".")[0] == "nanocnn"} - {"nanocnn"}


def under(name, allowed):
    return any(name == a or name.startswith(a + ".") for a in allowed)


ours = [p for p in sources("kernels", "nanocnn") if p.name != "__init__.py" or p.parent != PACKAGE]


def test_the_reader_of_imports_reads():
    text = (
        "import os.path, nanocnn.nn\nfrom . import threads\nfrom .dispatch import span\nfrom ..tensor import Tensor\n"
        "if TYPE_CHECKING:\n    from ..models import alexnet\ndef f():\n    from ... import outside\n"
    )
    assert imports(ROOT / "nanocnn" / "data" / "x.py", text) == {
        *("os.path", "nanocnn.nn", "nanocnn.data.threads", "nanocnn.data.dispatch.span", "nanocnn.tensor.Tensor"),
        "outside",
    }
    assert "nanocnn.tensor.Tensor" in imports(ROOT / "kernels" / "x.py", text)
    assert len(ours) > 10


@pytest.mark.parametrize("path", ours, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_arrow_of_dependency(path):
    part, seen = part_of(path), inner(path)
    if part in SEES:
        wrong = {name for name in seen if not under(name, SEES[part])}
        assert not wrong, f"{part} may import {sorted(SEES[part])} of nanocnn, and imports {sorted(wrong)}"
    wrong = {name for name in seen if under(name, NEVER.get(part, set()))}
    assert not wrong, f"{part} stands below {sorted(wrong)} and must not import them"
    if part not in ONLY_SCRIPTS_SEE:
        wrong = {name for name in seen if under(name, ONLY_SCRIPTS_SEE)}
        assert not wrong, f"only scripts and tests import {sorted(wrong)}"


def test_kernels_import_nothing_above_them_by_another_name():
    for path in sources("kernels"):
        wrong = {name for name in imports(path) if name.split(".")[0] in ("nanocnn", "experiments", "tests")}
        wrong = {name for name in wrong if not name.startswith("nanocnn.kernels")}
        assert not wrong, f"{path.name} imports {sorted(wrong)}: kernels/ is the ground floor"


def test_nobody_imports_kernels_by_its_folder():
    """`import kernels` would load every kernel a second time, under a second board."""
    for path in sources("kernels", "nanocnn", "tests", "experiments", "data"):
        wrong = {name for name in imports(path) if name.split(".")[0] == "kernels"}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}: it is nanocnn.kernels"


def test_kernels_is_a_symlink():
    assert (PACKAGE / "kernels").is_symlink()
    assert (PACKAGE / "kernels").resolve() == ROOT / "kernels"


def test_training_needs_no_mpi_to_be_imported():
    """mpi4py initialises MPI when it is imported: only inside a function, once it is known that there are ranks."""
    for path in sources("kernels", "nanocnn"):
        top = ast.parse(path.read_text()).body
        names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
        for optional in ("mpi4py", "cupy", "torch", "tensorboard"):
            assert not any(under(name, {optional}) for name in names), (
                f"{path.relative_to(ROOT)} imports {optional}, which is optional"
            )


# ------------------------------------------------------------------ the README's tree


def tree_of(text):
    """The paths that the README's tree names: the first fenced block with a line that begins with `nanocnn/`.

    A line is a name, then what it is; deeper lines are inside the last folder (name ending in `/`) above them. Lines
    drawing the tree (`|--`, box characters) are understood.
    """
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.M | re.S)
    block = next((b for b in blocks if re.search(r"^\W*nanocnn/", b, re.M)), "")
    paths, folders = set(), []
    for line in block.splitlines():
        match = re.match(r"[\s│├└─|`-]*", line)
        name = line[match.end() :].split(" ")[0]
        if not name:
            continue
        while folders and folders[-1][0] >= match.end():
            folders.pop()
        path = "".join(folder for _, folder in folders) + name
        paths.add(path)
        if name.endswith("/"):
            folders.append((match.end(), name))
    return paths


def differences(tree, files):
    """(in the tree and not in git, in git and not in the tree).

    A folder without lines of its own stands for all that is in it. Hidden files, package markers and the README itself
    need no line.
    """
    leaves = {path for path in tree if path.endswith("/") and not any(p != path and p.startswith(path) for p in tree)}
    known = files | {str(parent) + "/" for f in files for parent in Path(f).parents if str(parent) != "."}
    gone = {path for path in tree if path not in known and path.rstrip("/") not in known}
    missing = set()
    for f in files:
        quiet = any(part.startswith(".") for part in Path(f).parts) or Path(f).name in ("__init__.py", "README.md")
        if not quiet and f not in tree and f + "/" not in tree and not any(f.startswith(leaf) for leaf in leaves):
            missing.add(f)
    return gone, missing


def test_the_reader_of_trees_reads():
    text = """
```sh
pip install -e .
```
```
pyproject.toml    what to install
nanocnn/          tensors
  tensor.py       Tensor, Op
  data/           sets
    loader.py     batches
  kernels         a symlink
kernels/          arrays
tests/            one for each file
```
"""
    tree = tree_of(text)
    assert tree == {
        *("pyproject.toml", "nanocnn/", "nanocnn/tensor.py", "nanocnn/data/", "nanocnn/data/loader.py"),
        *("nanocnn/kernels", "kernels/", "tests/"),
    }
    boxes = "```\n.\n├── nanocnn/   x\n│   ├── tensor.py   x\n│   └── data/  x\n└── LICENSE\n```"
    assert tree_of(boxes) - {"."} == {"nanocnn/", "nanocnn/tensor.py", "nanocnn/data/", "LICENSE"}
    files = {"pyproject.toml", "nanocnn/tensor.py", "nanocnn/data/loader.py", "nanocnn/kernels", "kernels/conv2d.py"}
    files |= {"tests/test_x.py", ".ci/run", "README.md", "nanocnn/__init__.py"}
    assert differences(tree, files) == (set(), set())
    assert differences(tree, files | {"nanocnn/nn.py"}) == (set(), {"nanocnn/nn.py"})
    assert differences(tree | {"LICENSE", "docs/"}, files) == ({"LICENSE", "docs/"}, set())


def test_the_readme_tree_equals_the_files_in_git():
    readme = ROOT / "README.md"
    tree = tree_of(readme.read_text()) if readme.exists() else set()
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, timeout=60)
        files = set(listed.stdout.split("\0")) - {""} if listed.returncode == 0 else set()
    except FileNotFoundError:
        files = set()
    if not tree or not files:  # no tree yet; or no git, as in an unpacked archive: nothing to compare with
        return
    gone, missing = differences(tree - {"."}, files)
    assert not gone, f"README.md's tree names what is not in git: {sorted(gone)}"
    assert not missing, f"README.md's tree lacks: {sorted(missing)}"
