# The commands that the README and CI use. Everything lives in .venv and build/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml constraints.txt $(shell find plugins -type f -not -path '*/__pycache__/*' 2>/dev/null)
TEST_LIBRARIES := build/test-libraries
OLD_ORT := build/onnxruntime-1.18.1
GPU_ORT := build/onnxruntime-gpu
LEAN_TENSORRT := build/tensorrt-lean
CUDA_TOOLS := build/cuda-tools
WORKERS ?= 2
# The compiled CUDA kernels, for every build in this tree.
export D2D_CUDA_CACHE := $(abspath build/cuda-kernels)

.PHONY: demo test check bench gpu-check cuda-statistics clean

demo: $(VENV)/installed
	$(BIN)/dit2deploy demo --out build/demo

test: check $(TEST_LIBRARIES)/built $(OLD_ORT)/installed $(GPU_ORT)/installed $(LEAN_TENSORRT)/installed cuda-statistics
	D2D_TEST_LIBRARIES=$(abspath $(TEST_LIBRARIES)) D2D_OLD_ORT=$(abspath $(OLD_ORT)) D2D_GPU_ORT=$(abspath $(GPU_ORT)) \
	    D2D_LEAN_TENSORRT_10=$(abspath $(LEAN_TENSORRT)/10) D2D_LEAN_TENSORRT_11=$(abspath $(LEAN_TENSORRT)/11) \
	    OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST)

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check dit2deploy tests tools
	$(BIN)/ruff check dit2deploy tests tools
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $$(find plugins tests -name '*.h' -o -name '*.cc' -o -name '*.cu')

bench: $(VENV)/installed-dev demo
	$(BIN)/python tools/bench_gemm.py --quick
	$(BIN)/python tools/bench_model.py --quick

# Needs an NVIDIA GPU: the tests marked gpu, then times beside torch and the demo's GPU engines beside the quantized
# PyTorch model, into tools/results/bench_gpu.json.
gpu-check: $(VENV)/installed-dev demo
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python tools/bench_gpu.py --bundle build/demo

# Registers, spills, occupancy and instructions of the CUDA kernels on every GPU generation, without a GPU.
cuda-statistics: $(VENV)/installed-dev $(CUDA_TOOLS)/installed
	$(BIN)/python tools/cuda_statistics.py --check

$(CUDA_TOOLS)/installed: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(CUDA_TOOLS) nvidia-cuda-cuobjdump==13.5.37 \
	    nvidia-cuda-nvdisasm==13.5.37 nvidia-cuda-nvrtc-cu12==12.4.127 nvidia-cuda-nvrtc==13.1.115
	touch $@

# An editable install: Python is read from the tree, the native library is built once and again when plugins/ changes.
# Without pip's isolation, which hands scikit-build-core a new place each time: that makes it compile everything anew.
$(VENV)/installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python tools/build_requires.py > $(VENV)/build-requires.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -r $(VENV)/build-requires.txt cmake ninja
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e '.[rtx]'
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e '.[rtx,dev]'
	touch $@

# The same kernels as test libraries: AVX-512 by emulation, CUDA sources compiled for the host, and, where there is a
# cross compiler, NEON as a program for qemu.
$(TEST_LIBRARIES)/built: $(VENV)/installed-dev $(SOURCES)
	PATH=$(abspath $(BIN)):$$PATH cmake -S plugins -B $(TEST_LIBRARIES) -G Ninja -DCMAKE_BUILD_TYPE=Release \
	    -DD2D_TEST_LIBRARIES=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python) > /dev/null
	PATH=$(abspath $(BIN)):$$PATH cmake --build $(TEST_LIBRARIES)
	command -v aarch64-linux-gnu-g++ > /dev/null || { echo "note: no aarch64-linux-gnu-g++; the NEON tests will skip"; exit 0; }; \
	    PATH=$(abspath $(BIN)):$$PATH; cmake -S plugins -B $(TEST_LIBRARIES)/aarch64 -G Ninja -DCMAKE_BUILD_TYPE=Release \
	    -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
	    -DD2D_TEST_LIBRARIES=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python) > /dev/null && \
	    cmake --build $(TEST_LIBRARIES)/aarch64
	touch $@

# The oldest runtime that we say we support, and the newest one's GPU wheel (340 MB), run on the CPU. What has no wheel for
# this Python is skipped by name in the tests.
$(OLD_ORT)/installed: $(VENV)/installed-dev
	mkdir -p $(OLD_ORT)
	$(BIN)/python -m pip install --quiet --upgrade --target $(OLD_ORT) onnxruntime==1.18.1 numpy==1.26.4 2>/dev/null \
	    || echo "note: onnxruntime 1.18.1 cannot be installed here; its tests will skip"
	touch $@

$(GPU_ORT)/installed: $(VENV)/installed-dev
	mkdir -p $(GPU_ORT)
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(GPU_ORT) onnxruntime-gpu==1.31.1 2>/dev/null \
	    || echo "note: onnxruntime-gpu cannot be installed here; its test will skip"
	touch $@

# The registries of the full TensorRT 10 and 11, whose builders need a GPU (45 MB each).
$(LEAN_TENSORRT)/installed: $(VENV)/installed-dev
	$(call lean_tensorrt,10,cu12,10.16.1.11)
	$(call lean_tensorrt,11,cu13,11.4.0.106)
	touch $@

define lean_tensorrt
	mkdir -p $(LEAN_TENSORRT)/$(1)
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(LEAN_TENSORRT)/$(1) \
	    tensorrt_lean_$(2)_libs==$(3) tensorrt_lean_$(2)_bindings==$(3) 2>/dev/null \
	    || echo "note: tensorrt-lean $(3) cannot be installed here; its test will skip"
endef

clean:
	rm -rf build $(VENV)
