"""From notebooks to pages: running, reporting, figures."""
