"""Plans are strict: what people read is what runs, and bad input is an answer (G8)."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsm_pool.ceremony_runner.plan import (
    FILLED_LENGTH_MAX,
    PLAN_BYTES_MAX,
    STEPS_MAX,
    VALUE_LENGTH_MAX,
    Parameter,
    PlanRefused,
    check_value,
    parse_plan,
    read_plan,
)
from hsm_pool.cli.ceremony_commands import PLANS
from hsm_pool.cli.main import mhsm
from tests.unit.ceremony_runner.rehearsal import THREE_STEPS

HEAD = "title: t\npurpose: p\n"
STEP = "{actor: a, action: b, expected: c}"


def plan_with(step: str, parameters: str = "[]") -> bytes:
    return f"{HEAD}parameters: {parameters}\nsteps:\n  - {STEP}\n  - {step}\n".encode()


def test_placeholders_are_filled_once_and_argument_by_argument() -> None:
    plan = parse_plan(
        plan_with(
            '{actor: "{who}", action: "{who} acts", expected: c, command: [mhsm, "--x={who}", "{who}"]}',
            "[{name: who, prompt: q, kind: text}]",
        )
    )
    step = plan.filled({"who": "a b; {data_directory} $(x)", "data_directory": "/d"})[1]
    assert step.command == ("mhsm", "--x=a b; {data_directory} $(x)", "a b; {data_directory} $(x)")
    assert step.actor == "a b; {data_directory} $(x)"


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("{actor: a, action: b}", "step 2: expected is missing"),
        ("{actor: a, action: b, expected: c, extra: d}", "step 2: unknown field 'extra'"),
        ("{actor: 1, action: b, expected: c}", "step 2: actor must be text"),
        ("{actor: a, action: b, expected: c, command: mhsm status}", "step 2: command must be a list"),
        ("{actor: a, action: b, expected: c, command: [sh, -c, x]}", 'begins with "mhsm"'),
        ("{actor: a, action: b, expected: c, command: []}", 'begins with "mhsm"'),
        ("{actor: a, action: b, expected: c, command: [mhsm, 7]}", "step 2: command must be text"),
        ('{actor: a, action: b, expected: c, command: [mhsm, "{nobody}"]}', "{nobody} is no parameter"),
        ('{actor: a, action: "b {", expected: c}', "step 2: a brace that is no placeholder"),
        ("{actor: a, action: b, expected: c, exit_code: 3}", "step 2: a step without a command"),
        ("{actor: a, action: b, expected: c, command: [mhsm], exit_code: 256}", "from 0 to 255"),
        ("{actor: a, action: b, expected: c, command: [mhsm], exit_code: true}", "from 0 to 255"),
        ('{actor: "a\\e[2J", action: b, expected: c}', "step 2: actor has control characters"),
        ('{actor: "a\\u202e", action: b, expected: c}', "step 2: actor has control characters"),
        ('{actor: a, action: b, expected: c, inputs: ["x\\ny"]}', "more than one line"),
        ("{actor: a, actor: b, action: b, expected: c}", "line 6: a key is repeated"),
        ("{actor: &x a, action: *x, expected: c}", "line 6: anchors and aliases are not allowed"),
        ("{actor: !!str a, action: b, expected: c}", "line 6: tags are not allowed"),
        ("!!python/object/apply:os.system [x]", "line 6: tags are not allowed"),
        ("[[[[[[[[[[]]]]]]]]]]", "nested too deeply"),
        ("{<<: {actor: a}, action: b, expected: c}", "a key is repeated or not a word"),
        ("just text", "step 2: must be a mapping"),
        ("{actor: a", "not YAML in line"),
        ("{actor: 2001-99-99, action: b, expected: c}", "not readable"),
    ],
)
def test_a_refusal_names_the_step_or_the_line(step: str, said: str) -> None:
    with pytest.raises(PlanRefused) as refused:
        parse_plan(plan_with(step))
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ("[{name: A, prompt: q, kind: text}]", "parameter 1: a name has"),
        ("[{name: a, prompt: q, kind: secret}]", "kind is one of"),
        ("[{name: key_passphrase, prompt: q, kind: text}]", "secrets are never parameters"),
        ("[{name: a, prompt: q, kind: integer, default: x}]", "the default is not of kind integer"),
        ("[{name: a, prompt: q, kind: text, default: 3}]", "the default is not of kind text"),
        ("[{name: a, prompt: q, kind: path, default: -x}]", "not begin with a dash"),
        ("[{name: data_directory, prompt: q, kind: path}]", "is called data_directory"),
        ("[{name: a, prompt: q, kind: text}, {name: a, prompt: q, kind: text}]", "one name"),
        ("{}", "parameters must be a list"),
    ],
)
def test_parameters_are_strict(parameters: str, said: str) -> None:
    with pytest.raises(PlanRefused) as refused:
        parse_plan(plan_with(STEP, parameters))
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("path", "--data-dir=/elsewhere"),
        ("text", ""),
        ("text", "a\nb"),
        ("text", "\x1b[2J"),
        ("text", "x" * (VALUE_LENGTH_MAX + 1)),
        ("integer", "1_0"),
        ("integer", "\u0661"),
        ("integer", "1000001"),
        ("integer", "2.5"),
    ],
)
def test_values_are_checked(kind: str, value: str) -> None:
    """No value can become an option of the command."""
    with pytest.raises(PlanRefused):
        check_value(Parameter("x", "q", kind, None), value)


def test_bounds() -> None:
    steps = "".join(f"  - {STEP}\n" for _ in range(STEPS_MAX))
    assert len(parse_plan(f"{HEAD}steps:\n{steps}".encode()).steps) == STEPS_MAX
    with pytest.raises(PlanRefused, match=f"more than {STEPS_MAX} steps"):
        parse_plan(f"{HEAD}steps:\n{steps}  - {STEP}\n".encode())
    filler = b"#" * (PLAN_BYTES_MAX - len(THREE_STEPS))
    parse_plan(THREE_STEPS + filler)
    with pytest.raises(PlanRefused, match="bytes"):
        parse_plan(THREE_STEPS + filler + b"#")
    with pytest.raises(PlanRefused, match="no steps"):
        parse_plan(f"{HEAD}steps: []\n".encode())
    many = "{x}" * 20_000
    plan = parse_plan(
        plan_with(f'{{actor: a, action: "{many}", expected: c}}', "[{name: x, prompt: q, kind: text}]")
    )
    with pytest.raises(PlanRefused, match=str(FILLED_LENGTH_MAX)):
        plan.filled({"x": "x" * VALUE_LENGTH_MAX})


@given(
    st.one_of(
        st.binary(max_size=200),
        st.text(alphabet="{}[]:,-&*!|>'\"#%@ \nabtitlesp0", max_size=200).map(str.encode),
        st.tuples(st.integers(0, len(THREE_STEPS) - 1), st.integers(0, 255)).map(
            lambda change: THREE_STEPS[: change[0]] + bytes([change[1]]) + THREE_STEPS[change[0] + 1 :]
        ),
    )
)
def test_anything_is_a_plan_or_refused(octets: bytes) -> None:
    try:
        plan = parse_plan(octets)
    except PlanRefused:
        return
    assert plan.text.encode() == octets


def _command_of(argv: tuple[str, ...]) -> click.Command | None:
    """Return the command that an argv names, or None if this build has no such verb."""
    command: click.Command = mhsm
    context = click.Context(mhsm)
    for word in argv[1:]:
        if not isinstance(command, click.Group):
            return command
        found = command.get_command(context, word)
        if found is None:
            return None
        command = found
    return command


@pytest.mark.parametrize("path", sorted(PLANS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_plans_that_come_along_use_only_options_that_exist(path: Path) -> None:
    steps = [step for step in read_plan(path).steps if step.command]
    commands = [_command_of(step.command) for step in steps]
    missing = {
        " ".join(step.command[1:3]) for step, command in zip(steps, commands, strict=True) if command is None
    }
    if missing:
        pytest.skip(f"this build has no {', '.join(sorted(missing))}")
    for step, command in zip(steps, commands, strict=True):
        assert command is not None
        known = {option for parameter in command.params for option in parameter.opts}
        used = {argument for argument in step.command if argument.startswith("-")}
        assert used <= known, step.command
        needed = {p.opts[0] for p in command.params if p.required and isinstance(p, click.Option)}
        assert needed <= used, step.command


def test_four_plans_come_along() -> None:
    assert {path.stem for path in PLANS.glob("*.yaml")} == {
        "activation",
        "recovery",
        "officer-change",
        "yearly-proof",
    }
