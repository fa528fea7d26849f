"""The arrows of the design: who may import whom, and who may mention what."""

import ast
import pathlib
from collections.abc import Iterator

import pytest

# A module imports only from lower layers. `errors` is the ground all stand on.
LAYERS = [
    ["errors"],
    [
        "config",
        "rng",
        "ops",
        "metrics",
        "sharding",
        "processes",
        "datasets",
        "pictures",
        "compilation",
        "workdir",
        "signals",
        "provenance",
    ],
    ["data", "model", "augment", "optimizer", "batches", "labels", "cli"],
    ["step"],
    ["checkpoint"],
    ["evaluate"],
    ["logs"],
    ["report"],
    ["train", "predict", "export"],
    ["main", "population"],
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}

# Heavy or delicate libraries, each behind one room.
ROOMS = {
    "tensorflow_datasets": {"data", "datasets"},
    "orbax": {"checkpoint"},
    "matplotlib": {"report"},
    "tensorboardX": {"logs"},
    "tensorflow": set[str](),
    "pickle": set[str](),
}
LAZY = ("tensorflow_datasets", "orbax", "matplotlib", "sklearn", "scipy", "skimage", "PIL", "tensorboardX")
WITH_FILES = {"pictures", "compilation", "config", "data", "datasets", "provenance", "workdir"}

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "mnist_flax"


def room(path: pathlib.Path) -> str:
    """The module, or the folder that a module has become."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
IDS = [str(path.relative_to(PACKAGE)) for path in FILES]


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported anywhere in a file, dotted."""
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
    own = room(path)
    assert own in LAYER, f"{own} has no layer: place it in LAYERS"
    for name in imports(parse(path)):
        package, _, rest = name.partition(".")
        if package == "mnist_flax" and rest and rest != "__version__":
            other = rest.split(".")[0]
            assert other == own or LAYER[other] < LAYER[own], f"{own} imports {other}"
        assert package not in ("configs", "scripts", "tests"), f"{own} imports {package}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_libraries_stay_in_their_rooms(path: pathlib.Path) -> None:
    for name in imports(parse(path)):
        library = name.split(".")[0]
        assert room(path) in ROOMS.get(library, {room(path)}), f"{room(path)} imports {library}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_heavy_libraries_are_imported_where_they_are_used(path: pathlib.Path) -> None:
    at_the_top = ast.Module([node for node in parse(path).body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    if room(path) == "pictures":
        return  # it is about nothing but Pillow's pictures, and is itself imported only when one is read
    for name in imports(at_the_top):
        assert name.split(".")[0] not in LAZY, f"{room(path)} imports {name} at its top"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_no_flag_is_defined_on_import_and_nothing_is_hidden(path: pathlib.Path) -> None:
    tree = parse(path)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.If):
            continue  # not run on import, or only under __main__, which the next test looks at
        calls = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)]
        names = [call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls]
        assert not [name for name in names if name.startswith("DEFINE_")]
    conditions = [ast.unparse(node.test) for node in tree.body if isinstance(node, ast.If)]
    assert set(conditions) <= {"__name__ == '__main__'"}  # so no TYPE_CHECKING block hides a circle
    mentions = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "import_module" not in mentions, "choose from a dict that can be read"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_the_lower_layers_touch_no_files(path: pathlib.Path) -> None:
    if LAYER[room(path)] > LAYER["step"] or room(path) in WITH_FILES:
        return
    calls = [node.func for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]
    names = {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls}
    assert not names & {"open", "read_text", "read_bytes", "write_text", "write_bytes", "mkdir", "unlink"}
