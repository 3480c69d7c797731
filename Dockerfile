# syntax=docker/dockerfile:1
# docker build --tag samed .                               for a CPU
# docker build --tag samed --build-arg TORCH=cuda .        for NVIDIA GPUs
# docs/install.md has the commands to run it, and says what was tried of this file.

ARG PYTHON=3.11.14

# The wheel is built beside the image, which so holds neither the sources nor what builds them.
FROM python:${PYTHON}-slim-bookworm AS wheel
RUN pip install --no-cache-dir setuptools==84.2.1
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM python:${PYTHON}-slim-bookworm
ARG TORCH=cpu
# Extras, by the names of their requirement files.
ARG EXTRAS="dicom onnx"
# The packages are a layer of their own, which a change of the source code leaves as it is.
COPY requirements*.txt /requirements/
WORKDIR /requirements
# On PyPI, PyTorch comes with the libraries of CUDA; the host has only the driver.
# hadolint ignore=DL3013
RUN set -eu; \
    case "$TORCH" in \
      cpu) grep '^torch==' requirements.txt > torch.txt; \
           pip install --no-cache-dir --index-url=https://download.pytorch.org/whl/cpu \
             -r torch.txt ;; \
      cuda) ;; \
      *) echo "TORCH is $TORCH, expected cpu or cuda" >&2; exit 2 ;; \
    esac; \
    set -- -r requirements.txt; \
    for extra in $EXTRAS; do set -- "$@" -r "requirements-$extra.txt"; done; \
    pip install --no-cache-dir "$@"; \
    pip install --no-cache-dir --no-deps --require-hashes -r requirements-viewer.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps /wheels/*.whl \
    && useradd --no-create-home --uid 1000 samed

# For `docker run --user UID:GID`, whose user has no name and no home, and for --read-only with
# --tmpfs /tmp: matplotlib, torch and triton keep caches in their home and ask for the user's name.
ENV HOME=/tmp \
    USER=samed \
    MPLCONFIGDIR=/tmp/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/tmp/inductor \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 1000:1000
# The user's folder is mounted here; weights are expected in its checkpoints/.
WORKDIR /data
CMD ["samed-predict", "--help"]
