"""Report of a run: record, tables, plots and page."""
