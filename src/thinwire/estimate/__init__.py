"""What a run will cost, said before it runs: from its file and its model's config, without any weights."""
