"""Work on a calibrated model: runs and their folders, grids of runs, reports and figures."""
