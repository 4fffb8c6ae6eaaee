# HIVE-DS in a container, by the same make targets as without one:
#   docker build -t hive-ds . && docker run --rm --shm-size=2g hive-ds
#   docker run --rm --shm-size=2g hive-ds make test
# On a machine with NVIDIA GPUs add `--gpus all`: PyPI's torch brings its own CUDA libraries.
FROM python:3.12-slim

# What enroot (pyxis) and the NVIDIA container toolkit go by where no `--gpus` is given.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# The last three are what NCCL loads to use InfiniBand; without them it takes TCP.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ make ninja-build libibverbs1 ibverbs-providers librdmacm1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /hive-ds
COPY . .
RUN make venv

CMD ["make", "quickstart"]
