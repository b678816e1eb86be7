"""What a GPU is asked, in two calls of a few minutes each: `python -m perf.gpu first --out DIR`, and `second`.

The machine needs this repository, torch, triton, numpy and pytest, and pytest-benchmark for the kernels' times; the
package does not have to be installed. `python -m perf.gpu data FOLDER OUT.npz` packs the images for the second call.

    __main__                        the command line
    calls, boxes, summary, digest   the boxes of a call; processes and their time; how they ended; what they found
    pieces                          a process for each of the following
    smoke, trace, variants          training against definitions; the kernels of a step; launch configurations
    compiling, race, data           compiled steps; accuracy by training time; the images
    page, predictions               sections of docs/performance.md, and what was predicted
"""
