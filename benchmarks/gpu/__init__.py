"""The proof on a GPU: right results, and how fast; `python -m benchmarks.gpu --help`.

It is one command for a machine that may be there for minutes only. It needs PyTorch with CUDA,
numpy, scipy, h5py, einops, safetensors, tqdm, pillow and matplotlib, and neither a network nor an
installation.

A stage is a generator function that takes a `rows.Setting` and yields a `rows.Row` for each result
as soon as it has it. `__main__.STAGES` holds the stages in their order, each with its deadline in
seconds. Every stage runs in its own process, so an endless loop, a lost CUDA context or a killed
process ends only that stage.
"""
