"""The report of `tengrad-triton paper`: one JSON document, the figures, and the pages made from it."""
