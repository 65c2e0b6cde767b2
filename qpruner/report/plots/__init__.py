"""The plots of a run as Vega-Lite specifications: interactive on the page, PNG files for GitHub."""
