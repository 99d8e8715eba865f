"""What is measured: fitness on probes, metrics, and what a schedule costs."""
