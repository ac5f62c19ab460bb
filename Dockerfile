# regsurgery with torch for the CPU; for CUDA: docker build --build-arg TORCH=cu130 .
# docker run --rm -v "$PWD:/work" regsurgery patch ./model -o patched --images photos
ARG PYTHON=3.13
FROM python:${PYTHON}-slim AS build
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM python:${PYTHON}-slim
ARG TORCH=cpu
COPY .ci/newest.txt /constraints.txt
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --constraint /constraints.txt \
        --extra-index-url "https://download.pytorch.org/whl/${TORCH}" /wheels/*.whl
RUN useradd --create-home --uid 1000 user && install --directory --owner user /work
USER 1000
WORKDIR /work
ENTRYPOINT ["regsurgery"]
CMD ["--help"]
