"""Ceremony plans: YAML that people read aloud, parsed strictly and bounded.

The schema, all texts in one language of the reader's choice::

    title: What is done
    purpose: Why, and who must be in the room
    parameters:                        # asked for before step 1
      - {name: required, prompt: How many officers open it, kind: integer, default: 2}
    steps:                             # numbered from 1
      - actor: officer 1               # who acts; a change of actor clears the screen
        action: What this person does, in words
        command: [mhsm, security-domain, status, --data-dir, "{data_directory}"]   # left out: a manual check
        expected: What must be seen afterwards
        exit_code: 0                   # of the command
        expected_output: text          # that its standard output must contain
        inputs: ["{file}"]             # hashed before the step, as evidence
        outputs: ["{file}"]            # hashed after it

``{name}`` stands for a parameter, in every text of a step. ``{data_directory}`` is always there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import yaml

from security_domain import fingerprints

PLAN_BYTES_MAX: Final = 64 * 1024
STEPS_MAX: Final = 200
PARAMETERS_MAX: Final = 50
DEPTH_MAX: Final = 8
VALUE_LENGTH_MAX: Final = 500
"""Characters of a parameter's value."""
FILLED_LENGTH_MAX: Final = 1024 * 1024
"""Characters of all steps with their parameters filled in, so that a transcript stays bounded."""
INTEGER_MAX: Final = 1_000_000

DATA_DIRECTORY: Final = "data_directory"
"""The parameter that every plan has: the data directory of the pool."""

KINDS: Final = ("path", "integer", "text")
COMMAND: Final = "mhsm"

_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
# A parameter is shown, recorded and put into argv: nothing that may be asked for in this way.
_SECRET_WORDS = {"passphrase", "password", "secret", "pin", "mnemonic"}

_PLAN_FIELDS = {"title": True, "purpose": True, "parameters": False, "steps": True}
_PARAMETER_FIELDS = {"name": True, "prompt": True, "kind": True, "default": False}
_STEP_FIELDS = {
    "actor": True,
    "action": True,
    "command": False,
    "expected": True,
    "exit_code": False,
    "expected_output": False,
    "inputs": False,
    "outputs": False,
}


class PlanRefused(Exception):
    """The plan, or a value for one of its parameters, is not acceptable; the message names where."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """What is asked for before the first step. The kind is path, integer or text."""

    name: str
    prompt: str
    kind: str
    default: str | None


@dataclass(frozen=True, slots=True)
class Step:
    """One step. Without a command it is a manual check, and exit_code and expected_output mean nothing."""

    actor: str
    action: str
    command: tuple[str, ...]
    expected: str
    exit_code: int
    expected_output: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def texts(self) -> tuple[str, ...]:
        """Return all texts in which placeholders are filled in."""
        single = (self.actor, self.action, self.expected, self.expected_output)
        return (*single, *self.command, *self.inputs, *self.outputs)


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan, and the text that it was read from."""

    title: str
    purpose: str
    parameters: tuple[Parameter, ...]
    steps: tuple[Step, ...]
    text: str

    @property
    def digest(self) -> str:
        """SHA-256 of the plan's octets, hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def words(self) -> str:
        """The digest in eight words."""
        return fingerprints.words(self.text.encode())

    def filled(self, values: Mapping[str, str]) -> tuple[Step, ...]:
        """Return the steps with the parameters' values in place of the placeholders.

        Args:
            values: Of all parameters and data_directory, each as check_value() returned it. A missing
                one leaves its placeholder, which is for showing only.

        Raises:
            PlanRefused: The result is longer than FILLED_LENGTH_MAX characters.
        """

        def fill(text: str) -> str:
            return _PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), text)

        filled = tuple(
            replace(
                step,
                actor=fill(step.actor),
                action=fill(step.action),
                command=tuple(fill(argument) for argument in step.command),
                expected=fill(step.expected),
                expected_output=fill(step.expected_output),
                inputs=tuple(fill(path) for path in step.inputs),
                outputs=tuple(fill(path) for path in step.outputs),
            )
            for step in self.steps
        )
        if sum(len(text) for step in filled for text in step.texts()) > FILLED_LENGTH_MAX:
            raise PlanRefused(f"the plan with its parameters has more than {FILLED_LENGTH_MAX} characters")
        return filled


def check_value(parameter: Parameter, value: str) -> str:
    """Return the value of a parameter as it is used and recorded.

    Args:
        parameter: What was asked for.
        value: What was answered. In a path a leading ~ becomes the home directory.

    Raises:
        PlanRefused: It is empty, too long, an option in disguise, or not of the parameter's kind.
    """
    where = f"parameter {parameter.name}"
    value = value.strip()
    if parameter.kind == "path" and value.startswith("~"):
        try:
            value = str(Path(value).expanduser())
        except RuntimeError:
            raise PlanRefused(f"{where}: no such home directory") from None
    if not value or len(value) > VALUE_LENGTH_MAX:
        raise PlanRefused(f"{where}: needs 1 to {VALUE_LENGTH_MAX} characters")
    if not value.isprintable() or value.startswith("-"):
        raise PlanRefused(f"{where}: must be printable and not begin with a dash")
    if parameter.kind == "integer":
        if not (value.isascii() and value.isdigit() and int(value) <= INTEGER_MAX):
            raise PlanRefused(f"{where}: must be a whole number up to {INTEGER_MAX}")
        value = str(int(value))
    return value


def read_plan(path: Path) -> Plan:
    """Read a plan from a file.

    Raises:
        PlanRefused: It is not a plan.
        OSError: It cannot be read.
    """
    with path.open("rb") as stream:
        return parse_plan(stream.read(PLAN_BYTES_MAX + 1))


def parse_plan(octets: bytes) -> Plan:
    """Parse a plan.

    Args:
        octets: YAML in UTF-8, at most PLAN_BYTES_MAX, without aliases, anchors, tags and repeated keys.

    Raises:
        PlanRefused: It is not a plan; the message names the step or the line.
    """
    if len(octets) > PLAN_BYTES_MAX:
        raise PlanRefused(f"the plan has more than {PLAN_BYTES_MAX} bytes")
    try:
        text = octets.decode("utf-8")
        _check_events(text)
        _check_keys(yaml.compose(text, Loader=yaml.SafeLoader))
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        where = f" in line {mark.line + 1}" if mark else ""
        raise PlanRefused(f"the plan is not YAML{where}") from None
    except (ValueError, RecursionError, OverflowError):  # impossible dates and numbers, not UTF-8
        raise PlanRefused("the plan is not readable as YAML in UTF-8") from None
    fields = _object(document, _PLAN_FIELDS, "the plan")
    parameters = tuple(
        _parameter(value, f"parameter {number}")
        for number, value in enumerate(_list(fields, "parameters", PARAMETERS_MAX, "the plan"), start=1)
    )
    names = {parameter.name for parameter in parameters} | {DATA_DIRECTORY}
    if len(names) != len(parameters) + 1:
        raise PlanRefused(f"the plan: two parameters have one name, or one is called {DATA_DIRECTORY}")
    steps = tuple(
        _step(value, f"step {number}", names)
        for number, value in enumerate(_list(fields, "steps", STEPS_MAX, "the plan"), start=1)
    )
    if not steps:
        raise PlanRefused("the plan has no steps")
    return Plan(
        _text(fields, "title", "the plan"), _text(fields, "purpose", "the plan"), parameters, steps, text
    )


def _check_events(text: str) -> None:
    """Refuse what a plan has no use for before anything is built from it."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise PlanRefused(f"line {line}: anchors and aliases are not allowed")
        if getattr(event, "tag", None) is not None:
            raise PlanRefused(f"line {line}: tags are not allowed")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEPTH_MAX:
                raise PlanRefused(f"line {line}: nested too deeply")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _check_keys(node: yaml.Node | None) -> None:
    """Refuse repeated keys: what people read first must be what counts."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value in seen or key.value == "<<":
                raise PlanRefused(f"line {key.start_mark.line + 1}: a key is repeated or not a word")
            seen.add(key.value)
            _check_keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_keys(value)


def _parameter(value: object, where: str) -> Parameter:
    fields = _object(value, _PARAMETER_FIELDS, where)
    name, kind = _text(fields, "name", where), _text(fields, "kind", where)
    if not _NAME.fullmatch(name):
        raise PlanRefused(f"{where}: a name has lower-case letters, digits and underscores")
    if _SECRET_WORDS & set(name.split("_")):
        raise PlanRefused(f"{where}: secrets are never parameters; the command itself asks for them")
    if kind not in KINDS:
        raise PlanRefused(f"{where}: kind is one of {', '.join(KINDS)}")
    parameter = Parameter(name, _text(fields, "prompt", where), kind, None)
    default = fields.get("default")
    if default is None:
        return parameter
    if isinstance(default, bool) or not isinstance(default, int if kind == "integer" else str):
        raise PlanRefused(f"{where}: the default is not of kind {kind}")
    return replace(parameter, default=check_value(parameter, str(default)))


def _step(value: object, where: str, names: set[str]) -> Step:
    fields = _object(value, _STEP_FIELDS, where)
    command = _texts(fields, "command", where)
    if "command" in fields and command[:1] != (COMMAND,):
        raise PlanRefused(f'{where}: a command is a list that begins with "{COMMAND}"')
    if not command and {"exit_code", "expected_output"} & set(fields):
        raise PlanRefused(f"{where}: a step without a command has no exit_code and no expected_output")
    exit_code = fields.get("exit_code", 0)
    if isinstance(exit_code, bool) or not isinstance(exit_code, int) or not 0 <= exit_code <= 255:
        raise PlanRefused(f"{where}: exit_code is a number from 0 to 255")
    step = Step(
        actor=_text(fields, "actor", where),
        action=_text(fields, "action", where),
        command=command,
        expected=_text(fields, "expected", where),
        exit_code=exit_code,
        expected_output=_text(fields, "expected_output", where) if "expected_output" in fields else "",
        inputs=_texts(fields, "inputs", where),
        outputs=_texts(fields, "outputs", where),
    )
    for text in step.texts():
        unknown = [name for name in _PLACEHOLDER.findall(text) if name not in names]
        if unknown:
            raise PlanRefused(f"{where}: {{{unknown[0]}}} is no parameter")
        if re.search(r"[{}]", _PLACEHOLDER.sub("", text)):
            raise PlanRefused(f"{where}: a brace that is no placeholder")
    return step


def _object(value: object, known: Mapping[str, bool], where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PlanRefused(f"{where}: must be a mapping")
    for name in value:
        if name not in known:
            raise PlanRefused(f"{where}: unknown field {name!r:.60}")
    for name, needed in known.items():
        if needed and name not in value:
            raise PlanRefused(f"{where}: {name} is missing")
    return value


def _list(fields: Mapping[str, Any], name: str, length_max: int, where: str) -> list[Any]:
    value = fields.get(name, [])
    if not isinstance(value, list):
        raise PlanRefused(f"{where}: {name} must be a list")
    if len(value) > length_max:
        raise PlanRefused(f"{where}: more than {length_max} {name}")
    return value


def _text(fields: Mapping[str, Any], name: str, where: str) -> str:
    return _checked_text(fields[name], f"{where}: {name}")


def _texts(fields: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    values = _list(fields, name, 100, where)
    texts = tuple(_checked_text(value, f"{where}: {name}") for value in values)
    if any("\n" in text for text in texts):
        raise PlanRefused(f"{where}: {name} has more than one line")
    return texts


def _checked_text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise PlanRefused(f"{where} must be text, in quotes if it looks like a number or a date")
    # Line feeds only: nothing in a plan may steer the terminal or hide what is said.
    if not all(character.isprintable() or character == "\n" for character in value):
        raise PlanRefused(f"{where} has control characters")
    return value.strip()
