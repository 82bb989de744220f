# An image with the package and all its extras. Results and data are mounted:
#   docker build -t pai-bench .
#   docker run --rm --gpus all -v "$PWD":/work pai-bench pruner=synflow sparsity=0.98
FROM python:3.11-slim

# Their versions are those of the base image. git: a run records the commit. build-essential: compile=true compiles kernels.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git build-essential \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/pai_bench
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt '.[all]'

WORKDIR /work
ENTRYPOINT ["pai-bench"]
