"""Problems: what a search works on, how it is measured, and what it becomes."""
