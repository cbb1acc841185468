"""Job configuration: defaults < YAML recipe < command-line flags, all of one typed, frozen model.

A job defines a `StrictConfig` in its own file, then `main(argv)` calls `load_config(TrainConfig, argv, job="train")`
and the last line of the file is `run_job(main)`. Nothing else reads `sys.argv` or YAML.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import select
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import tyro
import yaml

from sr_platform.errors import ConfigError, RequestError

# tyro's titles and pointers, in our words.
_TYRO_WORDS = (
    (r"(; )?For full helptext.*", ""),
    (r"(; )?Argument helptext:.*", ""),
    (r"^Required options Missing from .*?: (?=--)", "required, and missing: "),
    (r"Unrecognized options( Unrecognized options)?:", "unrecognized options:"),
    (r"^(Value error|Invalid choice|Parsing error|Missing argument) ", ""),
)
_HELP_INDENT = 8
"""In tyro's boxes; flags stand further left."""
RECIPES_PATH = Path(__file__).resolve().parents[2] / "pipelines" / "recipes"


class StrictConfig(pydantic.BaseModel):
    """Base of every configuration: frozen, and an unknown name is an error rather than ignored."""

    model_config = pydantic.ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        regex_engine="python-re",  # pydantic's own engine has no look-around
    )


ConfigT = TypeVar("ConfigT", bound=StrictConfig)


def load_config(
    cls: type[ConfigT],
    argv: Sequence[str],
    *,
    job: str,
    description: str = "",
    recipe: bool = True,
    commands: Sequence[str] = (),
    prog: str = "",
) -> ConfigT:
    """The validated configuration of one job: `[recipe.yaml] --flag value ...`.

    A recipe is a path, or the bare name of one that ships with the project. With `recipe=False` the job takes none.
    `commands` are what may stand in its place and is not loaded here; a typo in one is told. `prog` is what --help says
    one types, where that is no file in pipelines/.

    Raises:
        ConfigError: the recipe or a flag is wrong; every problem is named at once.
        SystemExit: status 0, after `--help`.
    """
    args = list(argv)
    values: dict[str, Any] = {}
    if recipe and args and not args[0].startswith("-"):
        name = args.pop(0)
        values = read_recipe(name, job=job, commands=commands)
        check_values(cls, values, where=f"{job}: {name}")
    refusal = io.StringIO()
    try:
        with contextlib.redirect_stderr(refusal):
            parsed: ConfigT = tyro.cli(
                cls,
                args=args,
                default=_partial(cls, values),
                prog=prog or _usage(job, recipe=recipe),
                description=description,
                config=(tyro.conf.AvoidSubcommands,),
            )
            return parsed
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(f"{job}: flags: {_refusal(cls, stop, refusal.getvalue(), args)}") from None


def read_recipe(name: str, *, job: str, commands: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping in a YAML recipe, laid over that of the recipe that its key `extends` names, mapping by mapping.

    `extends` is looked for beside the recipe, then among those that ship with the project; chains are allowed.

    Raises:
        ConfigError: a recipe is missing, not YAML, not a mapping, or extends itself.
    """
    return _read_chain(_find_recipe(name, Path(), job=job, commands=commands), name, (), job=job)


def _read_chain(path: Path, name: str, readers: tuple[Path, ...], *, job: str) -> dict[str, Any]:
    """The recipe at `path`, which is called `name` and was reached through `readers`, over what it extends."""
    path = path.resolve()
    if path in readers:
        chain = " -> ".join(reader.name for reader in (*readers[readers.index(path) :], path))
        raise ConfigError(f"{job}: recipe {path.name} extends itself: {chain}; take one extends out")
    values = _read_mapping(path, name, job=job)
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{job}: recipe {name}: extends: got {base!r}; give the name of one recipe")
    base_path = _find_recipe(base, path.parent, job=f"{job}: recipe {name}: extends")
    return merged(_read_chain(base_path, base, (*readers, path), job=job), values)


def _find_recipe(name: str, folder: Path, *, job: str, commands: Sequence[str] = ()) -> Path:
    """The recipe at `name`, seen from `folder`, or the one of that name that ships with the project."""
    for path in (folder / name, RECIPES_PATH / name):
        if path.is_file():
            return path
    shipped = sorted(path.relative_to(RECIPES_PATH).as_posix() for path in RECIPES_PATH.rglob("*.yaml"))
    near = difflib.get_close_matches(name, shipped, n=5)
    command = difflib.get_close_matches(name, commands, n=1)
    if command and not name.endswith((".yaml", ".yml")):
        advice = f"did you mean the command {command[0]}?"
    elif near:
        advice = f"give a path or one of {', '.join(near)}"
    else:
        advice = "give a path, or the name of one that ships"
    raise ConfigError(f"{job}: recipe {name!r} does not exist; {advice}")


def _read_mapping(path: Path, name: str, *, job: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{job}: recipe {name} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{job}: recipe {name} holds a {type(values).__name__}; it must be a mapping of names to values"
        )
    return values


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`: mappings in both are merged, anything else of `over` replaces that of `base`."""
    result = dict(base)
    for key, value in over.items():
        below = base.get(key)
        result[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def check_values(cls: type[StrictConfig], values: dict[str, Any], *, where: str) -> None:
    """Raises ConfigError for everything wrong in `values`, except that required fields may still be missing."""
    try:
        cls.model_validate(values)
    except pydantic.ValidationError as error:
        wrong = [e for e in error.errors() if e["type"] != "missing" or not _has_flag(cls, e["loc"])]
        if wrong:
            raise ConfigError(f"{where}: {_join(cls, wrong)}") from error


def validate(cls: type[ConfigT], values: Any, *, where: str) -> ConfigT:
    """`values` as a `cls`. Raises ConfigError naming every problem in one line."""
    try:
        return cls.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{where}: {describe_errors(cls, error)}") from error


def describe_errors(cls: type[pydantic.BaseModel], error: pydantic.ValidationError) -> str:
    """All problems of a validation in one line, each with its path and, for a typo, what was meant."""
    return _join(cls, error.errors())


def run_job(main: Callable[[Sequence[str]], None], *, user_errors: tuple[type[ValueError], ...] = ()) -> None:
    """Runs a job's `main(argv)` and exits: 0 done, 2 the request was wrong (one line, no traceback), 1 it failed.

    141, in silence, where nobody reads its output any more: `--help | head`.
    """
    try:
        try:
            main(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except ValueError as error:
        if not isinstance(error, (RequestError, *user_errors)):
            raise
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        if not _has_no_reader():
            raise
        # Python flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _has_no_reader() -> bool:
    """Whether it is the standard output that nobody reads, and not some connection of the job."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _usage(job: str, *, recipe: bool) -> str:
    name, _, command = job.partition(" ")
    return f"python pipelines/{name}.py {command or ('[recipe.yaml]' if recipe else '')}".strip()


def _refusal(cls: type[StrictConfig], stop: SystemExit, box: str, args: Sequence[str]) -> str:
    """What tyro refused, in one line: pydantic's own words if a value was wrong, else the text of tyro's box."""
    text = _text_of(box)
    cause: BaseException | None = stop
    while cause is not None and not isinstance(cause, pydantic.ValidationError):
        cause = cause.__context__
    if cause is not None:
        # tyro names the part that it could not build: "align", "align.crop", or the class of the whole.
        part = re.search(r"Error parsing ([\w.-]+):", text)
        path = tuple(part[1].replace("-", "_").split(".")) if part else ()
        inside = path if path and path[0] in cls.model_fields else ()
        return f"{_join(cls, cause.errors(), inside=inside)}; --help lists every flag"
    for pattern, plain in _TYRO_WORDS:
        text = re.sub(pattern, plain, text)
    text += _by_initials(cls, text)
    recipe_last = any(arg.endswith((".yaml", ".yml")) for arg in args) and "unrecognized options" in text
    return f"{text.strip()}{'; a recipe comes before the flags' if recipe_last else ''}; --help lists every flag"


def _text_of(box: str) -> str:
    """tyro's box without its frame, its parts divided by semicolons; of a flag that it explains only the name."""
    parts: list[str] = [""]
    for line in box.splitlines():
        inside = line.strip("\u2502\u256d\u256e\u2570\u256f\u2500").rstrip()
        words, indent_width = inside.strip(), len(inside) - len(inside.lstrip())
        if not words.strip("\u2500"):
            parts.append("")
        elif indent_width < _HELP_INDENT:
            flags = re.match(r"--[^\s,]+(, --[^\s,]+)*", words)
            parts[-1] += f" {flags[0] if flags else words}"
    text = "; ".join(part.strip() for part in parts if part)
    return re.sub(r"(--[^\s;,]+) (?=--)", r"\1, ", text)


def _by_initials(cls: type[StrictConfig], text: str) -> str:
    """What was perhaps meant where tyro has no idea: --lr for --optimizer.learning-rate."""
    unknown = re.search(r"unrecognized options: --(\w+)", text)
    if unknown is None or "Perhaps you meant" in text:
        return ""
    meant = [flag for flag in _flags(cls) if "".join(re.findall(r"\b\w", flag.rpartition(".")[2])) == unknown[1]]
    return f"; Perhaps you meant: {', '.join(meant)}" if meant else ""


def _flags(cls: type[StrictConfig], prefix: str = "--") -> Iterator[str]:
    for name, field in cls.model_fields.items():
        nested, flag = _nested_model(field.annotation), prefix + name.replace("_", "-")
        yield from _flags(nested, f"{flag}.") if nested is not None else [flag]


def _has_flag(cls: type[StrictConfig], loc: Sequence[Any]) -> bool:
    """Whether a flag can still give the field at `loc`: not inside a list, a tuple or an optional part."""
    for part in loc[:-1]:
        field = cls.model_fields.get(str(part))
        nested = _nested_model(field.annotation) if field else None
        if nested is None:
            return False
        cls = nested
    return loc[-1] in cls.model_fields


def _partial(cls: type[StrictConfig], values: dict[str, Any]) -> Any:
    """An instance to hand tyro as defaults, in which what is required and not given yet is `tyro.MISSING`."""
    fields: dict[str, Any] = {}
    for name, field in cls.model_fields.items():
        nested = _nested_model(field.annotation)
        if name in values and nested is not None and isinstance(values[name], dict):
            fields[name] = _partial(nested, values[name])
        elif name in values:
            annotation: Any = field.annotation
            fields[name] = pydantic.TypeAdapter(annotation).validate_python(values[name])
        elif field.is_required():
            fields[name] = _partial(nested, {}) if nested is not None else tyro.MISSING
        else:
            fields[name] = field.get_default(call_default_factory=True)
    return cls.model_construct(**fields)


def _nested_model(annotation: Any) -> type[StrictConfig] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, StrictConfig) else None


def _join(cls: type[pydantic.BaseModel], errors: Sequence[Any], inside: tuple[str, ...] = ()) -> str:
    return "; ".join(_describe(cls, {**error, "loc": (*inside, *error["loc"])}) for error in errors)


def _describe(cls: type[pydantic.BaseModel], error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        allowed = _fields_at(cls, error["loc"][:-1])
        hint = _did_you_mean(str(error["loc"][-1]), allowed)
        return f"{path}: no such setting{hint or '; there are ' + ', '.join(allowed)}"
    if error["type"] == "missing":
        return f"{path}: required, and missing"
    if error["type"] == "value_error":  # a validator of ours, whose message says what came
        return f"{path}: {error['ctx']['error']}" if path else str(error["ctx"]["error"])
    message = error["msg"]
    return f"{path}: got {error['input']!r}; {message[0].lower()}{message[1:]}"


def _fields_at(cls: type[pydantic.BaseModel], loc: Sequence[Any]) -> list[str]:
    for part in loc:
        field = cls.model_fields.get(str(part))
        models = _models_in(field.annotation) if field else []
        if models:
            cls = models[0]
    return list(cls.model_fields)


def _models_in(annotation: Any) -> list[type[pydantic.BaseModel]]:
    return [a for a in _flatten(annotation) if isinstance(a, type) and issubclass(a, pydantic.BaseModel)]


def _flatten(annotation: Any) -> list[Any]:
    """The types inside unions, lists and the like: `list[Stage] | None` -> Stage, NoneType."""
    arguments = typing.get_args(annotation)
    return [a for part in arguments for a in _flatten(part)] if arguments else [annotation]


def _did_you_mean(name: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
