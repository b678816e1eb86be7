"""The paper's experiments and the command line; `pip install 'tengrad-triton[train]'` brings what they need."""
