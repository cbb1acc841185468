"""The rules of the house: who may import whom, what files are called, how long they get. `make check` runs this."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE_ROOMS = {
    "faithdiff": ROOT / "faithdiff",
    "sr_platform": ROOT / "platform" / "sr_platform",
    "pipelines": ROOT / "pipelines",
    "serve": ROOT / "serve",
}
ROOMS = ("platform", "faithdiff", "pipelines", "serve", "infra", "benchmarks", "tests")

FORBIDDEN_IMPORTS = {
    "faithdiff": {"ray", "mlflow", "s3fs", "fsspec", "boto3", "deepspeed", "sr_platform", "pipelines", "serve"},
    "sr_platform": {"faithdiff", "pipelines", "serve", "torchvision", "diffusers", "transformers"},
    "pipelines": {"serve", "tests"},
    "serve": {"pipelines", "tests"},
}
# `pipelines/demo.py` walks the whole road, the endpoint included: it starts serve as a program, never imports it.

DRAWERS = {"utils", "util", "common", "helper", "helpers", "manager", "managers", "misc"}
MAX_FUNCTION_LINES = 80
MAX_MODULE_LINES = 600

RELEASED_NAMES = ("information_transformer_layes", "denoise_encoder", "spatial_ch_projs", "condition_embedding")
KNOWS_RELEASED_NAMES = "faithdiff/checkpoint.py"

# Modules that need no test file of their own, and why.
TESTED_ELSEWHERE: dict[str, str] = {
    "platform/sr_platform/observability.py": "one call that configures logging; the jobs' tests run through it",
    "platform/sr_platform/checkpoint_writer.py": "test_checkpoints.py: what is written is read",
    # The parts that FaithDiffPipeline is put together from are promises of the pipeline:
    "faithdiff/compat.py": "test_pipeline.py: released numbers, unknown switches",
    "faithdiff/conditioning.py": "test_pipeline.py, test_denoiser.py: whole runs, pictures that share a batch",
    "faithdiff/latents.py": "test_pipeline.py: start points, pictures in parts",
    "faithdiff/pictures.py": "test_pipeline.py: any mode, any size, what is not a picture",
    "faithdiff/parts.py": "test_loss.py: what is trained, and a part that is unknown",
    "faithdiff/prepared_text.py": "test_unet.py: prepared text changes nothing",
    "faithdiff/request.py": "test_pipeline.py: every setting out of range",
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def files_of(folder: Path) -> Iterator[Path]:
    """Every file of ours below a folder: no caches, no hidden folders, nothing generated."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "__pycache__" or path.name.endswith(".egg-info"):
            continue
        if path.is_dir():
            yield from files_of(path)
        else:
            yield path


@functools.cache
def source_modules() -> dict[str, list[Path]]:
    return {room: [p for p in files_of(folder) if p.suffix == ".py"] for room, folder in SOURCE_ROOMS.items()}


@functools.cache
def every_source_module() -> list[Path]:
    return [path for paths in source_modules().values() for path in paths]


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def text_files() -> list[Path]:
    suffixes = {
        ".py",
        ".md",
        ".toml",
        ".txt",
        ".yaml",
        ".yml",
        ".json",
        ".tf",
        ".hcl",
        ".sh",
        ".js",
        ".css",
        ".html",
        "",
    }
    top = [p for p in ROOT.iterdir() if p.is_file() and not p.name.startswith(".")]
    rooms = [p for room in (*ROOMS, ".ci") if (ROOT / room).is_dir() for p in files_of(ROOT / room)]
    return [p for p in top + rooms if p.suffix in suffixes]


def imports_of(path: Path) -> set[str]:
    """Top-level names of everything a module imports, wherever in the file, relative imports resolved."""
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            names.update(str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("room", SOURCE_ROOMS)
def test_imports_go_one_way(room):
    wrong = {
        name_of(path): sorted(found)
        for path in source_modules()[room]
        if (found := imports_of(path) & FORBIDDEN_IMPORTS[room])
    }
    assert wrong == {}, f"{room} must not import these"


def test_every_room_that_has_modules_was_looked_at():
    assert all(source_modules().values())


def test_platform_is_a_source_root_and_no_package():
    assert not (ROOT / "platform" / "__init__.py").exists(), "it would shadow Python's own `platform` module"


def test_help_does_not_wait_for_the_libraries_of_the_model():
    jobs = ("ablate", "demo", "evaluate", "prepare", "promote", "restore", "synthesize", "train")
    code = f"import sys, {', '.join(f'pipelines.{job}' for job in jobs)}; print('diffusers' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "False"


def test_tests_are_no_packages():
    assert [name_of(p) for p in files_of(ROOT / "tests") if p.name == "__init__.py"] == []


def test_no_module_is_a_drawer():
    stems = [p for p in every_source_module() if DRAWERS & {part.lower() for part in (p.stem, *p.parent.parts)}]
    assert [name_of(p) for p in stems] == [], "name it after the thing that flows through it"


def test_every_source_module_says_what_it_is():
    # An empty __init__.py has nothing to say.
    silent = [p for p in every_source_module() if p.read_text().strip() and not ast.get_docstring(tree_of(p))]
    assert [name_of(p) for p in silent] == []


def test_functions_are_short():
    long = {}
    for path in [*every_source_module(), *(p for p in files_of(ROOT / "tests") if p.suffix == ".py")]:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and lines_of(node) > MAX_FUNCTION_LINES:
                long[f"{name_of(path)}:{node.lineno} {node.name}"] = lines_of(node)
    assert long == {}, f"functions over {MAX_FUNCTION_LINES} lines (docstring not counted)"


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = first.end_lineno - first.lineno + 1 if is_docstring else 0
    return function.end_lineno - function.lineno + 1 - docstring


def test_modules_are_short():
    lengths = {name_of(p): len(p.read_text().splitlines()) for p in every_source_module()}
    assert {name: n for name, n in lengths.items() if n > MAX_MODULE_LINES} == {}


def test_source_modules_are_plain_ascii():
    assert [name_of(p) for p in every_source_module() if not p.read_text(encoding="utf-8").isascii()] == []


def test_no_file_names_a_place_on_somebodys_machine():
    # A container's own paths are the business of infra/.
    anywhere, outside_infra = re.compile(r"(?<![\w.:/-])/(?:work|root)/"), re.compile(r"(?<![\w.:/-])/(?:home|opt)/")
    found = []
    for path in text_files():
        text = path.read_text(encoding="utf-8")
        patterns = [anywhere] if name_of(path).startswith("infra/") else [anywhere, outside_infra]
        found += [f"{name_of(path)}: {m.group()}" for pattern in patterns for m in pattern.finditer(text)]
    assert found == []


def test_released_key_names_are_known_to_one_file():
    pattern = re.compile("|".join(RELEASED_NAMES))
    users = [name_of(p) for p in every_source_module() if pattern.search(p.read_text())]
    assert [name for name in users if name != KNOWS_RELEASED_NAMES] == []


def test_command_lines_and_recipes_are_read_in_one_file():
    readers = [name_of(p) for p in every_source_module() if re.search(r"\bsys\.argv\b|\bargparse\b", p.read_text())]
    # `faithdiff` may not import the platform, and has one command of its own: the one that builds its nano preset.
    assert set(readers) <= {"platform/sr_platform/config.py", "faithdiff/nano.py"}


def public_names(path: Path) -> list[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [n.name for n in tree_of(path).body if isinstance(n, kinds) and not n.name.startswith("_")]


def has_functions(path: Path) -> bool:
    return any(isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) for node in ast.walk(tree_of(path)))


def candidate_names(path: Path, room: str) -> list[str]:
    """`a.py` -> test_a.py; `a/b.py` -> test_a.py, test_b.py or test_a_b.py, in the room's folder or below."""
    parts = path.relative_to(SOURCE_ROOMS[room]).with_suffix("").parts
    names = {parts[-1], parts[0], "_".join(parts)}
    return [f"test_{name}" for name in names if name != "__init__"]


@pytest.mark.parametrize("room", ["faithdiff", "sr_platform"])
def test_tests_mirror_the_tree(room):
    tests = [p.stem for p in files_of(ROOT / "tests" / room) if p.suffix == ".py"]
    untested = [
        name_of(path)
        for path in source_modules()[room]
        if public_names(path)
        and has_functions(path)
        and name_of(path) not in TESTED_ELSEWHERE
        and not any(test.startswith(name) for test in tests for name in candidate_names(path, room))
    ]
    assert untested == [], f"add tests/{room}/test_<module>.py"


def test_exceptions_from_the_mirror_still_exist():
    assert [name for name in TESTED_ELSEWHERE if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_explains_itself_under_the_same_headings(room):
    readme = ROOT / room / "README.md"
    if not (ROOT / room).is_dir():
        pytest.fail(f"{room}/ is missing")
    headings = re.findall(r"^## (.+)$", readme.read_text(), flags=re.MULTILINE)
    assert headings == ["Purpose", "Files", "Run", "Rules"]


def files_in_readme(room: str) -> dict[str, list[Path]]:
    """First column of the table under "Files": each `name` or pattern, relative to the room, with what it matches."""
    table = (ROOT / room / "README.md").read_text().split("## Files")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]+) \|", table, flags=re.MULTILINE)
    return {name: list((ROOT / room).glob(name)) for row in rows for name in re.findall("`(.+?)`", row)}


@pytest.mark.parametrize("room", ROOMS)
def test_readmes_of_rooms_name_only_files_that_exist(room):
    named = files_in_readme(room)
    assert named, "a table with one row per file"
    assert [name for name, found in named.items() if not found] == []


@pytest.mark.parametrize("room", ["platform", "faithdiff", "pipelines", "serve", "benchmarks"])
def test_readmes_of_rooms_leave_no_module_out(room):
    named = {path for found in files_in_readme(room).values() for path in found}
    modules = [p for p in files_of(ROOT / room) if p.suffix == ".py" and p.name != "__init__.py"]
    assert [name_of(p) for p in modules if p not in named] == [], f"add a row to {room}/README.md"


def test_design_records_are_numbered_without_gaps_and_say_the_same_three_things():
    records = sorted((ROOT / "platform" / "design").glob("*.md"))
    assert [int(p.name[:4]) for p in records] == list(range(1, len(records) + 1))
    for record in records:
        headings = re.findall(r"^## (.+)$", record.read_text(), flags=re.MULTILINE)
        assert headings == ["Context", "Decision", "Consequences"], record.name
