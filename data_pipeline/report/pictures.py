"""The report's pictures, as PNG: where documents went, why, how long they are, in which languages, how many tokens.

Colours stand for domains and are the same in all pictures. The same numbers give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from operator import itemgetter
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from data_pipeline.clean.pipeline import BINS_PER_OCTAVE
from data_pipeline.execution.tally import Tally, add_to_tally, tally_sum
from data_pipeline.report.content import Loss, ReportContent

WIDTH_INCHES = 10.0
DPI = 110
SHOWN_LANGUAGES = 15
OTHER = "other"
# Distinct also for most colour-blind readers (Okabe and Ito 2008).
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#f0e442", "#333333")
REMAINING = "#dfe3e8"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
}


def domain_colours(domains: Sequence[str]) -> dict[str, str]:
    """A colour for each of the largest domains, grey for all others together (under ``"other"``)."""
    shown = dict(zip(domains, COLOURS, strict=False))
    return shown | ({OTHER: "#8a8f98"} if len(domains) > len(COLOURS) else {})


def grouped(values: Mapping[str, Any], colours: Mapping[str, str], number: Callable[[Any], float]) -> dict[str, float]:
    """``number(value)`` by domain, the domains without a colour added up under ``"other"``."""
    sums = dict.fromkeys(colours, 0.0)
    for domain, value in values.items():
        sums[domain if domain in colours else OTHER] += number(value)
    return sums


def as_png(draw: Callable[[ReportContent, Mapping[str, str]], Figure], content: ReportContent) -> bytes:
    """The picture that ``draw`` makes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = draw(content, domain_colours(content.domains))
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _legend(axes: Any, colours: Mapping[str, str], **options: Any) -> None:
    handles = [matplotlib.patches.Patch(color=colour, label=domain) for domain, colour in colours.items()]
    axes.legend(handles=handles, frameon=False, **options)


def _short(number: float) -> str:
    """``number`` in at most three digits, but in full below 10,000."""
    for threshold, size, unit in ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if number >= threshold:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}"


def _share(fraction: float) -> str:
    return "<0.1%" if 0 < fraction < 0.001 else f"{fraction:.1%}"


def _all_reasons(loss: Loss) -> Tally:
    total: Tally = {}
    for tally in loss.reasons.values():
        for domain, counts in tally.items():
            add_to_tally(total, domain, counts["bytes"], counts["documents"])
    return total


def _stack(axes: Any, row: int, tally: Tally, colours: Mapping[str, str], unit: str, start: float = 0.0) -> float:
    """Draw one bar in parts by domain, beginning at ``start``; returns where it ends."""
    for domain, value in grouped(tally, colours, itemgetter(unit)).items():
        axes.barh(row, value, left=start, color=colours[domain])
        start += value
    return start


def draw_flow(content: ReportContent, colours: Mapping[str, str]) -> Figure:
    """From all that was read to what is published, step by step: what goes, by domain, and what is left."""
    losses = [(loss.step, _all_reasons(loss)) for loss in content.losses]
    labels = ["read", *(step for step, _ in losses), "train", "validation"]
    figure = Figure(figsize=(WIDTH_INCHES, 1.3 + 0.34 * len(labels)))
    for axes, unit in zip(figure.subplots(1, 2, sharey=True), ("documents", "bytes"), strict=True):
        start = left = max(tally_sum(content.read)[unit], 1)
        for row, (_, lost) in enumerate(losses, start=1):
            number = tally_sum(lost)[unit]
            left -= number
            axes.barh(row, left, color=REMAINING)
            _stack(axes, row, lost, colours, unit, left)
            axes.text(start * 1.01, row, f"\u2212{_short(number)} ({_share(number / start)})", va="center", fontsize=8)
        for row, tally in ((0, content.read), (len(labels) - 2, content.train), (len(labels) - 1, content.validation)):
            edge = _stack(axes, row, tally, colours, unit)
            axes.text(start * 1.01, row, f"{_short(edge)} ({_share(edge / start)})", va="center", fontsize=8)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xlim(0, start * 1.3)
        axes.set_title("documents" if unit == "documents" else "bytes of text")
        axes.set_xticks([start * k / 4 for k in range(5)], [f"{25 * k}%" for k in range(5)])
    axes.invert_yaxis()
    _legend(figure, colours, loc="outside lower center", ncols=5)
    return figure


def draw_reasons(content: ReportContent, colours: Mapping[str, str]) -> Figure:
    """Documents dropped for each reason, by domain."""
    reasons = [(name, tally) for loss in content.losses for name, tally in loss.reasons.items()]
    reasons.sort(key=lambda item: (tally_sum(item[1])["documents"], item[0]))
    # As high as the bars, or as the legend, if that is higher.
    figure = Figure(figsize=(WIDTH_INCHES, 1.1 + max(0.26 * len(reasons), 0.2 * len(colours))))
    axes = figure.subplots()
    for row, (_, tally) in enumerate(reasons):
        edge = _stack(axes, row, tally, colours, "documents")
        axes.text(edge, row, f" {edge:,.0f}  ({_short(tally_sum(tally)['bytes'])} bytes)", va="center", fontsize=8)
    axes.set_yticks(range(len(reasons)), [name for name, _ in reasons])
    axes.margins(x=0.18)
    axes.set_xlabel("documents dropped")
    _legend(axes, colours, loc="lower right")
    return figure


def draw_lengths(content: ReportContent, colours: Mapping[str, str]) -> Figure:
    """How many kept documents have which length, by domain; lengths on a logarithmic axis."""
    figure = Figure(figsize=(WIDTH_INCHES, 3.2))
    axes = figure.subplots()
    bins = sorted({length for lengths in content.lengths.values() for length in lengths})
    span = range(bins[0], bins[-1] + 1) if bins else range(1)
    bottom = [0.0] * len(span)
    edges = [2 ** (length / BINS_PER_OCTAVE) for length in (*span, span[-1] + 1)]
    widths = [right - left for left, right in pairwise(edges)]
    sums = [
        grouped({name: lengths.get(length, 0) for name, lengths in content.lengths.items()}, colours, float)
        for length in span
    ]
    for domain, colour in colours.items():
        heights = [values[domain] for values in sums]
        axes.bar(edges[:-1], heights, widths, bottom, align="edge", color=colour, edgecolor="white", linewidth=0.4)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    axes.set_xscale("log", base=10)
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))
    axes.set_xlabel("length after cleaning, bytes of UTF-8")
    axes.set_ylabel("documents")
    _legend(axes, colours, loc="upper right")
    return figure


def draw_languages(content: ReportContent, colours: Mapping[str, str]) -> Figure:
    """The likeliest language of all documents that were identified, on a logarithmic axis."""
    ranked = sorted(content.languages.items(), key=lambda item: (-item[1], item[0]))
    shown, rest = ranked[:SHOWN_LANGUAGES], sum(count for _, count in ranked[SHOWN_LANGUAGES:])
    bars = shown + ([(f"{len(ranked) - SHOWN_LANGUAGES} more", rest)] if rest else [])
    figure = Figure(figsize=(WIDTH_INCHES, 3.0))
    axes = figure.subplots()
    axes.bar([name for name, _ in bars], [count for _, count in bars], color="#4878a8", width=0.7)
    for place, (_, count) in enumerate(bars):
        axes.text(place, count, _short(count), ha="center", va="bottom", fontsize=8)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    axes.set_ylabel("documents")
    return figure


def draw_tokens(content: ReportContent, colours: Mapping[str, str]) -> Figure:
    """Tokens by domain in both splits, each bar with its share."""
    figure = Figure(figsize=(WIDTH_INCHES, 0.9 + 0.32 * max(len(colours), 2)))
    for axes, split in zip(figure.subplots(1, 2, sharey=True), ("train", "validation"), strict=True):
        tokens = grouped(content.tokens[split], colours, float)
        total = max(sum(tokens.values()), 1.0)
        axes.barh(list(tokens), list(tokens.values()), color=[colours[domain] for domain in tokens], height=0.65)
        for row, value in enumerate(tokens.values()):
            axes.text(value, row, f" {_short(value)} ({value / total:.1%})", va="center", fontsize=8)
        axes.set_title(f"{split}: {_short(total)} tokens")
        axes.xaxis.set_major_formatter(lambda value, _: _short(value))
        axes.locator_params(axis="x", nbins=4)
        axes.margins(x=0.4)
    axes.invert_yaxis()
    return figure
