"""``report.html``: one file with pictures, tables and samples, which asks nothing of the network.

Text of documents is other people's: all of it is escaped, and a content security policy forbids scripts and requests
anyway.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape

from data_pipeline.clean.samples import KEPT, Sample
from data_pipeline.execution.tally import Counts, tally_sum
from data_pipeline.report.content import ReportContent
from data_pipeline.report.pictures import (
    as_png,
    draw_flow,
    draw_languages,
    draw_lengths,
    draw_reasons,
    draw_tokens,
)
from data_pipeline.split import SPLITS

LOSSES = ("quarantined", "dropped")
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1d2430 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #d5dae1 }
img { max-width: 100%; height: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .15rem .8rem; text-align: right; border-bottom: 1px solid #e6e9ee } th { font-weight: 600 }
td:first-child, th:first-child { text-align: left; padding-left: 0 }
.sources td:nth-child(2), .sources th:nth-child(2) { text-align: left }
details { margin: .3rem 0 } summary { cursor: pointer }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f6f8; padding: .6rem .8rem; margin: .4rem 0 }
.note { color: #5a6472 }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def _picture(png: bytes, alternative: str) -> str:
    return f'<img alt="{escape(alternative)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f'<table class="{kind}">' + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def _domain_table(content: ReportContent) -> str:
    kept = dict.fromkeys(content.read, 0)
    for tally in (content.train, content.validation):
        for domain, counts in tally.items():
            kept[domain] = kept.get(domain, 0) + counts["documents"]

    def row(name: str, documents: int, size: int, published: int, tokens: int) -> list[str]:
        share = f"{published / documents:.1%}" if documents else ""
        return [name, f"{documents:,}", f"{size / 1e6:,.2f}", f"{published:,}", share, f"{tokens:,}"]

    def tokens_of(domain: str) -> int:
        return sum(tokens.get(domain, 0) for tokens in content.tokens.values())

    rows = [
        row(domain, content.read[domain]["documents"], content.read[domain]["bytes"], kept[domain], tokens_of(domain))
        for domain in content.domains
    ]
    total = tally_sum(content.read)
    tokens = sum(sum(by_domain.values()) for by_domain in content.tokens.values())
    rows.append(row("all", total["documents"], total["bytes"], sum(kept.values()), tokens))
    return _table(("domain", "read", "MB", "published", "of those read", "tokens"), rows)


def _source_table(content: ReportContent) -> str:
    """What each source gave and lost, a row a reason below each source's own."""
    rows = []
    for name, account in content.sources.items():
        read = account["read"]
        published = [account[split] for split in SPLITS]
        lines = [("read", read)]
        lines += [(f"{kind}: {reason}", counts) for kind in LOSSES for reason, counts in account[kind].items()]
        lines.append(("published", {unit: sum(counts[unit] for counts in published) for unit in read}))
        for index, (what, counts) in enumerate(lines):
            share = f"{counts['documents'] / read['documents']:.2%}" if read["documents"] else ""
            rows.append([name if not index else "", what, f"{counts['documents']:,}", share, _megabytes(counts)])
    return _table(("source", "what", "documents", "of those read", "MB"), rows, "sources")


def _megabytes(counts: Counts) -> str:
    return f"{counts['bytes'] / 1e6:,.3f}"


def _loss_table(content: ReportContent) -> str:
    read = max(tally_sum(content.read)["documents"], 1)
    rows = []
    for loss in content.losses:
        for reason, tally in sorted(loss.reasons.items()):
            counts = tally_sum(tally)
            share = f"{counts['documents'] / read:.2%}"
            rows.append([reason, loss.step, f"{counts['documents']:,}", share, _megabytes(counts)])
    return _table(("reason", "step", "documents", "of all read", "MB"), rows)


def _sample(sample: Sample) -> str:
    cut = "" if len(sample.excerpt.encode()) >= sample.size_bytes else " \u2026"
    head = f"{sample.identity} \u00b7 {sample.domain} \u00b7 {sample.size_bytes:,} bytes"
    return f'<p class="note">{escape(head)}</p><pre>{escape(sample.excerpt)}{cut}</pre>'


def _samples(content: ReportContent) -> str:
    order = [KEPT, *(reason for loss in content.losses for reason in sorted(loss.reasons))]
    return "".join(
        f"<details><summary>{escape(reason)}</summary>{''.join(map(_sample, content.samples[reason]))}</details>"
        for reason in dict.fromkeys(order)
        if content.samples.get(reason)
    )


def render_page(content: ReportContent) -> str:
    """The page as HTML; the same content gives the same page."""
    languages = (
        _picture(as_png(draw_languages, content), "documents by language")
        if content.languages
        else '<p class="note">No source had its language identified (clean.language).</p>'
    )
    parts = [
        f"<h1>Data set {escape(content.name)}</h1>",
        _domain_table(content),
        "<h2>From read to published</h2>",
        '<p class="note">Colour: what a step dropped, by domain. Bytes are those at the time of the drop; what mending '
        "changes inside of documents is in no bar.</p>",
        _picture(as_png(draw_flow, content), "documents and bytes left after each step"),
        "<h2>Why documents were dropped</h2>",
        _picture(as_png(draw_reasons, content), "documents dropped for each reason") if content.losses else "",
        _loss_table(content),
        "<h2>Sources</h2>",
        _source_table(content),
        "<h2>Lengths</h2>",
        _picture(as_png(draw_lengths, content), "kept documents by length"),
        "<h2>Languages</h2>",
        languages,
        "<h2>Tokens</h2>",
        _picture(as_png(draw_tokens, content), "tokens by domain"),
        "<h2>Samples</h2>",
        '<p class="note">A few documents for each reason, chosen by a hash of their text; the beginnings, with '
        "e-mail and IP addresses replaced.</p>",
        _samples(content),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escape(content.name)}: report</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
