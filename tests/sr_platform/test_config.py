"""Configuration as a job's user meets it: recipe, flags, typos, and the exit status of a job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Literal

import pydantic
import pytest
import yaml
from pydantic import PositiveFloat, PositiveInt

from sr_platform.config import StrictConfig, check_values, load_config, read_recipe, validate
from sr_platform.errors import ConfigError, RequestError


class OptimizerConfig(StrictConfig):
    learning_rate: PositiveFloat = 1e-4
    """Step size."""
    betas: tuple[float, float] = (0.9, 0.999)


class CropConfig(StrictConfig):
    size_px: PositiveInt
    """Side of a crop in pixels."""
    kind: Literal["center", "random"] = "center"


class JobConfig(StrictConfig):
    out: str
    """Where the result goes."""
    steps: PositiveInt = 10
    """Number of steps."""
    optimizer: OptimizerConfig = OptimizerConfig()
    crop: CropConfig
    sources: tuple[str, ...] = ()
    limit: int | None = None
    dry_run: bool = False
    fallback: OptimizerConfig | None = None
    second_crop: CropConfig | None = None

    @pydantic.model_validator(mode="after")
    def crops_fit(self) -> JobConfig:
        if self.crop.size_px > 512:
            raise ValueError(f"crop.size_px={self.crop.size_px} is larger than 512; use a smaller crop")
        return self


def load(*argv):
    return load_config(JobConfig, argv, job="train", description="Trains something.")


@pytest.fixture
def recipe(tmp_path):
    def write(**values):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"out": "a", "crop": {"size_px": 64}, **values}))
        return str(path)

    return write


def refusal(*argv):
    with pytest.raises(ConfigError) as caught:
        load(*argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_fill_what_is_not_given():
    cfg = load("--out", "a", "--crop.size-px", "64")
    assert (cfg.steps, cfg.optimizer.learning_rate, cfg.crop.kind, cfg.limit) == (10, 1e-4, "center", None)


def test_a_recipe_overrides_defaults_and_a_flag_overrides_the_recipe(recipe):
    path = recipe(steps=20, optimizer={"betas": [0.5, 0.6]})
    assert load(path).steps == 20
    cfg = load(path, "--steps", "30", "--optimizer.learning-rate", "3e-5", "--crop.kind", "random", "--dry-run")
    assert (cfg.steps, cfg.optimizer.learning_rate, cfg.optimizer.betas) == (30, 3e-5, (0.5, 0.6))
    assert (cfg.crop.size_px, cfg.crop.kind, cfg.dry_run) == (64, "random", True)


def test_a_flag_gives_what_a_recipe_leaves_out(tmp_path):
    path = tmp_path / "part.yaml"
    path.write_text("crop: {kind: random}\n")
    cfg = load(str(path), "--out", "b", "--crop.size-px", "32")
    assert (cfg.out, cfg.crop.size_px, cfg.crop.kind) == ("b", 32, "random")


def test_lists_none_and_optional_parts_can_be_given(recipe):
    path = recipe(sources=["x"], limit=5, fallback={"learning_rate": 1.0})
    assert load(path).fallback == OptimizerConfig(learning_rate=1.0)
    cfg = load(path, "--sources", "y", "z", "--limit", "None")
    assert (cfg.sources, cfg.limit) == (("y", "z"), None)


def test_yaml_that_reads_1e_5_as_text_is_still_a_number(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("out: a\ncrop: {size_px: 8}\noptimizer: {learning_rate: 1e-5}\n")
    assert load(str(path)).optimizer.learning_rate == 1e-5


def test_a_configuration_is_frozen_and_survives_the_trip_through_json():
    cfg = load("--out", "a", "--crop.size-px", "64")
    with pytest.raises(pydantic.ValidationError):
        cfg.steps = 3
    assert JobConfig.model_validate(json.loads(json.dumps(cfg.model_dump(mode="json")))) == cfg


def test_every_mistake_in_a_recipe_is_named_at_once_with_what_was_meant(recipe):
    path = recipe(optimizer={"learning_rat": 1, "betas": [1]}, stepz=3, steps=0, crop={"size_px": 8, "kind": "c"})
    message = refusal(path)
    assert message.startswith(f"train: {path}: ")
    for part in (
        "optimizer.learning_rat: no such setting; did you mean 'learning_rate'?",
        "stepz: no such setting; did you mean 'steps'?",
        "steps: got 0; input should be greater than 0",
        "crop.kind: got 'c'; input should be 'center' or 'random'",
        "optimizer.betas.1: required, and missing",
    ):
        assert part in message


def test_what_no_flag_can_give_must_be_in_the_recipe(recipe):
    message = refusal(recipe(second_crop={"kind": "center"}), "--crop.size-px", "3")
    assert "second_crop.size_px: required, and missing" in message


def test_an_unknown_name_that_resembles_nothing_lists_what_there_is(recipe):
    assert "crop.zzz: no such setting; there are size_px, kind" in refusal(recipe(crop={"size_px": 8, "zzz": 1}))


def test_a_typo_inside_an_optional_part_is_explained_with_its_own_names(recipe):
    assert "did you mean 'learning_rate'?" in refusal(recipe(fallback={"learning_rates": 1}))


def test_a_typo_in_a_flag_says_what_was_meant(recipe):
    message = refusal(recipe(), "--stepz", "3")
    assert "unrecognized options: --stepz" in message
    assert "Perhaps you meant: --steps" in message


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--crop.size-px", "0"), "crop.size_px: got 0; input should be greater than 0"),
        (("--optimizer.learning-rate", "-1"), "optimizer.learning_rate: got -1.0; input should be greater than 0"),
        (("--optimizer.learning-rate", "nan"), "optimizer.learning_rate: got nan; input should be a finite number"),
        (("--optimizer.learning-rate", "inf"), "optimizer.learning_rate: got inf; input should be a finite number"),
        (("--crop.size-px", "513"), "flags: crop.size_px=513 is larger than 512; use a smaller crop"),
        (("--crop.kind", "left"), "'left' for argument '--crop.kind'"),
        (("--steps", "many"), "--steps: invalid literal for int() with base 10: 'many'"),
        (("--steps",), "Missing value for argument '--steps'"),
    ],
)
def test_a_flag_that_cannot_be_used_is_named_with_its_value(recipe, flags, said):
    message = refusal(recipe(), *flags)
    assert message.startswith("train: flags: ")
    assert said in message
    assert "--help lists every flag" in message


class Outer(StrictConfig):
    first: CropConfig
    second_part: JobConfig


def test_of_two_parts_of_the_same_kind_the_one_with_the_mistake_is_named():
    given = ["--first.size-px", "1", "--second-part.out", "a"]
    with pytest.raises(ConfigError, match=r"second_part\.crop\.size_px: got 0"):
        load_config(Outer, [*given, "--second-part.crop.size-px", "0"], job="train")
    with pytest.raises(ConfigError, match=r"second_part: crop\.size_px=513 is larger than 512"):
        load_config(Outer, [*given, "--second-part.crop.size-px", "513"], job="train")


def test_what_is_required_and_missing_is_named():
    message = refusal("--steps", "3")
    assert "required, and missing" in message
    assert "--out" in message
    assert "--crop.size-px" in message


def test_of_missing_flags_only_the_names_are_shown():
    said = "train: flags: required, and missing: --out, --crop.size-px; --help lists every flag"
    assert refusal("--steps", "3") == said
    assert refusal("--stepz", "3") == (
        "train: flags: required, and missing: --out, --crop.size-px; unrecognized options: --stepz 3; "
        "--help lists every flag"
    )


def test_of_flags_that_were_perhaps_meant_only_the_names_are_shown(recipe):
    assert refusal(recipe(), "--learning-rate", "3").endswith(
        "unrecognized options: --learning-rate, 3; Perhaps you meant: --optimizer.learning-rate; "
        "--help lists every flag"
    )
    assert "Perhaps you meant: --dry-run, --no-dry-run; --help" in refusal(recipe(), "--dry-rum")
    assert refusal(recipe(), "--steps").startswith("train: flags: Missing value for argument '--steps'")


def test_initials_of_a_flag_are_understood(recipe):
    said = "unrecognized options: --lr, 3; Perhaps you meant: --optimizer.learning-rate; --help lists every flag"
    assert said in refusal(recipe(), "--lr", "3")
    assert "--lr 3; Perhaps you meant: --optimizer.learning-rate; --help" in refusal("--lr", "3")
    assert "--sp 3; Perhaps you meant: --crop.size-px; --help" in refusal("--sp", "3")


def test_a_recipe_after_the_flags_is_explained(recipe):
    assert "a recipe comes before the flags" in refusal("--steps", "3", recipe())


def test_a_cross_field_rule_holds_for_recipe_and_flags_together(recipe):
    assert "larger than 512" in refusal(recipe(crop={"size_px": 600}))
    assert load(recipe(crop={"size_px": 512})).crop.size_px == 512


def test_a_recipe_that_does_not_exist_is_named_with_those_that_ship():
    message = refusal("train_nanno.yaml")
    assert "recipe 'train_nanno.yaml' does not exist" in message
    assert "give a path or one of" in message


def test_of_many_recipes_only_those_of_a_similar_name_are_shown(folders):
    folders(shipped={f"train_{name}.yaml": "" for name in "abcdefgh"} | {"other.yaml": ""})
    message = refusal("train_x.yaml")
    assert message.startswith("train: recipe 'train_x.yaml' does not exist; give a path or one of train_")
    assert message.count("train_") == 6
    assert "other" not in message
    assert refusal("zzz") == "train: recipe 'zzz' does not exist; give a path, or the name of one that ships"


def test_what_resembles_a_command_is_taken_for_one(folders):
    folders(shipped={"export_all.yaml": ""})

    def said(name):
        with pytest.raises(ConfigError) as caught:
            load_config(JobConfig, [name], job="train", commands=("export", "inspect"))
        return str(caught.value)

    assert said("exprot") == "train: recipe 'exprot' does not exist; did you mean the command export?"
    assert "one of export_all.yaml" in said("export_al.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n- b\n", "holds a list; it must be a mapping"),
        ("", "holds a NoneType; it must be a mapping"),
        ("out: [a\n", "is not YAML"),
        ("out: !!python/object:os.system {}\n", "is not YAML"),
        ("1: 2\nout: a\n", "1:"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, said):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert said in refusal(str(path))


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"out: \xff\xfe\n")
    assert "is not YAML" in refusal(str(path))


def test_check_values_lets_required_fields_wait_for_the_flags():
    check_values(JobConfig, {"steps": 3}, where="here")
    with pytest.raises(ConfigError, match="here: steps: got 'x'"):
        check_values(JobConfig, {"steps": "x"}, where="here")


def test_validate_names_what_is_missing():
    with pytest.raises(ConfigError, match=r"app.yaml: out: required, and missing; crop: required, and missing"):
        validate(JobConfig, {}, where="app.yaml")
    assert validate(JobConfig, {"out": "a", "crop": {"size_px": 1}}, where="app.yaml").out == "a"


def test_a_shipped_recipe_is_found_by_its_bare_name(tmp_path, monkeypatch):
    (tmp_path / "small.yaml").write_text("out: z\n")
    monkeypatch.setattr("sr_platform.config.RECIPES_PATH", tmp_path)
    assert read_recipe("small.yaml", job="train") == {"out": "z"}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """`folders(shipped={name: text}, own={name: text})` writes recipes; returns the folder of the own ones."""

    def write(shipped=(), own=()):
        for folder, recipes in (("shipped", shipped), ("own", own)):
            for name, text in dict(recipes).items():
                path = tmp_path / folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
        return tmp_path / "own"

    monkeypatch.setattr("sr_platform.config.RECIPES_PATH", tmp_path / "shipped")
    return write


def test_a_recipe_lies_over_the_one_it_extends_mapping_by_mapping(folders):
    base = "out: a\nsteps: 5\nsources: [x, y]\ncrop: {size_px: 64, kind: random}\nfallback: {learning_rate: 1.0}\n"
    child = "extends: base.yaml\nsteps: 7\nsources: [z]\ncrop: {size_px: 32}\nfallback: null\n"
    own = folders(own={"base.yaml": base, "child.yaml": child})
    cfg = load(str(own / "child.yaml"))
    assert (cfg.out, cfg.steps, cfg.sources, cfg.fallback) == ("a", 7, ("z",), None)
    assert (cfg.crop.size_px, cfg.crop.kind) == (32, "random")
    assert load(str(own / "base.yaml")).steps == 5


def test_what_a_recipe_extends_lies_beside_it_or_ships_with_the_project(folders):
    own = folders(
        shipped={"base.yaml": "out: shipped\n", "small/part.yaml": "extends: base.yaml\nsteps: 1\n"},
        own={"base.yaml": "out: own\n", "a.yaml": "extends: base.yaml\n", "b.yaml": "extends: small/part.yaml\n"},
    )
    assert read_recipe(str(own / "a.yaml"), job="train") == {"out": "own"}
    assert read_recipe(str(own / "b.yaml"), job="train") == {"out": "shipped", "steps": 1}
    assert read_recipe("small/part.yaml", job="train") == {"out": "shipped", "steps": 1}


@pytest.mark.parametrize(
    ("recipes", "said"),
    [
        ({"a.yaml": "extends: a.yaml\n"}, "recipe a.yaml extends itself: a.yaml -> a.yaml; take one extends out"),
        (
            {"a.yaml": "extends: b.yaml\n", "b.yaml": "extends: c.yaml\n", "c.yaml": "extends: b.yaml\n"},
            "recipe b.yaml extends itself: b.yaml -> c.yaml -> b.yaml; take one extends out",
        ),
        (
            {"a.yaml": "extends: basse.yaml\n"},
            "extends: recipe 'basse.yaml' does not exist; give a path or one of base",
        ),
        ({"a.yaml": "extends: [b.yaml]\n"}, "extends: got ['b.yaml']; give the name of one recipe"),
        ({"a.yaml": "extends: b.yaml\n", "b.yaml": "- 1\n"}, "recipe b.yaml holds a list"),
    ],
)
def test_a_chain_of_recipes_that_cannot_be_read_is_explained(folders, recipes, said):
    own = folders(shipped={"base.yaml": "out: a\n"}, own=recipes)
    assert said in refusal(str(own / "a.yaml"))


def test_an_error_of_configuration_is_a_request_error_and_a_value_error():
    assert issubclass(ConfigError, RequestError)
    assert issubclass(ConfigError, ValueError)


JOB = """
from sr_platform.config import StrictConfig, load_config, run_job
from pydantic import PositiveInt

class Unusable(ValueError): ...

class JobConfig(StrictConfig):
    steps: PositiveInt = 1
    '''Number of steps.'''
    end: str = "done"

def main(argv):
    cfg = load_config(JobConfig, argv, job="count", description="Counts.")
    if cfg.end == "unusable":
        raise Unusable("picture.png: got\\nnothing; give a picture")
    if cfg.end == "bug":
        raise ValueError("our own mistake")
    if cfg.end == "interrupt":
        raise KeyboardInterrupt
    print("counted", cfg.steps)

if __name__ == "__main__":
    run_job(main, user_errors=(Unusable,))
"""


@pytest.fixture(scope="module")
def job_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("job") / "count.py"
    path.write_text(JOB)
    return path


@pytest.fixture(scope="module")
def run(job_path):
    def start(*argv):
        environment = {**os.environ, "COLUMNS": "200"}
        return subprocess.run([sys.executable, job_path, *argv], capture_output=True, text=True, env=environment)

    return start


def test_a_job_that_did_its_work_exits_with_0(run):
    done = run("--steps", "3")
    assert (done.returncode, done.stdout, done.stderr) == (0, "counted 3\n", "")


@pytest.mark.parametrize("argv", [("--help",), ("--steps", "3")])
def test_a_reader_that_has_seen_enough_ends_the_job_in_silence(job_path, argv):
    job = subprocess.Popen([sys.executable, job_path, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    job.stdout.close()
    assert job.stderr.read() == b""
    job.stderr.close()
    assert job.wait(60) == 141


@pytest.mark.parametrize("argv", [("--steps", "0"), ("--step-count", "1"), ("missing.yaml",), ("--end", "unusable")])
def test_a_wrong_request_is_one_line_on_stderr_and_exit_status_2(run, argv):
    refused = run(*argv)
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr.count("\n") == 1
    assert "Traceback" not in refused.stderr


def test_a_mistake_of_ours_keeps_its_traceback_and_exits_with_1(run):
    failed = run("--end", "bug")
    assert failed.returncode == 1
    assert "Traceback" in failed.stderr
    assert "our own mistake" in failed.stderr


def test_an_interrupted_job_exits_as_shells_expect(run):
    assert run("--end", "interrupt").returncode == 130


def test_help_shows_every_field_with_type_default_and_meaning(run):
    shown = run("--help")
    assert shown.returncode == 0
    for part in ("python pipelines/count.py [recipe.yaml]", "Counts.", "--steps INT", "Number of steps.", "default: 1"):
        assert part in shown.stdout


def test_patterns_may_look_ahead():
    class Named(StrictConfig):
        alias: str = pydantic.Field(pattern=r"^(?!latest$)[a-z]+$")

    assert validate(Named, {"alias": "candidate"}, where="here").alias == "candidate"
    with pytest.raises(ConfigError, match="alias: got 'latest'"):
        validate(Named, {"alias": "latest"}, where="here")
