"""Check and time the CUDA kernels and the readers on a GPU, in one command of under eight minutes.

    python -m benchmarks.gpu --output gpu.json           # everything
    python -m benchmarks.gpu --quick                     # small sizes, to see that all of it runs
    python -m benchmarks.gpu --parts operations readers
    FASTMRC_CUDA_EMULATION=DIR python -m benchmarks.gpu --emulated   # no GPU, times mean nothing

The parts "operations" and "readers" compare with the CPU path; the others take times. The module of
each says what that means, `report` what counts as equal and `timing` what is timed.

Each part runs in a process of its own and within its own time, so that none can take another along;
the JSON is written anew after each. The exit code is 1 if something was not equal to the CPU path,
or could not be compared, 2 if there is nothing to run on, else 0: a speed that was missed is
reported only.
"""
