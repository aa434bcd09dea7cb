"""What a run will cost, estimated before it runs: from its file and its model's config, without any weights."""
