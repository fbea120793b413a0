"""What runs the paper: configurations, data, runs, devices, evaluation and pictures."""

import os.path
import signal
import sys

# Ctrl-C while a command imports its modules ends it without a traceback; `run_script` handles it from then on. While
# `python -m lab.evaluate` imports this, argv[0] is "-m". In a notebook or a test it is another file.
is_command = os.path.basename(sys.argv[0]) in ("-m", "train_mnist.py", "sample.py")
if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # "&" in a shell script ignores SIGINT
    signal.signal(signal.SIGINT, signal.SIG_DFL)
