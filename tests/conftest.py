"""Shared by all tests: no hub, few threads, and tests/ on the path for `tiny`."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tiny models two threads mostly wait for each other
sys.path.insert(0, str(Path(__file__).parent))


def pytest_make_parametrize_id(config: object, val: object, argname: str) -> str | None:
    """Bytes have no place in a test's name: processes that share the tests must find the same names."""
    return argname if isinstance(val, bytes) else None
