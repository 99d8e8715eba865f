"""Search strategies and their operators: what diffes finds by name through its entry points."""
