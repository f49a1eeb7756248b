"""Checks that a running service, in any language, keeps the promises that its callers rely on, over HTTP and Consul.

``python -m registry.conformance http://localhost:8004 --consul http://localhost:8500`` prints a line for each promise;
`examine` returns the same findings to a test.
"""

from registry.conformance.examination import PROMISES, CannotExamineError, Finding, Verdict, examine

__all__ = ["PROMISES", "CannotExamineError", "Finding", "Verdict", "examine"]
