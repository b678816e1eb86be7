"""What a GPU is asked, in two calls of a few minutes each: `python -m perf.gpu first --out DIR`, and `second`.

The machine needs this repository, torch, triton and pytest; pytest-benchmark for the kernels' times, and numpy for the
race. The package does not have to be installed. `python -m perf.gpu data FOLDER OUT.npz` packs the images of the race.

    calls, boxes       the boxes of each call; processes, and their time
    summary, digest    how the boxes ended; the lines that are printed about them
    pieces/            what is asked beside the suites of `python -m perf`
    data               the images
    outcomes           what the results come to
    page, predictions  sections of docs/performance.md; what was predicted
"""
