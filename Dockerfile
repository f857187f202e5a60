# The GPU stack: CUDA build of torch, TransformerEngine, optionally NVIDIA Apex. Written from the documented
# requirements of these projects; it has NOT been built or run by our tests.
#
#   docker build -t apo_megatron .
#   sudo chown -R 10001 runs    # the user of the image, who writes there
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -v "$PWD/runs:/workspace/runs" apo_megatron apo-doctor
#
# CUDA_IMAGE must be of the CUDA release that torch is built for, because TransformerEngine and Apex are compiled
# against both: python -c "import torch; print(torch.version.cuda)" says which. Choose a "-devel" image: it has nvcc.
ARG CUDA_IMAGE=nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04

FROM ${CUDA_IMAGE}

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        build-essential cmake git ninja-build python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# Nobody trains as root. The user owns the environment and the folder of runs, nothing else.
RUN useradd --create-home --uid 10001 apo && mkdir -p /opt/apo /workspace/runs && chown -R apo /opt/apo /workspace
USER apo
WORKDIR /workspace
ENV VIRTUAL_ENV=/opt/apo/venv PATH=/opt/apo/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
RUN python3 -m venv "$VIRTUAL_ENV"

# torch before what is compiled against it. An index of its own is passed as --build-arg PIP_ARGS="--index-url ...";
# a token for one belongs into a build secret, not into an argument: arguments stay in the image.
ARG PIP_ARGS=""
COPY --chown=apo constraints.txt /opt/apo/
RUN pip install ${PIP_ARGS} -c /opt/apo/constraints.txt setuptools wheel packaging ninja pybind11 numpy torch
ARG MAX_JOBS=4
RUN MAX_JOBS=${MAX_JOBS} pip install ${PIP_ARGS} -c /opt/apo/constraints.txt --no-build-isolation \
        "transformer-engine[pytorch]>=1.10"

# Fused optimizer kernels, from NVIDIA's sources; the project named apex on the package index is unrelated.
ARG WITH_APEX=0
ARG APEX_REF=master
RUN if [ "$WITH_APEX" = 1 ]; then \
        git clone https://github.com/NVIDIA/apex /tmp/apex && git -C /tmp/apex checkout "$APEX_REF" \
        && MAX_JOBS=${MAX_JOBS} pip install --no-build-isolation \
            --config-settings "--build-option=--cpp_ext" --config-settings "--build-option=--cuda_ext" /tmp/apex \
        && rm -rf /tmp/apex; \
    fi

# Last: what changes most often.
COPY --chown=apo . /opt/apo/source
RUN pip install ${PIP_ARGS} -c /opt/apo/constraints.txt "/opt/apo/source[ray]"

CMD ["apo-doctor"]
