"""What one needs to walk back from a model: the data, the recipe, the code and the model that it came from."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess

from sr_platform.cluster import REPOSITORY_PATH
from sr_platform.model_registry import MANIFEST_DIGEST_TAG
from sr_platform.shards import Manifest

_ROOMS = ("platform/sr_platform", "faithdiff", "pipelines")
_CODE_SUFFIXES = (".py", ".yaml")


def lineage_tags(
    *, manifest: Manifest, data_uri: str, recipe_digest: str, base_model: str, base_model_digest: str
) -> dict[str, str]:
    """Tags of the runs and of the registered version."""
    tags = {
        MANIFEST_DIGEST_TAG: manifest.digest,
        "data_uri": data_uri,
        "data_licences": json.dumps(manifest.licences),
        "recipe_digest": recipe_digest,
        "base_model": base_model,
        "base_model_digest": base_model_digest,
    }
    commit = git_commit()
    tags["code_digest"] = code_digest()
    return tags | ({"git_commit": commit} if commit else {})


def code_digest() -> str:
    """sha256 over the project's code and recipes: what ran, also where no git is, as in a submitted job."""
    digest = hashlib.sha256()
    for room in _ROOMS:
        for path in sorted((REPOSITORY_PATH / room).rglob("*")):
            if path.suffix in _CODE_SUFFIXES:
                digest.update(f"{path.relative_to(REPOSITORY_PATH).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def git_commit() -> str | None:
    """The commit of the source, with "-dirty" where tracked files differ; None outside a git checkout."""
    git = shutil.which("git")
    if git is None or not (REPOSITORY_PATH / ".git").exists():
        return None

    def ask(*arguments: str) -> str:
        command = [git, "-C", str(REPOSITORY_PATH), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()  # noqa: S603

    try:
        changes = ask("status", "--porcelain", "--untracked-files=no")
        return ask("rev-parse", "HEAD") + ("-dirty" if changes else "")
    except subprocess.CalledProcessError:
        # No commit yet, or a checkout that belongs to another user.
        return None
