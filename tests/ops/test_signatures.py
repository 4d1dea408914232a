"""No function below the schema takes more than ten parameters: operands travel as records."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST = 10
FRONT_ENDS = ("lraee/cli/", "lraee/calibration/calibrate.py")
"""Commands and the public `calibrate`: keyword options of a user, no operands."""
SCHEMAS = "kernels/operands.py"
"""Its inner functions have the parameters of a schema, and are registered for it."""


def functions(path: Path) -> Iterator[tuple[ast.FunctionDef, bool]]:
    """Every function of a file, and whether it is inside another."""
    tree = ast.parse(path.read_text())
    inner = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for child in ast.walk(node)
        if child is not node and isinstance(child, ast.FunctionDef)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node, node in inner


def is_kernel(function: ast.FunctionDef) -> bool:
    decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
    return any(jit in text for text in decorators for jit in ("triton.jit", "gluon.jit"))


def count(function: ast.FunctionDef) -> int:
    arguments = function.args
    return len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)


def test_no_signature_beyond_ten_parameters() -> None:
    files = [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "lraee").rglob("*.py")]
    checked, too_long = 0, []
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        if name.startswith((*FRONT_ENDS, "lraee/kernels/")):
            continue
        for function, is_inner in functions(path):
            if is_kernel(function) or (name == SCHEMAS and is_inner):
                continue
            checked += 1
            if count(function) > MOST:
                too_long.append(f"{name}: {function.name} takes {count(function)}")
    assert not too_long, too_long
    assert checked > 500


def test_what_is_left_out_is_what_it_says() -> None:
    """Kernels, and the functions registered for a schema; so that nothing else hides there."""
    inner = [function for function, is_inner in functions(ROOT / SCHEMAS) if is_inner]
    assert {function.name for function in inner} == {"int8_linear", "int8_block", "exit_probe"}
    kernels = [f for f, _ in functions(ROOT / "kernels" / "int8_linear.py") if is_kernel(f)]
    assert "_int8_linear_kernel" in {kernel.name for kernel in kernels}
