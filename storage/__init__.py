"""What is kept: records and groups, the journal, the folded store, and the ports to the world with their fakes."""
