"""Reports for people: tables, charts, the page, Markdown, CSV, and the comparison of several results.

In the order of imports: records, tables, charts, sections, webpage, curves, report, comparison, load, dashboard.
"""
