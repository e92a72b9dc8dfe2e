"""JUnit XML of a run: a suite for each subject, a case for each check."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as xml

from eptransport.conformance.run import Outcome

__all__ = ["write_junit"]


def write_junit(path: Path, outcomes: Sequence[Outcome]) -> None:
    root = xml.Element("testsuites", name="eptransport conformance")
    for label in dict.fromkeys(outcome.subject for outcome in outcomes):
        of = [outcome for outcome in outcomes if outcome.subject == label]
        suite = xml.SubElement(
            root,
            "testsuite",
            name=label,
            tests=str(len(of)),
            failures=str(sum(outcome.verdict == "failed" for outcome in of)),
            errors=str(sum(outcome.verdict in ("crashed", "hung") for outcome in of)),
            skipped=str(sum(outcome.verdict in ("skipped", "waived") for outcome in of)),
            time=f"{sum(outcome.seconds for outcome in of):.3f}",
        )
        for outcome in of:
            case = xml.SubElement(
                suite,
                "testcase",
                classname=f"{label}.clause{outcome.clause:02d}",
                name=f"{outcome.check} {outcome.name}",
                time=f"{outcome.seconds:.3f}",
            )
            if outcome.verdict == "passed":
                continue
            kind = {"failed": "failure", "crashed": "error", "hung": "error"}.get(outcome.verdict, "skipped")
            xml.SubElement(case, kind, message=_printable(outcome.text), type=outcome.verdict)
    xml.indent(root)
    xml.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def _printable(text: str) -> str:
    """A plugin's sentence may hold what XML can't: such characters are shown as Python writes them."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
