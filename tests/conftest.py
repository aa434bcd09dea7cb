"""Shared by all tests: no hub, few threads, and tests/ on the path for `tiny`."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tiny models two threads mostly wait for each other
sys.path.insert(0, str(Path(__file__).parent))
