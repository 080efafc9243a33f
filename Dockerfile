# CPU:   docker build -t neon .
# GPUs:  docker build -t neon --build-arg DEVICE=cuda .
# Then:  docker run --rm --user "$(id -u):$(id -g)" -e HOME=/work -v "$PWD:/work" neon demo    (GPUs: add --gpus all)
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

# cpu: torch without CUDA, from PyTorch's own index; cuda: as PyPI has it, with the CUDA libraries
ARG DEVICE=cpu
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

WORKDIR /src
COPY . .
RUN case "$DEVICE" in \
        cpu) pip install --no-cache-dir --no-deps -c constraints.txt --index-url https://download.pytorch.org/whl/cpu \
                 torch torchvision ;; \
        cuda) ;; \
        *) echo "DEVICE=$DEVICE: expected cpu or cuda" >&2; exit 1 ;; \
    esac && \
    pip install --no-cache-dir -c constraints.txt '.[imm,diffusers]'

WORKDIR /work
ENTRYPOINT ["neon"]
CMD ["--help"]
