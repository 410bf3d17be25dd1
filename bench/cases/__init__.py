"""What is measured: functions that worker.py runs, each in a process of its own."""
