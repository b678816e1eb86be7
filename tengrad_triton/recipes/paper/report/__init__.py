"""The report of `tengrad-triton paper`: one JSON document of all numbers, and figures and pages made from it."""
