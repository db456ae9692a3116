"""Settings: one frozen pydantic base, files and overrides read into it, and errors that say what to mend.

A settings file is YAML; every key may be overridden as ``dotted.key=value`` on the command line, with the value
read as YAML. Errors name the file, the key, what was wanted and what came.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sized
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from raytune_ft.core.errors import ConfigError
from raytune_ft.core.grammar import number_of

C = TypeVar("C", bound="Config")
Place = Annotated[str, Field(min_length=1)]
"""A path, a URI or the name of a model: nothing at all would be a path, too, that of the current folder."""

# A secret may hold slashes and signs of its own: it ends at the last @ before the query. A port is no secret.
_CREDENTIALS = re.compile(r"(?<=://)(?!anonymous@)(?:[^/\s:@?#]+:(?!\d+/)[^\s?#]*@|[^/@\s]+@)")
_QUERY_SECRETS = re.compile(
    r"([?&#][\w.-]*(?:token|secret|signature|password|passwd|pwd|credential|key|sig|auth|jwt)[\w.-]*=)[^&\s]+",
    re.IGNORECASE,
)


_TAG = "tag:yaml.org,2002:"
_LIKE, _LIKE_BY_WORDS, _LIKE_AS_PART = 0.75, 0.6, 0.28
"""From which likeness (difflib's, up to 1) a setting is meant by an unknown key; where they share a word; where the key
is a part of the setting."""
_AS_LIKE = 0.04
"""How much less like a setting may be that is named beside the likest."""
_TELLING_LETTERS = 4
"""Letters of a key that it takes to know a setting by how one of its words begins."""


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: ``no`` and dates are text, ``1e-3`` is a number, and no key stands twice."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        """The node of a mapping, as it is written: what it merges is not in it yet.

        Raises:
            ConstructorError: if a key stands twice in it.
        """
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _TAG + "merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands twice", key.start_mark
                    )
                seen.add(key.value)
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in {_TAG + "bool", _TAG + "timestamp"}]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_TAG + "bool", re.compile("^(?:true|false|True|False)$"), list("tfTF"))
_Loader.add_implicit_resolver(_TAG + "float", re.compile(r"^[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


class Config(BaseModel):
    """Base of all settings: immutable, unknown keys and infinite numbers refused, documented under each field."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        validate_default=True,
        allow_inf_nan=False,
    )

    not_identity: ClassVar[frozenset[str]] = frozenset({"output_dir", "output_path"})
    """Fields that say where or how fast something is made, not what: they do not count when a run looks for its own
    finished work."""

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ConfigError(explain(error, type(self))) from None

    # Nested settings then skip this __init__ (pydantic's own flag), so that one error carries the whole dotted key.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def resolved(self) -> dict[str, Any]:
        """All settings as JSON-ready values, defaults included, secrets and credentials masked."""
        return masked(self.model_dump(mode="json"))  # type: ignore[no-any-return]

    def identity(self) -> dict[str, Any]:
        """The resolved settings that decide what the run makes."""
        return {key: value for key, value in self.resolved().items() if key not in self.not_identity}

    @property
    def idle(self) -> Collection[str]:
        """Dotted keys that decide nothing beside the others: another value of theirs makes no other run."""
        return ()

    def differs(self, name: str) -> bool:
        """Whether a setting is another than its default; what was given does not tell, since copies are given all."""
        default = type(self).model_fields[name].get_default(call_default_factory=True)
        return bool(getattr(self, name) != default)

    def refuse_idle(self, names: Iterable[str], why: str, *, under: str = "") -> None:
        """Refuses settings that would change nothing, where they say something else than they do by themselves.

        Args:
            names: of the settings.
            why: they would change nothing, and what to do.
            under: what stands before their names in an error, where these settings are part of others.

        Raises:
            ValueError: naming the first of them.
        """
        for name in names:
            if self.differs(name):
                raise ValueError(f"{under}{name}: {why}")

    def with_overrides(self: C, **changes: Any) -> C:
        """A copy with `changes`, validated again.

        Raises:
            ConfigError: if a changed value is not valid.
        """
        return type(self)(**{**self.model_dump(), **changes})


def masked(value: Any) -> Any:
    """`value` with credentials in URIs (``scheme://user:secret@host``, ``?token=secret``) replaced by ``***``.

    The name that asks Google's storage for no credentials (``gs://anonymous@bucket``) is none, and stays.
    """
    if isinstance(value, str):
        hidden = _CREDENTIALS.sub("***@", value)
        return _QUERY_SECRETS.sub(r"\1***", hidden) if "://" in hidden else hidden
    if isinstance(value, SecretStr):
        return "***"
    if isinstance(value, Mapping):
        return {masked(key): masked(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item) for item in value]
    return value


def read_settings(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: if the file is missing, is not YAML (with the line), or holds something else than a mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such settings file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a settings file ({error})") from None
    try:
        settings = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    try:
        json.dumps(settings, default=str)
    except (ValueError, RecursionError):
        raise ConfigError(f"{path}: an anchor (&) stands in its own value, or mappings are nested too deep") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected a mapping of settings (key: value), found {_kind(settings)}")
    return settings


def apply_overrides(settings: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `settings` with each ``dotted.key=value`` set; values are read as YAML.

    Raises:
        ConfigError: if an override has no ``=`` or goes through something that is not a mapping.
    """
    result = _copied(settings)
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key:
            raise ConfigError(f"override {override!r}: expected dotted.key=value, for example learning_rate=0.001")
        value = _value(text, override)
        *parents, last = key.split(".")
        target = result
        for parent in parents:
            if target.get(parent) is None:
                target[parent] = {}
            target = target[parent]
            if not isinstance(target, dict):
                raise ConfigError(f"override {override!r}: {parent} is {_kind(target)}, it has no keys")
        target[last] = value
    return result


def _value(text: str, override: str) -> Any:
    if " #" in text and text.lstrip()[0] not in "\"'[{":
        return text  # in YAML a comment would begin there
    try:
        return yaml.load(text, _Loader) if text else ""  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, RecursionError):
        raise ConfigError(f"override {override!r}: {text!r} is not a valid YAML value") from None


def load_config(cls: type[C], path: str | Path, overrides: Iterable[str] = ()) -> C:
    """Settings of type `cls` from a YAML file, with command-line overrides applied.

    Raises:
        ConfigError: with one line a fault: ``file: key: what was wanted (got what)``.
    """
    return parse_config(cls, apply_overrides(read_settings(path), overrides), origin=str(path))


def parse_config(cls: type[C], settings: Mapping[str, Any], *, origin: str) -> C:
    """Settings of type `cls` from a mapping; `origin` (a file name) starts each error line.

    Raises:
        ConfigError: as `load_config`.
    """
    try:
        return cls.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(explain(error, cls, origin=origin)) from None


def explain(error: ValidationError, cls: type[BaseModel], *, origin: str = "") -> str:
    """One line a fault of a validation error: where, what was wanted, what came, and the nearest right key."""
    prefix = f"{origin}: " if origin else f"{cls.__name__}: "
    faults = [item for item in error.errors(include_url=False) if not _is_told_by_its_items(item)]
    return "\n".join(prefix + _fault(item, cls) for item in faults)


def _is_told_by_its_items(item: Any) -> bool:
    """Whether a list counts as too short only because pydantic does not count its faulty items."""
    given = item["input"]
    return item["type"] == "too_short" and isinstance(given, Sized) and len(given) >= item["ctx"]["min_length"]


def _fault(item: Any, cls: type[BaseModel]) -> str:
    location = [str(part) for part in item["loc"] if not str(part).startswith("function-")]
    key = ".".join(location)
    kind = item["type"]
    if kind == "extra_forbidden":
        known = sorted(_fields_at(cls, location[:-1]))
        if near := _nearest(location[-1], known):
            return f"{key}: there is no such setting; did you mean {' or '.join(near)}?"
        return f"{key}: there is no such setting (known: {', '.join(known)})"
    if kind == "missing":
        return f"{key}: is required and was not given"
    wanted = _wanted(kind, item.get("ctx", {}), item["msg"])
    got = masked(item["input"]) if not isinstance(item["input"], BaseModel) else None
    if kind == "value_error" and (not location or isinstance(got, dict | None.__class__)):
        return f"{key}: {wanted}" if key else wanted
    return f"{key}: {wanted} (got {got!r})"


def _nearest(key: str, known: Iterable[str]) -> list[str]:
    """The settings that a key may stand for: those that it is a part of, or that are spelt much like it; of more than
    one the likest."""
    words = set(key.split("_"))
    found = {}
    for name in known:
        likeness = difflib.SequenceMatcher(None, name, key).ratio()
        parts = set(name.split("_"))
        shared = words & parts
        is_part = shared == words or (len(key) >= _TELLING_LETTERS and any(part.startswith(key) for part in parts))
        if likeness >= (_LIKE_AS_PART if is_part else _LIKE_BY_WORDS if shared else _LIKE):
            found[name] = likeness
    return [name for name, likeness in found.items() if likeness > max(found.values()) - _AS_LIKE]


def _wanted(kind: str, context: Mapping[str, Any], message: str) -> str:
    words = {
        "greater_than_equal": "must be at least {ge}",
        "greater_than": "must be more than {gt}",
        "less_than_equal": "must be at most {le}",
        "less_than": "must be less than {lt}",
        "enum": "must be one of {expected}",
        "literal_error": "must be one of {expected}",
        "int_parsing": "must be a whole number",
        "int_type": "must be a whole number",
        "int_from_float": "must be a whole number",
        "float_parsing": "must be a number",
        "float_type": "must be a number",
        "finite_number": "must be a finite number",
        "bool_parsing": "must be true or false",
        "bool_type": "must be true or false",
        "string_type": "must be text",
        "list_type": "must be a list",
        "tuple_type": "must be a list",
        "dict_type": "must be a mapping",
        "model_type": "must be a mapping of settings",
        "string_too_short": "must not be empty",
    }
    if kind == "too_short":
        return f"must have at least {number_of(context['min_length'], 'item')}"
    if kind in words:
        return words[kind].format(**context)
    return message.removeprefix("Value error, ")


def _fields_at(cls: type[BaseModel], path: list[str]) -> set[str]:
    """Names of the settings that are allowed below the dotted `path` of `cls`."""
    for part in path:
        field = cls.model_fields.get(part)
        if field is None:
            continue  # the index in a list, or the tag of a union
        models = [
            item for item in _types_in(field.annotation) if isinstance(item, type) and issubclass(item, BaseModel)
        ]
        if models:
            cls = models[0]
    return set(cls.model_fields)


def _types_in(annotation: Any) -> list[Any]:
    inner = get_args(annotation)
    return [annotation] if not inner else [found for item in inner for found in _types_in(item)]


def _copied(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, dict) else value for key, value in settings.items()}


def _kind(value: Any) -> str:
    names = {list: "a list", str: "text", int: "a number", float: "a number", bool: "true/false", dict: "a mapping"}
    return names.get(type(value), type(value).__name__)
