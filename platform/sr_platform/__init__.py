"""What the platform knows of Ray, storage and MLflow; it knows nothing of FaithDiff and imports none of it."""
