"""Commands around the method (merge, export, pages, the server); models fetched and converted.

No other part of usbrec imports this package.
"""
