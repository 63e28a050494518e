"""What stages leave for one another on disk; each file here is one artefact with its schema, loader and writer."""
