"""A report as one page that opens from disk: no script, no network, every value escaped."""

import math
from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape
from itertools import groupby
from string import Template

from nemo_automodel.verify.outcome import Difference
from nemo_automodel.verify.report import Report, Result

WIDTH, HEIGHT, LEFT, TOP = 720, 180, 60, 12
_LOWEST, _HIGHEST = -8, 12  # decades of error over bound that are told apart; what is beyond is drawn at the edge

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>$verdict: $target</title>
<style>
:root { color-scheme: light dark; --pass: light-dark(#1a7f37, #3fb950); --fail: light-dark(#cf222e, #ff7b72);
  --dim: light-dark(#656d76, #8d96a0); --line: light-dark(#d0d7de, #3d444d); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2.5rem; }
h3 { font-size: 1rem; margin: 2rem 0 .2rem; }
table { border-collapse: collapse; width: 100%; } caption { text-align: left; }
th, td { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); }
td.number { white-space: nowrap; font-variant-numeric: tabular-nums; }
.pass { color: var(--pass); } .FAIL { color: var(--fail); font-weight: 600; } .na { color: var(--dim); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; } dt { color: var(--dim); }
dd { margin: 0; overflow-wrap: anywhere; }
pre { overflow-x: auto; font-size: .85rem; border-left: 3px solid var(--line); padding-left: .8rem; }
svg { max-width: 100%; height: auto; font: 11px system-ui, sans-serif; fill: currentColor; }
.bound { stroke: var(--fail); stroke-dasharray: 5 3; } .axis { stroke: var(--line); }
circle { fill: var(--pass); } circle.past { fill: var(--fail); }
circle.first { fill: none; stroke: var(--fail); stroke-width: 2; }
</style>
</head>
<body>
<h1><span class="$css">$verdict</span> $target</h1>
<dl>$facts</dl>
<p>$summary</p>
<table>
<caption class="na">Each check, with the difference that is nearest to its bound.</caption>
<thead><tr><th>check</th><th></th><th>difference of bound</th><th>time</th><th>detail</th></tr></thead>
$rows
</table>
$failures
$plots
</body>
</html>
""")


def page(report: Report, date: datetime | None = None) -> str:
    """The page of ``report``; ``date`` is now unless given."""
    facts = {
        "implementation": report.implementation,
        "reference": report.reference,
        "versions": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        "device": report.device,
        "date": (date or datetime.now().astimezone()).isoformat(" ", "minutes"),
        "made smaller": "; ".join(report.shrunk) or "nothing",
    }
    return _PAGE.substitute(
        verdict="verified" if report.passed else "NOT verified",
        css="pass" if report.passed else "FAIL",
        target=escape(report.target),
        facts="".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items()),
        summary=escape(report.summary()),
        rows="\n".join(_rows(report.results)),
        failures="\n".join(_failures(report.results)),
        plots="\n".join(_plots(report.results)),
    )


def _rows(results: Sequence[Result]) -> Iterable[str]:
    for group, members in groupby(results, key=lambda result: result.group):
        yield f'<tbody><tr><th colspan="5" scope="rowgroup">{escape(group)}</th></tr>'
        for result in members:
            yield (
                f'<tr><td>{escape(result.name)}</td><td class="{_css(result)}">{result.word}</td>'
                f'<td class="number">{result.measured}</td><td class="number">{result.seconds:.1f} s</td>'
                f"<td>{escape(result.outcome.detail)}</td></tr>"
            )
        yield "</tbody>"


def _failures(results: Sequence[Result]) -> Iterable[str]:
    raised = [result for result in results if result.trouble]
    if raised:
        yield "<h2>What was raised</h2>"
    for result in raised:
        yield (
            f"<details><summary>{escape(result.group)}, {escape(result.name)}</summary>"
            f"<pre>{escape(result.trouble)}</pre></details>"
        )


def _plots(results: Sequence[Result]) -> Iterable[str]:
    measured = [result for result in results if any(each.error for each in result.outcome.differences)]
    if measured:
        yield "<h2>Differences over their bounds</h2>"
        yield '<p class="na">In the order in which they were compared. Rest the pointer on a point for its name.</p>'
    for result in measured:
        title = f"{result.group}, {result.name}"
        yield f'<h3>{escape(title)} <span class="{_css(result)}">{result.word}</span></h3>'
        yield _plot(title, result.outcome.differences)


def _plot(title: str, differences: Sequence[Difference]) -> str:
    """Each difference in units of its bound, on a log scale, the bound itself as a line."""
    decades = [_decade(each) for each in differences]
    low, high = math.floor(min(-1, *decades)), math.ceil(max(1, *decades))

    def y(decade: float) -> float:
        return TOP + (high - decade) / (high - low) * HEIGHT

    def x(index: int) -> float:
        return LEFT + (index + 0.5) / len(differences) * (WIDTH - LEFT)

    past = [index for index, each in enumerate(differences) if not each.passed]
    verdict = f"the first past its bound is {differences[past[0]].name}" if past else "all within their bounds"
    parts = [
        f'<svg role="img" viewBox="0 0 {WIDTH} {HEIGHT + 2 * TOP + 14}" width="{WIDTH}">',
        f"<title>{escape(title)}: differences over their bounds, {len(differences)} in all, {escape(verdict)}</title>",
    ]
    between = max(1, (high - low) // 6)
    for tick in (decade for decade in range(low, high + 1) if decade % between == 0):
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        label = f"1e{tick}" if tick else "bound"
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{label}</text>')
    parts.append(f'<line class="bound" x1="{LEFT}" x2="{WIDTH}" y1="{y(0):.1f}" y2="{y(0):.1f}"/>')
    for index, (each, decade) in enumerate(zip(differences, decades, strict=True)):
        css = "" if each.passed else ' class="past"'
        parts.append(
            f'<circle{css} cx="{x(index):.1f}" cy="{y(decade):.1f}" r="3">'
            f"<title>{escape(each.name)}: {each.error:.2g}, {each.bound:.2g} allowed</title></circle>"
        )
    if past:
        first = past[0]
        at, anchor = x(first), "start" if first < len(differences) / 2 else "end"
        parts.append(f'<circle class="first" cx="{at:.1f}" cy="{y(decades[first]):.1f}" r="7"/>')
        name = escape(differences[first].name)
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT + 2 * TOP + 8}" text-anchor="{anchor}">{name}</text>')
    return "\n".join([*parts, "</svg>"])


def _decade(difference: Difference) -> float:
    ratio = difference.ratio
    return min(max(math.log10(ratio), _LOWEST), _HIGHEST) if ratio else _LOWEST


def _css(result: Result) -> str:
    return result.word.replace("/", "")
