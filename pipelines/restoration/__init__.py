"""The parts of `pipelines/restore.py`."""
