"""Results on disk: the run folder and its lock, the record of a run, schedules and plans with their bank."""
