"""The shards of one output: what the jobs of an array write, and what joins them."""
