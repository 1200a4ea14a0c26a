"""The files that ship with Corolla: a model, data and the templates of reports."""
