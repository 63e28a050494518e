"""What every other room stands on: errors, files, progress, seeds."""
