"""A calibrated model and what is done with it: a run and its folder, grids of runs, reports and figures."""
