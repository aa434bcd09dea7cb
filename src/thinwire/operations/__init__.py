"""What an operator sees of a run or a site: status, a page and metrics that follow it. Reads files, needs no torch."""
