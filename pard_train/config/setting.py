"""One setting: its default, its comment, its allowed range, and whether it decides the result."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from pard_train.errors import UserError

MISSING: Any = "???"  # OmegaConf's mark of a value that the user must choose
# Of an entry of a dict.
SECRET_NAME = re.compile(r"(?i)((api|access|secret)_?key|secret|password|(hub|hf|api|auth|access)_token)$")
SECRET_URL = re.compile(r"://[^/@\s]+@")  # user and password before a host


@dataclass(frozen=True)
class Rule:
    """What a setting means and which values it takes; kept in the metadata of its dataclass field.

    Attributes:
        comment: meaning and unit, shown by --help and in the configuration reference.
        low, high: inclusive bounds.
        above: exclusive lower bound.
        choices: the allowed strings.
        is_free: does not decide the result, so it may change when a run resumes or a result is reused.
    """

    comment: str
    low: float | None = None
    above: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    is_free: bool = False

    def allowed(self) -> str:
        """The allowed values in words; empty if all are."""
        bounds = [
            f"{word} {bound}"
            for word, bound in (("at least", self.low), ("above", self.above), ("at most", self.high))
            if bound is not None
        ]
        return " | ".join(self.choices) or " and ".join(bounds)

    def accepts(self, value: Any) -> bool:
        """Whether one value is allowed. NaN never is."""
        if self.choices:
            return value in self.choices
        return (
            (self.low is None or value >= self.low)
            and (self.above is None or value > self.above)
            and (self.high is None or value <= self.high)
        )


def setting(default: Any, comment: str, *, free: bool = False, **bounds: Any) -> Any:
    """A dataclass field with its `Rule`. Lists and dicts are copied for every instance."""
    metadata = {"rule": Rule(comment, is_free=free, **bounds)}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(schema: type, *, free: bool = False) -> Any:
    """A dataclass field that holds a group of settings."""
    comment = (schema.__doc__ or "").splitlines()[0]
    return field(default_factory=schema, metadata={"rule": Rule(comment, is_free=free)})


def rule_of(config_field: Any) -> Rule:
    """Rule of a dataclass field that `setting` or `section` made."""
    return config_field.metadata["rule"]


def check_ranges(config: Any, prefix: str = "") -> None:
    """Check every setting of a configuration, and of the groups in it, against its rule.

    Raises:
        UserError: naming the first setting whose value is not allowed or a secret, with `prefix` before its name.
    """
    for config_field in fields(config):
        name, value, rule = prefix + config_field.name, getattr(config, config_field.name), rule_of(config_field)
        if is_dataclass(value):
            check_ranges(value, f"{name}.")
            continue
        for item_name, item in _items(name, value):
            _check_secret(item_name, item)
            if is_dataclass(item):
                check_ranges(item, f"{item_name}.")
            elif item is not None and rule.allowed() and not rule.accepts(item):
                raise UserError(f"{item_name}={item}: must be {rule.allowed()}")


def _items(name: str, value: Any) -> Iterable[tuple[str, Any]]:
    """(name, value) of every value that a rule applies to: of a list or dict, each entry."""
    if isinstance(value, dict):
        return [(f"{name}.{key}", item) for key, item in value.items()]
    return [(name, item) for item in value] if isinstance(value, list) else [(name, value)]


def decisive(config: Any) -> dict[str, Any]:
    """The settings that decide a result, as JSON-like values: a configuration without its free settings."""

    values = {f.name: getattr(config, f.name) for f in fields(config) if not rule_of(f).is_free}
    return {name: decisive(value) if is_dataclass(value) else value for name, value in values.items()}


def _check_secret(name: str, value: Any) -> None:
    """Refuse secrets: settings are written to files, pages and trackers."""
    for key, item in value.items() if isinstance(value, dict) else ():
        _check_secret(f"{name}.{key}", item)
    option = value.split("=")[0].replace("-", "_") if isinstance(value, str) and value.startswith("--") else ""
    if isinstance(value, str) and (SECRET_URL.search(value) or any(map(SECRET_NAME.search, (name, option)))):
        raise UserError(
            f"{name} holds a secret, and settings are written to files: leave it out, and use an environment variable "
            "(HF_TOKEN, OPENAI_API_KEY, WANDB_API_KEY)"
        )
