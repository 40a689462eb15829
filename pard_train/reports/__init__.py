"""What people read: tables, charts, the page, the comparison of several results.

In the order of imports: records, tables, charts, sections, webpage, report, comparison.
"""
