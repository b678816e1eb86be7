"""Studies whose results are committed: each is a module that runs, keeps its raw results and generates its page."""
