"""Studies whose results are committed. Each is a module that runs, keeps its raw results and writes its page."""
