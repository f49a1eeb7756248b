"""Is this running service a good citizen? A black box, asked over HTTP and over Consul, in any language.

``python -m registry.conformance http://localhost:8004 --consul http://localhost:8500`` prints a line for each promise;
`examine` gives the same to a test.
"""

from registry.conformance.examination import PROMISES, CannotExamineError, Finding, Verdict, examine

__all__ = ["PROMISES", "CannotExamineError", "Finding", "Verdict", "examine"]
