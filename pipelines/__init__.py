"""Runnable jobs: each file is one job, `python pipelines/<job>.py --help` explains it."""
