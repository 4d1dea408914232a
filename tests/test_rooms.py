"""The rooms of the source tree: who may import whom, what C++ may include, how long a file may be.

Everything here is read from the text of the files; nothing is imported.
"""

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES = 400

FLOORS: tuple[tuple[str, ...], ...] = (
    ("kernels", "storage"),
    ("ops", "data"),
    ("measurement", "layers"),
    ("exits",),
    ("towers",),
    ("quantization",),
    ("zoo", "model"),
    ("calibration",),
    ("evaluation", "serving"),
    ("diagnostics", "study"),
    ("cli",),
    ("__init__", "__main__"),
)
"""Low to high. A file imports from lower floors only, or from its own room."""

FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

TORCH_ONLY = {"kernels": {"torch", "triton"}}
"""Rooms that may import nothing but these and the standard library."""

KNOWS_TOWERS = {"towers"}
HUB_PACKAGES = {"open_clip", "timm", "transformers", "huggingface_hub"}

CORE = {"torch", "triton", "open_clip", "numpy", "safetensors", "tqdm", "typer"}
EXTRA = {
    "evaluation": {"clip_benchmark", "mteb", "nncf", "openvino"},
    "data": {"simplejpeg", "pillow_heif"},
    "calibration": {"sklearn", "scipy"},
    "study": {"sklearn", "scipy", "jinja2", "matplotlib"},
    "serving": {
        "starlette",
        "orjson",
        "prometheus_client",
        "pybase64",
        "pyarrow",
        "faiss",
        "ray",
    },
    "cli": {
        "starlette",
        "orjson",
        "prometheus_client",
        "pybase64",
        "python_multipart",
        "uvicorn",
    },
}
"""Imports inside functions that an extra of the package installs, by room."""

BROUGHT_BY_CORE = {
    "torchvision": "open_clip",
    "timm": "open_clip",
    "PIL": "open_clip",
    "rich": "typer",
}
"""Imports that the package's dependencies install, and which of them does."""


@dataclass(frozen=True)
class Source:
    """One Python file of the package: its room and the modules that it imports."""

    path: Path
    room: str
    imports: frozenset[str]

    @property
    def rooms(self) -> set[str]:
        """The rooms of lraee that this file imports from, its own left out."""
        parts = [name.split(".") for name in self.imports if name.split(".")[0] == "lraee"]
        return {part[1] if len(part) > 1 else "__init__" for part in parts} - {self.room}

    @property
    def packages(self) -> set[str]:
        """Top-level packages outside lraee and the standard library."""
        tops = {name.split(".")[0] for name in self.imports}
        return tops - {"lraee"} - set(sys.stdlib_module_names)


def _imports(tree: ast.AST) -> Iterator[str]:
    """Every module that a file imports, wherever in it; `from lraee import x` counts as lraee.x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write it in full"
            assert node.module is not None
            if node.module in ("lraee", "lraee.kernels"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


def _room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "kernels" else parts[1]


def _sources() -> list[Source]:
    paths = sorted([*(ROOT / "lraee").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
    paths = [path for path in paths if ROOT / "lraee" / "kernels" not in path.parents]
    return [
        Source(path, _room(path), frozenset(_imports(ast.parse(path.read_text()))) - {"lraee._C"})
        for path in paths
    ]


SOURCES = _sources()


def _files(*suffixes: str) -> list[Path]:
    rooms = ("lraee", "kernels", "csrc", "tests", "bench", "scripts")
    files = (path for room in rooms for path in (ROOT / room).rglob("*"))
    return sorted(path for path in files if path.suffix in suffixes)


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


each_source = pytest.mark.parametrize("source", SOURCES, ids=lambda s: _name(s.path))


@each_source
def test_file_has_a_floor(source: Source) -> None:
    assert source.room in FLOOR_OF, f"{source.room} must have a floor in FLOORS"


@each_source
def test_imports_go_down(source: Source) -> None:
    upward = {room for room in source.rooms if FLOOR_OF[room] >= FLOOR_OF[source.room]}
    assert not upward, f"{_name(source.path)} must import from lower floors only, got {upward}"


@each_source
def test_packages_are_dependencies(source: Source) -> None:
    assert set(BROUGHT_BY_CORE.values()) <= CORE
    extra = EXTRA.get(source.room, set())
    allowed = TORCH_ONLY.get(source.room, CORE | set(BROUGHT_BY_CORE) | extra)
    assert source.packages <= allowed, f"not declared: {source.packages - allowed}"
    if source.room not in KNOWS_TOWERS:
        assert not source.packages & HUB_PACKAGES, f"only {KNOWS_TOWERS} know of model hubs"


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("lraee", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_for_types(node: ast.stmt) -> bool:
    """Whether a statement is `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _cycle(imports: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, in order; empty if none do."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(imports.get(name, ())):
            if circle := visit(other, [*path, name]):
                return circle
        done.add(name)
        return []

    return next((circle for name in sorted(imports) if (circle := visit(name, []))), [])


def test_no_modules_import_each_other() -> None:
    """Imports inside functions count as well, those for a type checker alone do not; `from package
    import module` is the module.
    """
    modules = {_module(source.path) for source in SOURCES}
    imports: dict[str, set[str]] = {}
    for source in SOURCES:
        names = set()
        tree = ast.parse(source.path.read_text())
        tree.body = [node for node in tree.body if not _is_for_types(node)]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                whole = {f"{node.module}.{alias.name}" for alias in node.names} - {"lraee._C"}
                names |= {each if each in modules else node.module for each in whole}
        imports[_module(source.path)] = names & modules
    assert _cycle(imports) == []
    assert _cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_floors_are_read() -> None:
    """The reading works: known imports are found, and an upward one would be reported."""
    by_name = {_name(source.path): source for source in SOURCES}
    assert "kernels" in by_name["lraee/ops/registry.py"].rooms
    assert "torch" in by_name["lraee/ops/reference/rows.py"].packages
    assert set(_imports(ast.parse("def f():\n  from lraee import cli"))) == {"lraee.cli"}
    assert FLOOR_OF["cli"] > FLOOR_OF["ops"]


def test_only_kernels_speak_triton() -> None:
    speakers = {source.room for source in SOURCES if "triton" in source.packages}
    assert speakers == {"kernels"}


CPU = ROOT / "csrc" / "cpu"
CPU_FILES = sorted(path for path in CPU.rglob("*") if path.is_file())


@pytest.mark.parametrize("path", CPU_FILES, ids=_name)
def test_csrc_cpu_knows_no_tensors(path: Path) -> None:
    """csrc/cpu: raw pointers; the C++ standard library, immintrin and its own files only, and in
    isa.cpp the processor's and the system's word on what may run.
    """
    assert path.suffix in (".cpp", ".h"), f"{_name(path)} must be C++"
    own = {f'"{file.relative_to(ROOT / "csrc")}"' for file in CPU_FILES if file.suffix == ".h"}
    for line in re.findall(r"^\s*#\s*include\b(.*)", path.read_text(), re.MULTILINE):
        header = line.strip()
        is_standard = re.fullmatch(r"<[a-z_]+>", header) is not None
        is_probe = path == CPU / "isa.cpp" and header in (
            "<cpuid.h>", "<sys/syscall.h>", "<unistd.h>",
        )  # fmt: skip
        assert header in own or is_standard or is_probe or header == "<immintrin.h>", header


def test_csrc_cpu_has_a_folder_for_each_operator() -> None:
    """csrc/cpu/<operator>/<isa>.cpp computes what csrc/<operator>.cpp binds."""
    simd = sorted((CPU / "simd").glob("*.h"))
    isas = {p.stem for p in simd if f"LRAEE_BEGIN_{p.stem.upper()}" in p.read_text()} | {"scalar"}
    assert isas >= {"avx2", "avx512_vnni", "amx"}
    sources = [path for path in CPU_FILES if path.suffix == ".cpp" and path.name != "isa.cpp"]
    assert len(sources) > 20
    for path in sources:
        assert path.stem in isas, f"{_name(path)} must be named after an instruction set"
        assert (ROOT / "csrc" / f"{path.parent.name}.cpp").exists(), _name(path)


@pytest.mark.parametrize("path", _files(".py", ".cpp", ".h", ".inc", ".sh"), ids=_name)
def test_file_is_short(path: Path) -> None:
    count = len(path.read_text().splitlines())
    assert count <= MAX_LINES, f"must have at most {MAX_LINES} lines, got {count}; split by noun"


def test_nothing_prints_in_the_library() -> None:
    """The library logs; only the command line and Triton's own debugging may print."""
    for source in SOURCES:
        calls = [n for n in ast.walk(ast.parse(source.path.read_text())) if isinstance(n, ast.Call)]
        names = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
        assert "print" not in names or source.room == "cli", _name(source.path)


@pytest.mark.parametrize("path", sorted((ROOT / "lraee").rglob("__init__.py")), ids=_name)
def test_no_name_hides_a_module(path: Path) -> None:
    """A package that binds `x` where it has a module `x.py` would hide the module."""
    modules = {each.stem for each in path.parent.glob("*.py")} - {"__init__"}
    modules |= {each.name for each in path.parent.iterdir() if (each / "__init__.py").exists()}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert node.name not in modules, node.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                is_module = node.module == ".".join(path.parent.relative_to(ROOT).parts)
                assert is_module or (alias.asname or alias.name) not in modules, alias.name
