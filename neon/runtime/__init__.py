"""What every program runs on: processes, files, run folders, progress, downloads."""
