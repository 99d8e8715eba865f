"""Search strategies and their operators, which diffes finds by name through its entry points."""
