"""The house rules: which way imports point, what a file may hold, and that nothing is read back from a pickle."""

import ast
import re
from pathlib import Path

import pytest

import library

ROOT = Path(__file__).resolve().parents[1]
ENTRY_FILES = [path for path in (ROOT / "train.py", ROOT / "inference.py") if path.exists()]
SOURCES = sorted(
    [*ROOT.glob("library/**/*.py"), *ROOT.glob("dataset/**/*.py"), *ROOT.glob("scripts/**/*.py"), *ENTRY_FILES]
)
PYTHON_FILES = sorted([*SOURCES, *ROOT.glob("tests/**/*.py")])

# Each package may import from those named, and from itself. What isn't named here is free.
ALLOWED = {
    "library.flux": {"library.errors", "library.files"},
    "library.jointdit": {"library.errors", "library.files", "library.flux", "library.modality"},
}
# Sampling and the tasks come after the model in the ladder; they know nothing of commands.
NO_COMMAND_LINE = [
    "library.flux",
    "library.jointdit",
    "library.sampling",
    "library.flow",
    "library.timesteps",
    "library.tasks",
]
COMMAND_LINE = {"library.args", "library.training_args", "library.flags", "library.cli", "library.pipeline"}


def name_of(path: Path) -> str:
    """Return the dotted name a file is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Return all modules a file imports anywhere, `from x import y` as both x and x.y."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def inside(module: str, packages: set[str] | list[str]) -> bool:
    """Whether a module is one of the packages or lies in one."""
    return any(module == package or module.startswith(package + ".") for package in packages)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_library_imported_is_ours():
    # The sd-scripts world has another package called `library`.
    assert Path(library.__file__).resolve() == ROOT / "library" / "__init__.py"


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package):
    allowed = ALLOWED[package] | {package}
    for path in SOURCES:
        if inside(name_of(path), [package]):
            ours = {
                module
                for module in imports_of(path)
                if inside(module, ["library", "dataset", "scripts", "train", "inference"])
            }
            wrong = {module for module in ours if module != "library" and not inside(module, allowed)}
            assert not wrong, f"{relative(path)} imports {sorted(wrong)}"


def test_library_never_imports_dataset_or_entry_files():
    for path in SOURCES:
        if inside(name_of(path), ["library"]):
            wrong = {
                module for module in imports_of(path) if inside(module, ["dataset", "scripts", "train", "inference"])
            }
            assert not wrong, f"{relative(path)} imports {sorted(wrong)}"


def test_model_and_sampler_know_no_command_line():
    for path in SOURCES:
        if inside(name_of(path), NO_COMMAND_LINE):
            wrong = {module for module in imports_of(path) if inside(module, COMMAND_LINE | {"argparse"})}
            assert not wrong, f"{relative(path)} imports {sorted(wrong)}"


def test_nothing_but_tests_imports_entry_files():
    for path in SOURCES:
        wrong = {module for module in imports_of(path) if module in ("train", "inference")}
        assert not wrong, f"{relative(path)} imports {sorted(wrong)}"


def test_the_backbone_never_speaks_of_the_second_modality():
    for path in (ROOT / "library" / "flux").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        # `depth` is also what FLUX.1's configuration calls its number of blocks: a name, never a word in a text.
        texts = [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        said = [
            text
            for text in texts
            if re.search(r"\bdisparit|\bdepth (map|modality|latent|branch|image)", text, re.IGNORECASE)
        ]
        assert not said, f"{relative(path)}: {said}"
        assert not [name for name in names if "disparity" in name or "modality" in name], relative(path)


@pytest.mark.parametrize("path", PYTHON_FILES, ids=relative)
def test_files_stay_short(path):
    assert path.name not in ("utils.py", "helpers.py", "common.py", "misc.py"), "name a file after what it holds"
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 350, f"{lines} lines: make two files of it"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_pickles(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            where = f"{relative(path)}:{node.lineno}"
            assert called not in ("torch.save", "pickle.load", "pickle.loads", "pickle.dump", "pickle.dumps"), where
            if called == "torch.load":  # only for files that others made, and only as plain tensors
                safe = [word for word in node.keywords if word.arg == "weights_only"]
                assert safe and ast.unparse(safe[0].value) == "True", f"{where}: torch.load without weights_only=True"
            if called.split(".")[-1] == "load" and "np" in called.split("."):
                assert not any(
                    word.arg == "allow_pickle" and ast.unparse(word.value) != "False" for word in node.keywords
                ), where


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_randomness_comes_from_generators(path):
    drawing = {"randn", "rand", "randint", "randperm", "randn_like", "rand_like", "normal", "multinomial", "bernoulli"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = ast.unparse(node.func)
            where = f"{relative(path)}:{node.lineno}: {called}"
            keyed = re.match(r"(np|numpy)\.random\.(Generator|Philox|SeedSequence)\b", called)
            assert keyed or not called.startswith(("random.", "np.random.", "numpy.random.")), where
            # New layers draw their start from the global generator: only what trains the embedded model may seed it.
            if not path.is_relative_to(ROOT / "scripts" / "tiny"):
                assert called not in ("torch.manual_seed", "torch.cuda.manual_seed", "torch.cuda.manual_seed_all"), (
                    where
                )
            if called.startswith("torch.") and node.func.attr in drawing:
                assert any(word.arg == "generator" for word in node.keywords), f"{where} without generator="


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_names_chosen_by_if(path):
    """A backbone, modality, task or benchmark is a row of a table; `if name == ...` elsewhere is a fault."""
    rows = {"joint_generation", "depth_estimation", "depth_to_image"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare):
            named = {item.value for item in ast.walk(node) if isinstance(item, ast.Constant) and item.value in rows}
            assert not named, f"{relative(path)}:{node.lineno}: compares with {sorted(named)}"


def test_tasks_and_modalities_are_tables():
    from library.modality import MODALITIES
    from library.tasks import TASKS

    assert set(TASKS) == {"joint_generation", "depth_estimation", "depth_to_image"}
    assert list(MODALITIES)[:2] == ["rgb", "depth"]
    assert {task.given for task in TASKS.values()} <= {None, *MODALITIES}
