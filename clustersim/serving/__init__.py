"""Who goes next: requests, arrivals, batches, KV blocks, shards. Policies, no time."""
