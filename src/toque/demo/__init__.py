"""The demo: a census of the Python source on this machine, one instance per file, with a pod killed half-way."""
