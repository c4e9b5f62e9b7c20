"""A pytest plugin for free-threaded interpreters: who brings the GIL back fails the run."""

from __future__ import annotations

import sys

import pytest


def pytest_sessionstart(session: pytest.Session) -> None:
    check("begins")


def pytest_sessionfinish(session: pytest.Session) -> None:
    check("ends")


def check(moment: str) -> None:
    if getattr(sys, "_is_gil_enabled", lambda: True)():
        pytest.exit(f"the run {moment} with a GIL", returncode=1)
