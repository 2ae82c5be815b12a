"""Proof that an implementation equals its reference: ``automodel verify``, and `assert_verified` for tests."""

from nemo_automodel.verify.report import Report, Result
from nemo_automodel.verify.run import assert_verified, verify
from nemo_automodel.verify.target import Target, TargetError, find_target

__all__ = ["Report", "Result", "Target", "TargetError", "assert_verified", "find_target", "verify"]
