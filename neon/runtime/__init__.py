"""What every program runs on: processes, threads, signals, files, run folders, progress, downloads."""
