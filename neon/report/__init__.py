"""What is told of a run: its record, tables, plots and page."""
