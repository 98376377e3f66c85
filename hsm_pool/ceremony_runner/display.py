"""What people in the room see of a plan and its steps, as it is: read aloud, it must not be rewrapped."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from rich.console import Console

from hsm_pool.ceremony_runner.plan import Plan, Step


def show(console: Console, *lines: str) -> None:
    """Show lines, neither wrapped nor coloured."""
    for line in lines:
        console.out(line, highlight=False)


def show_plan(console: Console, plan: Plan) -> None:
    """Show what the ceremony is, with the words that everybody in the room compares."""
    lines = (plan.title, plan.purpose, f"plan: SHA-256 {plan.digest}", f"      words   {plan.words}")
    show(console, *lines)


def show_parameters(console: Console, plan: Plan, values: Mapping[str, str]) -> None:
    """Show what is asked for before the first step, by the names that an answers file uses."""
    lines = [f"  {entry.name}: {values.get(entry.name, '?')}  ({entry.prompt})" for entry in plan.parameters]
    show(console, "\nParameters", *lines)


def show_step(console: Console, number: int, steps: int, step: Step) -> None:
    """Show a step and its exact command."""
    lines = [f"\nStep {number} of {steps} - {step.actor}", f"  {step.action}"]
    lines.append(f"  $ {shlex.join(step.command)}" if step.command else "  (a check by eye: no command)")
    if step.command and step.exit_code:
        lines.append(f"  exit code: {step.exit_code}")
    lines.append(f"  expected: {step.expected}")
    lines += [f"  on record before: {path}" for path in step.inputs]
    lines += [f"  on record after: {path}" for path in step.outputs]
    show(console, *lines)
