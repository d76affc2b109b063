"""Where parity is required (PERMJAX_REQUIRE_PARITY, as in CI), a missing library or a skipped test is a failure."""

import importlib
import os

import pytest

REQUIRED = bool(os.environ.get("PERMJAX_REQUIRE_PARITY"))
if REQUIRED:
    for library in ("torch", "transformers", "peft", "pykeen"):
        importlib.import_module(library)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if REQUIRED and report.skipped:
        report.outcome, report.longrepr = "failed", f"{item.name} was skipped, but parity is required here"
    return report
