"""An estimate as tables with bars, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from openvision3.estimate.plan import Estimate
from openvision3.estimate.units import flops, gigabytes, hours

BAR = 20
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def bar(share: float, width: int = BAR) -> str:
    """A bar for a share of `width` characters, to an eighth of a character."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    return (_EIGHTHS[8] * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")).ljust(width)


def to_json(phases: Sequence[Estimate]) -> str:
    """One object, or a list of them for several phases."""
    rows = [_values(phase) for phase in phases]
    return json.dumps(rows if len(rows) > 1 else rows[0], indent=2)


def _values(result: Estimate) -> dict[str, Any]:
    values = asdict(result)
    values["devices"] = {
        "name": result.devices.device.name,
        "count": result.devices.count,
        "machines": result.devices.nodes,
        "source": result.devices.device.source,
    }
    values["memory_total"] = result.memory_total
    values["formulas"] = [{"section": section, "formula": formula, "result": value} for section, formula, value in result.formulas]
    return values


def render(result: Estimate, explain: bool = False) -> RenderableType:
    blocks: list[RenderableType] = [_head(result), _work(result), _memory(result), _totals(result)]
    if result.advice:
        blocks.append(_advice(result))
    if explain:
        blocks.append(_formulas(result))
    if result.assumptions:
        blocks.append(Text("assumed: " + "; ".join(dict.fromkeys(result.assumptions)), style="dim"))
    spaced = [block for pair in zip(blocks, [Text("")] * len(blocks), strict=True) for block in pair]
    return Group(*spaced[:-1])


def show(phases: Sequence[Estimate], explain: bool = False, screen: Console | None = None) -> None:
    """Print one estimate after the other, and for several the sum of hours and cost."""
    screen = screen or Console(highlight=False)
    for i, result in enumerate(phases):
        screen.print(*[""] * (i > 0), render(result, explain), sep="\n")
    times, costs = [result.hours for result in phases if result.hours is not None], [result.cost for result in phases if result.cost is not None]
    if len(phases) > 1 and len(times) == len(phases):
        together = f", {sum(costs):,.0f} (in the unit of --price-per-hour)" if costs else ""
        screen.print(Text(f"\nboth in turn: {hours(sum(times))}{together}", style="bold"))


def _head(result: Estimate) -> Text:
    how = {"one": "one device", "replicate": "a copy on each", "fsdp": "FSDP, weights in shards", "hsdp": "HSDP, shards within a machine"}[result.parallel]
    pieces = f", in pieces of {result.micro_batch}" if result.micro_batch < result.local_batch else ""
    vocabulary = f", vocabulary {result.vocabulary:,}" if result.vocabulary else ""
    trained = sum(result.parameters.values()) / 1e6
    return Text.assemble(
        (f"{result.recipe} on {result.devices}", "bold"),
        f" ({how}), {result.precision}\n",
        f"{result.steps:,} steps of {result.batch:,} images ({result.local_batch:,} a device{pieces})\n",
        f"{trained:.1f} M parameters to train{vocabulary}\nVAE {result.vae}",
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 or not name else "right", overflow="fold")
    return table


def _work(result: Estimate) -> Table:
    unit, size = next((u, s) for u, s in (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)) if result.sample_flops >= 3 * s or s == 1e6)
    table = _table(f"operations of one sample, in {unit}", "part", "forward", "backward", "again", "sum", "share", "")
    largest = max(part.share for part in result.parts)
    for part in result.parts:
        numbers = [f"{n / size:,.1f}" if n else "-" for n in (part.forward, part.backward, part.again)]
        table.add_row(part.name, *numbers, f"{part.flops / size:,.1f}", _percent(part.share), Text(bar(part.share / largest), style="cyan"))
    table.add_row(Text("sum", style="bold"), "", "", "", Text(f"{result.sample_flops / size:,.1f}", style="bold"), "", "")
    if result.optimiser_flops:
        of = result.optimiser_flops / result.local_batch
        table.add_row("optimiser", "", "", "", f"{of / size:,.1f}", "", f"{flops(result.optimiser_flops)} a step, for {result.local_batch:,} samples")
    return table


def _memory(result: Estimate) -> Table:
    memory = result.devices.device.memory
    table = _table("memory of one device, at the start of the backward pass", "what", "bytes", "share", "")
    whole = max(memory or 0.0, result.memory_total)
    for name, value in result.memory.items():
        table.add_row(name, gigabytes(value), _percent(value / whole), Text(bar(value / whole), style="magenta"))
    verdict = {True: ("fits", "green"), False: ("does not fit", "red"), None: ("", "")}[result.fits]
    of = f" of {gigabytes(memory)}" if memory else ""
    table.add_row(
        Text("sum", style="bold"),
        Text(gigabytes(result.memory_total), style="bold"),
        _percent(result.memory_total / whole),
        Text(f"{verdict[0]}{of}", style=verdict[1]),
    )
    return table


def _totals(result: Estimate) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    if result.largest_micro_batch is not None:
        fit = "none, not even one sample fits" if not result.largest_micro_batch else f"{result.largest_micro_batch:,}"
        at_once = " (the whole batch of a device)" if result.largest_micro_batch == result.local_batch else f" (of the divisors of {result.local_batch:,})"
        table.add_row("largest micro-batch", fit + at_once * bool(result.largest_micro_batch))
    if result.hours is not None and result.step_seconds:
        total = result.batch / result.step_seconds
        table.add_row(
            "time",
            f"{hours(result.hours)} = {result.hours * result.devices.count:,.0f} device-hours; {result.step_seconds:.3g} s a step, {total:,.0f} samples/s",
        )
    else:
        table.add_row("time", "unknown: see below")
    for name, operations, value in result.extra:
        table.add_row(name, f"{hours(value) if value is not None else 'unknown'} ({flops(operations)}), not part of the time")
    if result.cost is not None:
        table.add_row("cost", f"{result.cost:,.0f} (in the unit of --price-per-hour)")
    if result.network:
        sent = gigabytes(sum(v for k, v in result.network.items() if k.endswith("within a machine")))
        outside = sum(v for k, v in result.network.items() if k.endswith("between machines"))
        text = f"{sent} sent by each device a step within its machine" + (f", {gigabytes(outside)} to others" if outside else "")
        if result.network_seconds is not None:
            text += f"; {result.network_seconds:.3g} s without overlap"
            if result.compute_seconds:
                text += f", {_percent(result.network_seconds / result.compute_seconds)} of computing"
        table.add_row("network", text)
    disk = result.disk
    text = f"checkpoints {gigabytes(disk['checkpoints'] or 0)} ({gigabytes(disk['one checkpoint'] or 0)} each)"
    text += f"; a latent cache {gigabytes(disk['latent cache, a sample'])} a sample" if disk["latent cache, a sample"] else ""
    if disk["latent cache"]:
        text += f", {gigabytes(disk['latent cache'])} in all"
    text += f"; data {gigabytes(disk['data'])}" if disk["data"] is not None else "; data unknown (not here)"
    table.add_row("disk", text)
    table.add_row("speeds from", result.devices.device.source)
    return table


def _advice(result: Estimate) -> Table:
    table = _table("what would change it", "change", "set", "a sample", "time", "memory", "")
    table.columns[1].justify = "left"
    for row in result.advice:
        fits = {True: "fits", False: f"micro-batch {row['largest_micro_batch']} would fit" if row["largest_micro_batch"] else "does not fit", None: ""}[
            row["fits"]
        ]
        table.add_row(
            row["what"], row["set"], flops(row["sample_flops"]), hours(row["hours"]) if row["hours"] is not None else "-", gigabytes(row["memory"]), fits
        )
    return table


def _formulas(result: Estimate) -> Text:
    text, before = Text("the arithmetic", style="bold"), ""
    for section, formula, value in result.formulas:
        if section != before:
            text.append(f"\n{section}", style="bold")
        text.append(f"\n  {formula}", style="not bold").append(f" = {value}", style="not bold cyan")
        before = section
    return text


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%" if share < 0.1 else f"{100 * share:.0f}%"
