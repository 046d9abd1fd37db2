"""One step: assembled by transforms, then written."""
