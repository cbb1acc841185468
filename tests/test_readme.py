"""The READMEs say what works: their Python runs, their commands exist, their files and links are there."""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
ROOMS = ("platform", "faithdiff", "pipelines", "serve", "infra", "benchmarks", "tests")
PAGES = [README, *(ROOT / room / "README.md" for room in ROOMS)]
# Programs that come from elsewhere; only what we say about our own files is checked.
FOREIGN = {"curl", "git", "cd", "mlflow", "ray", "export", "open", "aws", "docker", "kubectl", "terraform"}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """(page, command) of every line in every bash block, continued lines joined."""
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page.relative_to(ROOT).as_posix(), line.split("  #")[0].strip()) for line in lines]
    return [(page, line) for page, line in found if line and not line.startswith("#")]


def program(command: str) -> tuple[str, list[str]]:
    """The program and its arguments: environment variables, `.venv/bin/` and `ray job submit ... --` taken off."""
    words = shlex.split(command)
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words[:3] == ["ray", "job", "submit"] and "--" in words:
        words = words[words.index("--") + 1 :]
    return words[0].removeprefix(".venv/bin/"), words[1:]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


@functools.cache
def help_of(script: str) -> str:
    shown = subprocess.run(
        [sys.executable, ROOT / script, "--help"], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    assert shown.returncode == 0, f"{script} --help exits with {shown.returncode}: {shown.stderr[-2000:]}"
    return shown.stdout


def test_the_pages_have_commands_to_check():
    assert ("README.md", "make demo") in commands()
    assert ("README.md", "make test") in commands()


@pytest.mark.parametrize(("page", "command"), commands())
def test_every_command_exists_and_knows_its_flags(page, command):
    name, arguments = program(command)
    if name == "make":
        assert set(arguments) <= make_targets()
    elif name in ("python", "python3"):
        check_python(arguments)
    elif name == "serve":
        check_serve(arguments)
    elif name.endswith(".sh"):
        assert os.access(ROOT / name, os.X_OK), f"{page}: {name} is no script"
    else:
        assert name in FOREIGN, f"{page}: what is {name}?"


def check_python(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        check_module(arguments[1], arguments[2:])
        return
    script, *rest = arguments
    assert (ROOT / script).is_file(), script
    known = help_of(script)
    flags = [word.split("=")[0] for word in rest if word.startswith("--")]
    assert [flag for flag in flags if not re.search(rf"(?<![\w-]){flag}(?![\w-])", known)] == []
    if rest and rest[0].endswith(".yaml"):
        assert (ROOT / "pipelines" / "recipes" / rest[0]).is_file() or (ROOT / rest[0]).is_file(), rest[0]


def check_module(module: str, rest: list[str]) -> None:
    if module == "pytest":
        assert [word for word in rest if word.startswith("tests/") and not (ROOT / word).exists()] == []
    else:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def check_serve(arguments: list[str]) -> None:
    """`serve run [--address ADDRESS] package.module:name` or `serve deploy file.yaml`."""
    verb, target = [word for word in arguments if word not in ("--address", "local")][:2]
    assert verb in ("run", "deploy")
    if ":" in target:
        module, name = target.split(":")
        source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()
        assert re.search(rf"^(def {name}\(|{name} = )", source, flags=re.MULTILINE)
    else:
        assert (ROOT / target).is_file()


def test_python_of_the_readme_runs(tmp_path):
    from PIL import Image
    from skimage import data

    code = blocks(README, "python")
    assert code
    Image.fromarray(data.astronaut()).resize((48, 40)).save(tmp_path / "photo.png")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert Image.open(tmp_path / "restored.png").size == (192, 160)


def test_every_path_of_the_file_tree_exists():
    tree = blocks(README, "text")
    assert len(tree) == 1
    folder, paths = ROOT, []
    for line in tree[0].splitlines():
        names = line.strip().split("  ")[0].split()
        parent = folder if line.startswith(" ") else ROOT
        paths += [parent / name for name in names]
        if not line.startswith(" "):
            folder = ROOT / names[0]
    assert len(paths) > 20
    assert [p.relative_to(ROOT).as_posix() for p in paths if not p.exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_file_that_is_named_exists(page):
    text = page.read_text()
    named = re.findall(rf"(?<![\w/.-])((?:{'|'.join(ROOMS)})/[\w./*-]*\w)(?![\w<])", text)
    missing = [name for name in named if not list(ROOT.glob(name)) and not list(page.parent.glob(name))]
    assert missing == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_resolve(page):
    text = page.read_text()
    targets = [t for t in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", t)]
    broken = []
    for target in targets:
        name, _, anchor = target.partition("#")
        goal = page.parent / name if name else page
        if not goal.exists() or (anchor and anchor not in anchors(goal)):
            broken.append(target)
    assert broken == []


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_changelog_has_an_open_section():
    assert re.search(r"^## \[Unreleased\]$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
