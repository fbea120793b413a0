"""What runs the paper: configurations, data, runs, devices, evaluation and pictures."""
