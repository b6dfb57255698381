"""The walls of the house: which room may import which. Read from the source with `ast`, nothing is executed."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "vmod_jax"

# From the cellar to the roof: a room imports rooms above it in this list and no others. Files that lie beside the rooms
# are rooms of their own.
ORDER = (
    "errors", "machine", "caches", "compression", "models", "workdir", "data", "training", "weights", "streaming", "lm",
    "", "evaluation", "study", "report", "performance", "commands", "__main__",
)  # fmt: skip

# Beside the order, what a room must do without although it lies below.
WALLS = {
    "data": {"models", "workdir"},
    "streaming": {"training", "weights", "workdir"},
    "report": set(ORDER),
    "performance": {"study", "report"},
    "study": {"report"},
}
DOOR = {"": {"lm"}, "__main__": {"commands"}}


def room(module: str) -> str:
    """ "vmod_jax.models.llama" -> "models"; the package itself is ""."""
    return [*module.split("."), ""][1]


def imports(tree: ast.AST) -> set[str]:
    """Modules of the package that a file imports, inside functions too; what only a type checker sees is left out."""
    unseen = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            module = node.module or ""
            names = [alias.name for alias in node.names if not alias.name.startswith("__")]  # not __version__
            found |= {f"vmod_jax.{name}" for name in names} if module == "vmod_jax" else {module}
    return {name for name in found if name.split(".")[0] == "vmod_jax"}


def arrows(package: Path) -> dict[str, set[str]]:
    """{room: rooms that it imports}, itself not among them."""
    found: dict[str, set[str]] = {}
    for file in sorted(package.rglob("*.py")):
        module = ".".join(("vmod_jax", *file.relative_to(package).with_suffix("").parts)).removesuffix(".__init__")
        here = room(module)
        if "torch_runtime" in module:
            continue  # it is shipped with exported models and knows nothing of the package
        found.setdefault(here, set()).update(
            there for name in imports(ast.parse(file.read_text())) if (there := room(name)) != here
        )
    return found


@pytest.fixture(scope="module")
def rooms() -> dict[str, set[str]]:
    return arrows(PACKAGE)


def test_every_room_has_its_place_in_the_order(rooms):
    assert rooms.keys() <= set(ORDER)


def test_a_room_imports_only_what_lies_below_it(rooms):
    """No circles follow from it."""
    for here, there in rooms.items():
        above = {name for name in there if ORDER.index(name) > ORDER.index(here)} - DOOR.get(here, set())
        assert not above, f"{here or 'the package'} imports {sorted(above)}"


def test_walls(rooms):
    for here, walled in WALLS.items():
        allowed = {"errors", "caches"} if here == "report" else set()
        assert not (rooms.get(here, set()) & walled) - allowed, f"{here} imports {sorted(rooms[here] & walled)}"


def test_only_the_doors_import_commands(rooms):
    assert {here for here, there in rooms.items() if "commands" in there} <= {"__main__"}


def test_commands_share_their_options_and_nothing_else():
    """A command is a file that the cli alone calls; what several of them need is a library, or an option."""
    for file in sorted((PACKAGE / "commands").glob("*.py")):
        names = {name for name in imports(ast.parse(file.read_text())) if name.startswith("vmod_jax.commands")}
        assert names <= {"vmod_jax.commands.options"}, f"{file.name} imports {sorted(names)}"


def test_a_wall_that_is_broken_is_seen(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "llama.py").write_text("def late():\n    from vmod_jax.training import loop\n")
    assert arrows(tmp_path) == {"models": {"training"}}
