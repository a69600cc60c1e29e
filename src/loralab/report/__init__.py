"""The report: run folders in, one self-contained HTML page out. `loralab.report.page.write` makes it."""
