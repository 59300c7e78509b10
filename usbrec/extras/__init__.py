"""Commands around the method (merge, export, pages), and the fetching and conversion of models.

No other part of usbrec imports this package.
"""
