"""Parts of `prepare.py`: survey, duplicates, plan, progress, estimate, inspection."""

# Ray reads its environment when it is imported, and `cluster` sets it: whichever part is imported first, before Ray.
from sr_platform import cluster as cluster
