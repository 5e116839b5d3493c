"""The page of ``dynamax report``: from files that runs left to one HTML file. Knows no model and no tensor."""
