"""The tables for people."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table


def _range(value: dict[str, Any], digits: int = 0) -> str:
    low, middle, high = (f"{value[name]:,.{digits}f}" for name in ("minimum", "median", "maximum"))
    return f"{middle} ({low}-{high})"


def _median(value: dict[str, Any]) -> str:
    return f"{value['median']:,.1f}"


def _throughput_table(result: dict[str, Any]) -> Table:
    table = Table(title="Operations a second: median (minimum-maximum)", title_justify="left")
    for heading in ("operation", "how", "processes", "per second", "of openssl", "of library", "CPU us/op"):
        table.add_column(heading, justify="left" if heading in {"operation", "how"} else "right")
    for entry in result["throughput"]:
        name = entry["operation"]
        for row in entry["openssl"]:
            cpu = f"{row['cpu_us_per_operation']:,.1f}" if "cpu_us_per_operation" in row else ""
            rate = f"{row['operations_per_second']:,.0f}"
            table.add_row(name, "openssl speed", str(row["processes"]), rate, "", "", cpu)
            name = ""
        for row in entry["library"]:
            rate, cpu = _range(row["operations_per_second"]), _median(row["cpu_us_per_operation"])
            table.add_row("", "library in a loop", str(row["client_processes"]), rate, "", "", cpu)
        for row in entry["pool"]:
            table.add_row(
                "",
                f"pool, {row['mode']} of {row['items_per_message']}",
                str(row["client_processes"]),
                _range(row["operations_per_second"]),
                f"{row['ratio_to_openssl']:.1%}",
                f"{row['ratio_to_library']:.1%}",
                _median(row["cpu_us_per_operation"]),
            )
        table.add_section()
    return table


def _commit_table(result: dict[str, Any]) -> Table:
    table = Table(title="Writes", title_justify="left")
    for heading in ("what", "writers", "p50 ms", "p99 ms", "per second"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for entry in result["commit"]:
        for name, text in (("create_ec_key", "create an EC key"), ("etcd_put_1_kib", "etcd put of 1 KiB")):
            measured = entry[name]
            table.add_row(
                text,
                str(entry["writers"]),
                _range(measured["p50_ms"], 1),
                _range(measured["p99_ms"], 1),
                _range(measured["writes_per_second"]),
            )
    return table


def audit_table(entries: list[dict[str, Any]]) -> Table:
    """Return the table of the audit log."""
    table = Table(title="Audit log", title_justify="left")
    for heading in ("how", "records per second", "CPU us", "p50 us", "p99 us", "bytes"):
        table.add_column(heading, justify="left" if heading == "how" else "right")
    for entry in entries:
        names = ("cpu_us_per_record", "p50_us", "p99_us", "bytes_per_record")
        row = [_median(entry[name]) if name in entry else "" for name in names]
        table.add_row(entry["how"], _range(entry["records_per_second"]), *row)
    return table


def _fault_table(result: dict[str, Any]) -> Table:
    table = Table(title="Faults, in milliseconds", title_justify="left")
    for heading in ("fault", "what", "median (minimum-maximum)", "repeats"):
        table.add_column(heading, justify="right" if heading == "repeats" else "left")
    for entry in result["faults"]:
        label = entry["fault"]
        for name, value in entry.items():
            if name != "fault":
                what = name.removesuffix("_ms").replace("_", " ")
                table.add_row(label, what, _range(value), str(value["repeats"]))
                label = ""
    return table


def _failover_table(result: dict[str, Any]) -> Table:
    entry = result["failover"]
    table = Table(title=f"{entry['fault']}, in milliseconds", title_justify="left")
    for heading in ("what", "median", "p99", "maximum", "runs"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for name, value in entry.items():
        if name.endswith("_ms"):
            figures = [f"{value[figure]:,.0f}" for figure in ("median", "p99", "maximum")]
            table.add_row(name.removesuffix("_ms").replace("_", " "), *figures, str(value["repeats"]))
    return table


def _patch_table(result: dict[str, Any]) -> Table:
    entry = result["patch"]
    took = f"{entry['patch_ms'] / 1000:,.1f} s each, {entry['failed_calls']} failed calls"
    table = Table(title=f"{entry['patches']} rolling patches ({took}), in milliseconds", title_justify="left")
    for heading in ("call", "figure", "before", "during", "ratio", "calls before", "calls during"):
        table.add_column(heading, justify="left" if heading in {"call", "figure"} else "right")
    for call in ("sign", "write"):
        values = entry[call]
        for figure in ("p50", "p99"):
            before, during, ratio = (values[f"{figure}_{of}"] for of in ("ms_before", "ms_during", "ratio"))
            cells = (f"{before:,.2f}", f"{during:,.2f}", f"{ratio:.2f}")
            table.add_row(call, figure, *cells, str(values["calls_before"]), str(values["calls_during"]))
    return table


def _overload_table(result: dict[str, Any]) -> Table:
    entry = result["overload"]
    memory, writes = entry["resident_mebibytes"], entry["writes"]
    cpu_ms = entry["cpu_ms_per_done_call"]
    cost_us = sum(entry["cost_us_per_call"].values())
    factor = entry["offered_calls_per_second"] / entry["maximum_calls_per_second"]
    title = [
        (
            f"{factor:.1f} times the maximum of {entry['maximum_calls_per_second']:,.1f} batches a second, "
            f"for {entry['seconds']:.0f} s: {entry['goodput_ratio']:.0%} of the maximum was done"
        ),
        (
            f"partitions' processor time a batch: {cpu_ms['overloaded']:.0f} ms, at the maximum "
            f"{cpu_ms['at_maximum']:.0f} ms; admission and metrics cost {cost_us:.0f} µs a call"
        ),
        f"resident memory: {memory['before']} MiB before, {memory['peak']} at most, {memory['after']} after",
        (
            f"{writes['acknowledged']} writes acknowledged, {writes['lost']} lost; "
            f"{entry['processes_replaced']} processes replaced"
        ),
    ]
    table = Table(title="\n".join(title), title_justify="left")
    for heading in (
        "principal",
        "offered",
        "done",
        "refused",
        "failed",
        "done of offered",
        "p50 ms",
        "p99 ms",
    ):
        table.add_column(heading, justify="left" if heading == "principal" else "right")
    for name in ("greedy", "modest"):
        values = entry[name]
        counts = [f"{values[count]:,}" for count in ("offered", "done", "refused", "failed")]
        times = [f"{values[figure] or 0:,.0f}" for figure in ("p50_ms", "p99_ms")]
        table.add_row(name, *counts, f"{values['done_share']:.1%}", *times)
    return table


def print_tables(result: dict[str, Any]) -> None:
    """Print the result for people."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=130)
    machine = result["machine"]
    console.print(
        f"{machine['processors']} processors ({machine['processor_model']}), kernel {machine['kernel']}, "
        f"etcd {machine['etcd']}; load average before: {machine['load_average_before']}; "
        f"measured in {result['seconds']:.0f} s",
        highlight=False,
    )
    if machine["load_average_before"] > machine["processors"] / 2:
        console.print("the machine was busy: trust the processor time, not the rates", style="bold")
    makers: dict[str, Callable[[dict[str, Any]], Table]] = {
        "throughput": _throughput_table,
        "commit": _commit_table,
        "audit": lambda whole: audit_table(whole["audit"]),
        "faults": _fault_table,
        "failover": _failover_table,
        "patch": _patch_table,
        "overload": _overload_table,
    }
    for name, make in makers.items():
        if name in result:
            console.print(make(result))
