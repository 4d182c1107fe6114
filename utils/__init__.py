"""Helpers, which import neither models nor engine."""

import os

# libgomp, which torch's loops run on, reads this when it is loaded. Its threads would spin for 16 ms before they sleep:
# of two trainings on one machine each then waits for the other's spinning.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
