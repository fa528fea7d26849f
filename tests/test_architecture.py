"""The structure of the package: which module may import which, and which folder may use which library."""

import ast
import pathlib
from collections import defaultdict
from collections.abc import Iterator

import pytest

pytestmark = pytest.mark.smoke

# A module imports only from earlier layers, and within its own layer only from its own folder. A module that is not
# listed has the layer of its folder.
RUN_BASICS = ("run.console", "run.machine", "run.schema", "run.signals")
LAYERS = [
    ["errors"],
    ["checks", "external", "rng", "metrics", "sharding", "templates", "ops", *RUN_BASICS],
    ["models", "optimizer", "losses", "logged", "data.registry", "data.pens", "data.framing"],
    ["data.augment"],
    ["sections"],
    ["config"],
    [
        "preset",
        "network",
        "data",
        "run.workdir",
        "run.compilation",
        "run.provenance",
        "run.processes",
        "run.checkpoint_files",
        "pictures",
    ],
    ["cli", "step", "run.progress", "run.weights", "run.log"],
    ["drivers", "memory"],
    ["pacing"],
    ["run"],
    ["analysis"],
    ["exporting", "distillation"],
    ["members"],
    ["train"],
    ["main", "evaluate", "report", "predict", "population", "export", "demo", "robustness", "__main__"],
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
assert len(LAYER) == sum(map(len, LAYERS)), "a module is in two layers"
VERBS = LAYERS[-1]

# Each of these libraries is used in one folder, or nowhere.
PLACES = {
    "tensorflow_datasets": {"data"},
    "orbax": {"run"},
    "matplotlib": {"analysis"},
    "tensorboardX": {"run"},
    "onnx": {"exporting"},
    "onnxruntime": {"exporting"},
    "tensorflow": set[str](),
    "pickle": set[str](),
}
LAZY = {
    *("tensorflow_datasets", "orbax", "matplotlib", "sklearn", "scipy", "skimage", "PIL", "tensorboardX"),
    *("onnx", "onnxruntime", "safetensors", "jinja2"),
}
NAMED_AFTER_OPERATIONS = {"exporting.primitives", "exporting.reference"}  # one function for each operation
LONGEST_MODULE, LONGEST_FUNCTION = 350, 60  # lines

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "mnist_flax"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
IDS = [str(path.relative_to(PACKAGE)) for path in FILES]


def module_of(path: pathlib.Path) -> str:
    """The dotted name of a module within the package; for an __init__.py, that of its folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


def layer_of(module: str) -> int:
    """The layer of a module: its own, or that of its folder."""
    for name in (module, module.split(".")[0]):
        if name in LAYER:
            return LAYER[name]
    raise AssertionError(f"{module} has no layer: add it to LAYERS")


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module or name that is imported anywhere in a file, dotted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the arrows"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parse(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text())


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_a_module_imports_only_from_lower_layers(path: pathlib.Path) -> None:
    own = module_of(path)
    for name in imports(parse(path)):
        package, _, rest = name.partition(".")
        assert package not in ("configs", "scripts", "tests"), f"{own} imports {package}"
        if package != "mnist_flax" or rest == "__version__":
            continue
        other = rest if rest in MODULES else rest.rpartition(".")[0]
        same_folder = other.split(".")[0] == own.split(".")[0] and own not in VERBS
        assert layer_of(other) < layer_of(own) or (same_folder and layer_of(other) == layer_of(own)), (
            f"{own} imports {other}"
        )


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_libraries_are_used_in_one_place(path: pathlib.Path) -> None:
    folder = module_of(path).split(".")[0]
    for name in imports(parse(path)):
        assert folder in PLACES.get(name.split(".")[0], {folder}), f"{module_of(path)} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_heavy_libraries_are_not_imported_at_the_top(path: pathlib.Path) -> None:
    at_the_top = ast.Module([node for node in parse(path).body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    if module_of(path).startswith("pictures"):
        return  # this folder is imported only when a picture is read
    for name in imports(at_the_top):
        assert name.split(".")[0] not in LAZY, f"{module_of(path)} imports {name} at its top"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_importing_a_module_defines_no_flag_and_no_import_is_hidden(path: pathlib.Path) -> None:
    tree = parse(path)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.If):
            continue  # not run on import; the `if`s are checked below
        calls = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)]
        names = [call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls]
        assert not [name for name in names if name.startswith("DEFINE_")]
    conditions = [ast.unparse(node.test) for node in tree.body if isinstance(node, ast.If)]
    assert set(conditions) <= {"__name__ == '__main__'"}  # so no TYPE_CHECKING block hides a cycle
    mentions = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "import_module" not in mentions, "choose from a dict that can be read"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_no_private_name_is_used_in_another_module(path: pathlib.Path) -> None:
    for name in imports(parse(path)):
        if name.startswith("mnist_flax."):
            assert not name.rpartition(".")[2].startswith("_"), f"{module_of(path)} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_modules_and_functions_are_short(path: pathlib.Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST_MODULE
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno:
            length = node.end_lineno - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{node.name} has {length} lines"


def test_a_public_name_means_one_thing() -> None:
    places = defaultdict(set)
    for path in FILES:
        for node in parse(path).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].add(module_of(path))
    for names in places.values():
        names -= NAMED_AFTER_OPERATIONS
    # All verbs define the same functions, and so do the export formats.
    alike = [{*VERBS, "cli"}, {"exporting.onnx", "exporting.stablehlo", "exporting.numpy_program"}]
    shared = {name: found for name, found in places.items() if not any(found <= group for group in alike)}
    assert not {name: found for name, found in shared.items() if len(found) > 1}
