"""The mhsm command; each subcommand is loaded only when it is used."""

from __future__ import annotations

import importlib
import sys

import click

_COMMANDS = {
    "up": "hsm_pool.cli.pool_commands:up",
    "down": "hsm_pool.cli.pool_commands:down",
    "kill": "hsm_pool.cli.pool_commands:kill",
    "status": "hsm_pool.cli.status_command:status",
    "attest": "hsm_pool.cli.attest_command:attest",
    "key": "hsm_pool.cli.key_commands:key",
    "crypto": "hsm_pool.cli.crypto_commands:crypto",
    "token": "hsm_pool.cli.token_commands:token",
    "client": "hsm_pool.cli.client_commands:client_group",
    "role": "hsm_pool.cli.role_commands:role_group",
    "audit": "hsm_pool.cli.audit_commands:audit_group",
    "officers": "hsm_pool.cli.officers_commands:officers_group",
    "backup": "hsm_pool.cli.backup_commands:backup_group",
    "firmware": "hsm_pool.cli.firmware_commands:firmware_group",
    "ceremony": "hsm_pool.cli.ceremony_commands:ceremony_group",
    "security-domain": "hsm_pool.cli.security_domain_commands:security_domain_group",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 failed, 2 usage, 3 not activated or locked, 4 share refused or quorum "
    "missing, 5 unreachable, 6 signature or evidence refused, 7 outcome unknown, 130 interrupted.",
)
@click.version_option(package_name="mhsm-pool-simulator")
def mhsm() -> None:
    """Run, use, break and recover a simulated Managed HSM pool. Not for production keys."""


def main() -> None:
    """Entry point."""
    try:
        from hsm_pool.cli import output  # the longest part of starting: Ctrl-C may come within it
    except KeyboardInterrupt:
        click.echo("mhsm: interrupted", err=True)
        sys.exit(130)
    output.main(mhsm)
