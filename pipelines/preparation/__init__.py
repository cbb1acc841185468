"""Parts of `prepare.py`: survey, duplicates, plan, progress, estimate, inspection."""
