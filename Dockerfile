# Training and generation in a container. For CPUs:
#
#     docker build -t megaman-lora .
#     docker run --rm megaman-lora --demo --max_train_steps 4
#
# For NVIDIA GPUs, with the NVIDIA Container Toolkit:
#
#     docker build -t megaman-lora --build-arg TORCH=cu130 .
#     docker run --rm --gpus all -v ./images:/images -v ./output:/output -v megaman-cache:/cache \
#         megaman-lora --data_dir /images --output_dir /output
#
# With --entrypoint generate-megaman the same image generates.

FROM python:3.11-slim AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM python:3.11-slim

# The name of PyTorch's index: cpu, cu130, or cu126 for a GTX 10.
ARG TORCH=cpu
# The owner of what is written into the volumes: your `id -u`.
ARG USER_ID=1000

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    HOME=/cache \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache

RUN --mount=type=bind,source=requirements_megaman_lora.txt,target=/requirements.txt \
    pip install "$(grep '^torch==' /requirements.txt)" \
        --index-url "https://download.pytorch.org/whl/${TORCH}" \
    && pip install -r /requirements.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-deps /wheels/*.whl
RUN useradd --uid "${USER_ID}" --home-dir /cache --no-create-home megaman \
    && mkdir -p /images /output /cache \
    && chown megaman /images /output /cache

USER megaman
# Relative paths, such as the default --output_dir, lead into the volume.
WORKDIR /output
VOLUME ["/images", "/output", "/cache"]
ENTRYPOINT ["megaman-lora"]
CMD ["--help"]
