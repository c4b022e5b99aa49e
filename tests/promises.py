"""Certificates for tests that need one."""

from lightning_mue.certificate import Certificate, Evidence
from lightning_mue.promise import Promise


def certificate(kind="certified", metric="accuracy", keep=0.98, level=0.95, **more):
    """Return a certificate of one promise; ``more`` goes to it."""
    numbers = (900, 300, 0.01) if kind == "certified" else ()
    evidence = Evidence(Promise(metric, keep=keep), "", *numbers, method="betting on cluster means")
    return Certificate(kind, (evidence,), level, **more)
