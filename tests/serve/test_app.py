from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray import serve as ray_serve

import serve
from serve.app import ServeConfig, build_app
from sr_platform.errors import ConfigError

APP_YAML = Path(serve.__file__).with_name("app.yaml")


def test_the_shipped_app_yaml_builds_with_the_defaults_of_the_code() -> None:
    (application,) = yaml.safe_load(APP_YAML.read_text())["applications"]
    assert application["import_path"] == "serve.app:build_app"
    assert ServeConfig.model_validate(application["args"]) == ServeConfig()
    assert isinstance(build_app(application["args"]), ray_serve.Application)


@pytest.mark.parametrize(("args", "says"), [
    ({"modle": "nano"}, "modle: no such setting; did you mean 'model'?"),
    ({"restorer": {"num_replica": 2}}, "restorer.num_replica: no such setting; did you mean 'num_replicas'?"),
    ({"gateway": {"limits": {"max_px": 1}}}, "gateway.limits.max_px: no such setting"),
    ({"restorer": {"dtype": "fp16"}, "gateway": {"request_timeout_s": 0}}, "gateway.request_timeout_s"),
])  # fmt: skip
def test_a_typo_in_the_arguments_is_refused_and_says_what_was_meant(args: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build_app(args)
    assert str(refused.value).startswith("serve: args: ")
    assert says in str(refused.value)


def test_text_from_the_command_line_is_taken_as_numbers() -> None:
    assert isinstance(build_app({"model": "nano"}), ray_serve.Application)
    assert ServeConfig.model_validate({"gateway": {"request_timeout_s": "5"}}).gateway.request_timeout_s == 5.0
