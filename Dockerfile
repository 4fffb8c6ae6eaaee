# HIVE-DS in a container, by the same make targets as without one:
#   docker build -t hive-ds . && docker run --rm --shm-size=2g hive-ds
#   docker run --rm --shm-size=2g hive-ds make test
# On a machine with NVIDIA GPUs add `--gpus all`: PyPI's torch brings its own CUDA libraries.
FROM python:3.12-slim

RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ make ninja-build \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /hive-ds
COPY . .
RUN make venv

CMD ["make", "quickstart"]
