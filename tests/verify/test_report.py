"""The table, the JSON and the page, of results made by hand: extreme numbers, hostile text, colours, escapes."""

import io
import json
import math
import re
from datetime import UTC, datetime
from html.parser import HTMLParser

import pytest
from rich.console import Console

from nemo_automodel.verify import Target, find_target
from nemo_automodel.verify.check import Check
from nemo_automodel.verify.html import page
from nemo_automodel.verify.outcome import Difference, Outcome
from nemo_automodel.verify.report import Report, Result
from nemo_automodel.verify.table import Table

HOSTILE = "<script>alert('x')</script> & [bold red] \x1b[31m ${summary}"


def report(*results: Result, **changes: object) -> Report:
    fields = {
        "target": "my-model",
        "implementation": "a.Model",
        "reference": "b.Model",
        "versions": {"torch": "2.11"},
        "device": "cpu",
        "shrunk": ("hidden_size: 4096 -> 96",),
        "results": results,
    }
    return Report(**{**fields, **changes})  # type: ignore[arg-type]


PASSED = Result("modules", "layers", Outcome(True, "12 agree", (Difference("layer 0", 1e-12, 1e-10),)), 0.25)
EXACT = Result("weights", "round trip", Outcome(True, "every bit", (Difference("a", 0.0, 0.0),)), 0.1)
ABSENT = Result("end to end", "greedy", Outcome(None, "no generate()"), 0.0)
FAILED = Result(
    "modules",
    "positions",
    Outcome(
        False,
        "layer 2 differs\nand more",
        (
            Difference("layer 0", 0.0, 1e-10),
            Difference("layer 1", 1e-13, 1e-10),
            Difference("layer 2", 1e-3, 1e-10),
            Difference("layer 3", math.inf, 1e-10),
            Difference("layer 4", math.inf, 0.0),
        ),
    ),
    1.0,
)
RAISED = Result("modules", HOSTILE, Outcome(False, f"ValueError: {HOSTILE}"), 0.1, f"Traceback\n  {HOSTILE}")


@pytest.fixture(scope="module")
def target() -> Target:
    return find_target("LlamaForCausalLM")


def table(target: Target, given: Report, terminal: bool, width: int = 80) -> str:
    out = io.StringIO()
    shown = Table(target, Console(file=out, force_terminal=terminal, width=width, highlight=False))
    with shown:
        for result in given.results:
            shown.start(Check(result.group, result.name, lambda subject: PASSED.outcome))
            shown.add(result)
    shown.close(given)
    return out.getvalue()


def test_rows_have_verdict_difference_and_time(target: Target) -> None:
    text = table(target, report(PASSED, FAILED, EXACT, ABSENT), terminal=False)
    rows = [re.sub(" +", " ", line.strip()) for line in text.splitlines()]
    assert "layers pass 1.0e-12 of 1.0e-10 0.2 s 12 agree" in rows
    assert "positions FAIL inf of 1.0e-10 1.0 s layer 2 differs and more" in rows
    assert "round trip pass 0, exact 0.1 s every bit" in rows
    assert "greedy n/a 0.0 s no generate()" in rows
    assert [row for row in rows if row in ("modules", "weights", "end to end")] == ["modules", "weights", "end to end"]
    assert "layer 2 differs\nand more" in text[text.index("FAIL modules, positions") :]
    assert "on a smaller config: hidden_size: 4096 -> 96" in rows
    assert rows[-1] == "NOT verified: 2 passed, 1 failed, 1 not applicable, in 1 s"


def test_of_many_failures_the_one_to_begin_with_is_named(target: Target) -> None:
    follows = Result("end to end", "padding", FAILED.outcome, 0.1)
    text = table(target, report(PASSED, FAILED, follows), terminal=False)
    assert text.splitlines()[-3].startswith("begin with modules, positions")
    assert "begin with" not in table(target, report(PASSED, FAILED), terminal=False)


def test_elsewhere_than_on_a_terminal_lines_are_whole_and_plain(target: Target) -> None:
    long = Result("modules", "layers", Outcome(True, "word " * 60 + "end"), 0.1)
    plain, shown = (table(target, report(long), terminal) for terminal in (False, True))
    assert "\x1b" not in plain
    assert any(line.startswith("  layers") and line.endswith("end") for line in plain.splitlines())
    assert "\x1b[32mpass" in shown
    assert "modules: layers" in shown  # what is running
    assert "end" not in shown


def test_text_of_an_implementation_is_no_markup(target: Target) -> None:
    text = table(target, report(RAISED), terminal=False)
    assert text.count("& [bold red] ") == 5  # the row's name and detail; below, the name, the detail and the traceback


def test_json_has_stable_keys_and_no_literal_that_is_not_json() -> None:
    values = report(PASSED, FAILED, RAISED).to_json()
    text = json.dumps(values, allow_nan=False)
    assert json.loads(text) == values
    assert set(values) == {
        *("target", "implementation", "reference", "versions", "device", "shrunk", "results", "not_run", "passed")
    }
    assert set(values["results"][0]) == {"group", "name", "outcome", "seconds", "trouble"}
    assert set(values["results"][0]["outcome"]) == {"passed", "detail", "differences"}
    assert set(values["results"][0]["outcome"]["differences"][0]) == {"name", "error", "bound"}
    assert values["results"][1]["outcome"]["differences"][3]["error"] == "inf"


class Wellformed(HTMLParser):
    """Every tag closed in order; collects text and counts tags."""

    VOID = frozenset({"meta"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("line", "circle"), f"<{tag}/> is not closed by a slash in HTML"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(text: str) -> Wellformed:
    parser = Wellformed()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


def test_the_page_is_well_formed_whole_and_escaped() -> None:
    given = report(PASSED, FAILED, EXACT, ABSENT, RAISED, target=HOSTILE, shrunk=(HOSTILE,), device=HOSTILE)
    text = page(given, datetime(2026, 1, 2, 3, 4, tzinfo=UTC))
    parsed = parse(text)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in parsed.tags}
    assert not re.search(r"(?:src|href|url)\s*[=(]|https?:", text)
    assert parsed.text.count("<script>alert('x')</script>") >= 6
    assert "${summary}" in parsed.text  # what a template would have filled in
    assert "2026-01-02 03:04+00:00" in parsed.text
    assert "NOT verified: 2 passed, 2 failed, 1 not applicable" in parsed.text
    assert [tag for tag, _ in parsed.tags].count("details") == 1


def test_plots_mark_the_first_difference_past_its_bound() -> None:
    parsed = parse(page(report(PASSED, FAILED, EXACT)))
    plots = [attrs for tag, attrs in parsed.tags if tag == "svg"]
    assert len(plots) == 2  # what is exact needs none
    assert all(attrs["role"] == "img" for attrs in plots)
    assert "positions: differences over their bounds, 5 in all, the first past its bound is layer 2" in parsed.text
    assert "layers: differences over their bounds, 1 in all, all within their bounds" in parsed.text
    points = [attrs for tag, attrs in parsed.tags if tag == "circle"][1:]
    assert [attrs.get("class") for attrs in points] == [None, None, "past", "past", "past", "first"]
    assert points[5]["cx"] == points[2]["cx"]
    heights = [float(attrs["cy"] or "nan") for attrs in points]
    assert heights[0] > heights[1] > heights[2] > heights[3] == heights[4]
    bound = float(next(attrs["y1"] or "nan" for tag, attrs in parsed.tags if attrs.get("class") == "bound"))
    assert heights[1] > bound > heights[2]


def test_an_empty_report_has_a_page_and_is_not_verified() -> None:
    assert "NOT verified" in parse(page(report())).text
