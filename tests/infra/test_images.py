"""The Dockerfile, as far as it can be read: what it copies, pins and runs as. No image was built here."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from sr_platform.cluster import REPOSITORY_PATH

IMAGES_PATH = REPOSITORY_PATH / "infra" / "images"


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of every line, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (IMAGES_PATH / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def stages(instructions: list[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """Each stage with what it inherits."""
    made: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for instruction, rest in instructions:
        if instruction == "FROM":
            base, _, name = rest.split()
            made[name] = list(made.get(base, []))
        elif name:
            made[name].append((instruction, rest))
    return made


def test_there_is_an_image_for_every_repository(instructions: list[tuple[str, str]]) -> None:
    main = (REPOSITORY_PATH / "infra" / "terraform" / "main.tf").read_text()
    repositories = re.findall(r"\w+", re.search(r"repositories += (\[.*\])", main)[1])  # type: ignore[index]
    assert set(repositories) == set(stages(instructions)) - {"base", "project"}


def test_the_base_is_pinned_to_a_patch_release_of_our_python(instructions: list[tuple[str, str]]) -> None:
    froms = [rest for instruction, rest in instructions if instruction == "FROM"]
    assert froms[0] == "python:${PYTHON_VERSION}-slim-bookworm AS base"
    [version] = [rest for instruction, rest in instructions if rest.startswith("PYTHON_VERSION=")]
    assert re.fullmatch(r"PYTHON_VERSION=3\.11\.\d+", version)


def test_everything_that_is_copied_exists_and_is_sent_to_the_builder(instructions: list[tuple[str, str]]) -> None:
    sources = [source for instruction, rest in instructions if instruction == "COPY" for source in rest.split()[:-1]]
    sent = {line[1:] for line in (IMAGES_PATH / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert {"pipelines", "serve", "faithdiff", "platform/sr_platform", "constraints.txt"} <= set(sources)
    for source in sources:
        assert (REPOSITORY_PATH / source).exists(), source
        assert any(Path(source).match(pattern) for pattern in sent), source


def test_packages_are_installed_by_the_pins_and_nothing_else(instructions: list[tuple[str, str]]) -> None:
    installs = [rest for instruction, rest in instructions if instruction == "RUN" and "pip install" in rest]
    assert len(installs) == 2
    pinned = set(re.findall(r"^([\w.-]+)==", (REPOSITORY_PATH / "constraints.txt").read_text(), flags=re.MULTILINE))
    for install in installs:
        words = shlex.split(re.search(r"python -m pip install (.+?)(?: && |$)", install)[1])  # type: ignore[index]
        assert words[:2] == ["--constraint", "constraints.txt"]
        named = [w.split("[")[0] for w in words[2:] if not w.startswith("-") and not w.endswith(".txt")]
        assert [name for name in named if name not in pinned] == [], "constraints.txt does not pin it"


def test_every_image_runs_as_nobody_with_a_health_check_and_no_weights(instructions: list[tuple[str, str]]) -> None:
    made = stages(instructions)
    for name in ("train", "serve", "mlflow"):
        users = [rest for instruction, rest in made[name] if instruction == "USER"]
        assert users == ["10001:10001"], name
        assert [rest for instruction, rest in made[name] if instruction == "HEALTHCHECK"], name
        assert not re.search(r"safetensors|\.ckpt|huggingface", str(made[name])), name


def test_commands_of_the_images_exist(instructions: list[tuple[str, str]]) -> None:
    commands = [rest for instruction, rest in instructions if instruction == "CMD"]
    files = [word for rest in commands for word in re.findall(r'"([\w/]+\.py)"', rest)]
    assert files == ["pipelines/train.py"]
    assert all((REPOSITORY_PATH / name).is_file() for name in files)


def test_build_arguments_are_explained() -> None:
    text = (IMAGES_PATH / "Dockerfile").read_text()
    explained = text.split("FROM")[0]
    for name in set(re.findall(r"^ARG (\w+)", text, flags=re.MULTILINE)):
        assert re.search(rf"^#   {name} ", explained, flags=re.MULTILINE), name
