"""One side of what is measured apart: measure starts this module in a process."""

import sys

from thinwire.compare.measure import main

main(*sys.argv[1:])
