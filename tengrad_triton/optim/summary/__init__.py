"""The summary of an optimizer: an entry for each parameter, as text, as HTML and as a data frame."""

from tengrad_triton.optim.summary.entries import ParameterSummary, Stored, entries_of, others_of
from tengrad_triton.optim.summary.summary import Summary
from tengrad_triton.optim.summary.tengrad import choices_of, summarize

__all__ = ["ParameterSummary", "Stored", "Summary", "choices_of", "entries_of", "others_of", "summarize"]
